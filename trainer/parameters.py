"""How many parameters a model has, from its settings alone."""

from __future__ import annotations

from .settings import ModelSettings


def count_parameters(model: ModelSettings, vocab: int) -> int:
    """Parameters of the whole model for a vocabulary of `vocab` tokens, padding not counted."""
    hidden, width = model.hidden, model.head_width
    attention = hidden * width * (2 * model.heads + 2 * model.kv_heads)
    if model.qkv_bias:
        attention += width * (model.heads + 2 * model.kv_heads)
    norms = 2 * hidden + (2 * width if model.qk_norm else 0)
    mlp = 3 * hidden * model.ffn_hidden
    if model.moe is not None:
        mlp = model.moe.experts * (mlp + hidden)
    embeddings = (1 if model.tied_embeddings else 2) * vocab * hidden
    return embeddings + model.layers * (attention + norms + mlp) + hidden
