"""How many parameters a model has, from its settings alone."""

from __future__ import annotations

from ..attention.layer_settings import AttentionSettings
from ..attention.parameters import LayerShape, added_parameters
from .data.settings import LocalTokenizer
from .settings import ModelSettings, RunSettings

_USUAL_VOCAB = 2**17


def likely_vocabulary(run: RunSettings) -> int:
    """Tokens of the model's vocabulary; of a tokenizer that is elsewhere, what most have."""
    if run.model.vocab is not None:
        return run.model.vocab
    return _USUAL_VOCAB if isinstance(run.tokenizer, LocalTokenizer) else run.tokenizer.vocab


def count_parameters(
    model: ModelSettings, vocab: int, attention: AttentionSettings | None = None
) -> int:
    """Parameters of the whole model, padding of the vocabulary not counted.

    Args:
        model: The model.
        vocab: Tokens of its vocabulary.
        attention: Of a stage, for what it adds to the layers; None for dense attention without
            options, which adds nothing.
    """
    hidden, width = model.hidden, model.head_width
    layer = _projections(model) + 2 * hidden + (2 * width if model.qk_norm else 0)
    if model.qkv_bias:
        layer += width * (model.heads + 2 * model.kv_heads)
    layer += _mlp(model, model.moe.experts if model.moe else 1)
    embeddings = (1 if model.tied_embeddings else 2) * vocab * hidden
    added = attention_parameters(model, attention or AttentionSettings())
    return embeddings + model.layers * layer + hidden + added


def attention_parameters(model: ModelSettings, attention: AttentionSettings) -> int:
    """Parameters that a stage's attention adds to the model."""
    shape = layer_shape(model)
    of_layers = attention.mechanisms(model.layers)
    return sum(added_parameters(attention, mechanism, shape) for mechanism in of_layers)


def active_parameters(model: ModelSettings, vocab: int) -> int:
    """Parameters of the matrices that each token is multiplied with.

    The output layer counts, the input embedding does not; of experts those that a token visits.
    What attention adds is part of its own cost.
    """
    layer = _projections(model) + _mlp(model, model.moe.top_k if model.moe else 1)
    return model.layers * layer + vocab * model.hidden


def layer_shape(model: ModelSettings) -> LayerShape:
    """The widths of a layer's attention."""
    return LayerShape(model.hidden, model.heads, model.kv_heads, model.head_width)


def _projections(model: ModelSettings) -> int:
    """Of queries, keys, values and the output."""
    return model.hidden * model.head_width * (2 * model.heads + 2 * model.kv_heads)


def _mlp(model: ModelSettings, experts: int) -> int:
    """So many MLPs, and the router to all of them."""
    router = model.hidden * model.moe.experts if model.moe else 0
    return router + experts * 3 * model.hidden * model.ffn_hidden
