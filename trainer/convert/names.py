"""Which Hugging Face tensors our parameters are made of, row by row.

Ours are fused where theirs are apart: the rows of QKV are grouped by key-value head (the group's
queries, its key, its value), gate lies on top of up. Everything is a matter of rows, so that one
table serves both directions and any part of a parameter can be read by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..settings import ModelSettings


@dataclass(frozen=True)
class Rows:
    """`count` rows of the Hugging Face tensor `name`, from row `first` on."""

    name: str
    first: int
    count: int


@dataclass(frozen=True)
class Assembly:
    """What one parameter of ours is made of.

    Attributes:
        pieces: From the top down. Rows of ours beyond them are padding, and zero.
        columns: Of the matrix; None for a vector.
    """

    pieces: tuple[Rows, ...]
    columns: int | None = None

    @property
    def rows(self) -> int:
        """Rows that are not padding."""
        return sum(piece.count for piece in self.pieces)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every Hugging Face tensor in it; none of them is in two parameters."""
        rows: dict[str, int] = {}
        for piece in self.pieces:
            rows[piece.name] = rows.get(piece.name, 0) + piece.count
        tail = () if self.columns is None else (self.columns,)
        return {name: (count, *tail) for name, count in rows.items()}

    def within(self, first: int, last: int) -> Iterator[tuple[int, Rows]]:
        """The pieces of our rows `[first, last)`, each with its first row, counted from `first`."""
        top = 0
        for piece in self.pieces:
            begin, end = max(first, top), min(last, top + piece.count)
            if begin < end:
                yield begin - first, Rows(piece.name, piece.first + begin - top, end - begin)
            top += piece.count


EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_ATTENTION = "self_attention.linear_qkv"


def assemblies(model: ModelSettings, vocab: int) -> dict[str, Assembly]:
    """Every parameter of a model by its global name (`trainer.engine.partition`), in its order.

    Args:
        model: The whole model.
        vocab: Rows of the embedding without padding.
    """
    table = {"embedding.word_embeddings.weight": _whole(EMBEDDING, vocab, model.hidden)}
    for layer in range(model.layers):
        table |= _layer(model, f"layer.{layer}.", f"model.layers.{layer}.")
    table["decoder.final_layernorm.weight"] = _whole("model.norm.weight", model.hidden)
    if not model.tied_embeddings:
        table["output_layer.weight"] = _whole(HEAD, vocab, model.hidden)
    return table


def _whole(name: str, rows: int, columns: int | None = None) -> Assembly:
    return Assembly((Rows(name, 0, rows),), columns)


def _layer(model: ModelSettings, ours: str, theirs: str) -> dict[str, Assembly]:
    hidden, width = model.hidden, model.head_width
    table = {
        f"{ours}input_layernorm.weight": _whole(f"{theirs}input_layernorm.weight", hidden),
        f"{ours}{_ATTENTION}.weight": Assembly(_qkv(model, theirs, "weight"), hidden),
    }
    if model.qkv_bias:
        table[f"{ours}{_ATTENTION}.bias"] = Assembly(_qkv(model, theirs, "bias"))
    out = _whole(f"{theirs}self_attn.o_proj.weight", hidden, model.heads * width)
    table[f"{ours}self_attention.linear_proj.weight"] = out
    if model.qk_norm:
        for part in "qk":
            norm = _whole(f"{theirs}self_attn.{part}_norm.weight", width)
            table[f"{ours}self_attention.{part}_layernorm.weight"] = norm
    norm = _whole(f"{theirs}post_attention_layernorm.weight", hidden)
    table[f"{ours}pre_mlp_layernorm.weight"] = norm
    if model.moe is None:
        return table | _mlp(model, f"{ours}mlp.", f"{theirs}mlp.", "")
    router = _whole(f"{theirs}mlp.gate.weight", model.moe.experts, hidden)
    table[f"{ours}mlp.router.weight"] = router
    for expert in range(model.moe.experts):
        here = f"{theirs}mlp.experts.{expert}."
        table |= _mlp(model, f"{ours}mlp.experts.", here, f"@expert.{expert}")
    return table


def _qkv(model: ModelSettings, theirs: str, kind: str) -> tuple[Rows, ...]:
    key = model.head_width
    query = model.heads // model.kv_heads * key
    sizes = {"q": query, "k": key, "v": key}
    return tuple(
        Rows(f"{theirs}self_attn.{part}_proj.{kind}", group * rows, rows)
        for group in range(model.kv_heads)
        for part, rows in sizes.items()
    )


def _mlp(model: ModelSettings, ours: str, theirs: str, suffix: str) -> dict[str, Assembly]:
    inner, hidden = model.ffn_hidden, model.hidden
    halves = tuple(Rows(f"{theirs}{half}_proj.weight", 0, inner) for half in ("gate", "up"))
    return {
        f"{ours}linear_fc1.weight{suffix}": Assembly(halves, hidden),
        f"{ours}linear_fc2.weight{suffix}": _whole(f"{theirs}down_proj.weight", hidden, inner),
    }
