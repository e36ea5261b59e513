"""Catalogue: the mechanisms side by side, and a stage's attention in words. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from .layer_settings import AttentionSettings
from .mechanism_settings import (
    IndexerSettings,
    InfllmV2Settings,
    MechanismSettings,
    MobaSettings,
    NsaSettings,
    SeerSettings,
    ShardedHeadsSettings,
    SsaSettings,
    WindowSettings,
)


@dataclass(frozen=True)
class Entry:
    """A mechanism for people. N: tokens of a document; other letters are its settings.

    Attributes:
        kind: Its name in recipes.
        source: The paper.
        parameters: What it adds to a layer.
        work: How its work grows.
        selection: How the keys of a query are found.
        generates: Whether it can continue a text.
        context: Whether it runs over context ranks.
    """

    kind: str
    source: str
    parameters: str
    work: str
    selection: str
    generates: str = "yes"
    context: str = "yes"


ENTRIES = (
    Entry("dense", "-", "none", "N^2", "all"),
    Entry("window", "2309.17453 (first)", "none", "N window", "fixed"),
    Entry(
        "nsa",
        "2502.11089",
        "gates, compression (mlp), places; branch keys and values if independent",
        "N^2 / compress_stride + N (count block + window)",
        "by compressed keys, which learn from a branch of their own",
    ),
    Entry(
        "infllm_v2",
        "2509.24663",
        "none",
        "N^2 / compress_stride (scores only) + N (initial + local + count) block",
        "by mean keys, nothing learned",
    ),
    Entry(
        "ssa",
        "2511.20102",
        "a gate per head",
        "N^2 in training (two streams); N^2 / block + N count block in evaluations",
        "by mean keys, nothing learned",
    ),
    Entry(
        "moba",
        "2502.13189",
        "none",
        "N^2 / block (scores only) + N count block",
        "by mean keys, nothing learned",
    ),
    Entry("sharded_heads", "2407.17678", "none", "N^2 / stride + N local block", "fixed"),
    Entry(
        "seer",
        "2410.13276 (block), 2506.08889 (token)",
        "a gate: queries per head, pooled keys per key-value head",
        "N^2 in training; N^2 / block + N count block in evaluations",
        "learned from attention's map, the model stands still",
        "yes; form block, which is not causal: no",
        "form token",
    ),
    Entry(
        "indexer",
        "2512.02556 (tokens), 2606.13392 (blocks), 2603.28458 (hisa)",
        "index queries, one index key with its norm, weights of index heads",
        "N^2 small scores (hisa: N^2 / hisa.block) + N count block",
        "learned from attention's map, beside the model",
    ),
)


def catalogue() -> Table:
    """The table of all mechanisms."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0))
    texts = ("mechanism", "added parameters", "work for N tokens", "which keys")
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in ("packing", "GQA", "TP", "PP", "CP"):
        table.add_column(heading, no_wrap=True)
    table.add_column("generation", overflow="fold", max_width=18)
    table.add_column("arXiv", overflow="fold", max_width=20)
    for entry in ENTRIES:
        # Documents, grouped heads, tensor and pipeline ranks are what every mechanism is held to.
        supported = ["yes"] * 4 + [entry.context]
        found = (entry.kind, entry.parameters, entry.work, entry.selection)
        table.add_row(*found, *supported, entry.generates, entry.source)
    return table


def words(attention: AttentionSettings, layers: int) -> str:
    """A stage's attention on one line: `nsa 16 x 64 of 32/16, window 512; dense in 2 of 8 layers`.

    Args:
        attention: Of the stage.
        layers: Of the model.
    """
    of_layers = attention.mechanisms(layers)
    # What most layers have comes first, and of equally many the one that no rule names.
    order = dict.fromkeys([m for m in [attention.mechanism, *of_layers] if m in of_layers])
    kinds = sorted(order, key=lambda mechanism: -of_layers.count(mechanism))
    parts = [mechanism_words(kinds[0])]
    for other in kinds[1:]:
        parts.append(f"{mechanism_words(other)} in {of_layers.count(other)} of {layers} layers")
    return "; ".join([*parts, *_options(attention)])


def mechanism_words(mechanism: MechanismSettings) -> str:
    """A mechanism in a few words: `moba 3 x 512`."""
    kind = mechanism.kind
    match mechanism:
        case WindowSettings(window=window, first=first):
            return f"{kind} {window:,}" + (f" and the first {first:,}" if first else "")
        case NsaSettings(window=window):
            return f"{kind} {_blocks(mechanism, mechanism.count)}, window {window:,}"
        case InfllmV2Settings(dense_below=below):
            total = mechanism.initial + mechanism.local + mechanism.count
            dense = f", dense below {below:,}" if below else ""
            return f"{kind} {_blocks(mechanism, total)}{dense}"
        case SsaSettings(block=block, count=count, sparse_share=share):
            return f"{kind} {count} x {block}, {share:.0%} sparse"
        case MobaSettings(block=block, count=count):
            return f"{kind} {count} x {block}"
        case ShardedHeadsSettings(block=block, local=local, stride=stride):
            return f"{kind} {local} x {block} and 1 of {stride} others"
        case SeerSettings():
            return f"{kind} {_seer(mechanism)}"
        case IndexerSettings():
            return f"{kind} {_indexer(mechanism)}"
        case _:
            return kind


def _blocks(mechanism: NsaSettings | InfllmV2Settings, count: int) -> str:
    length, stride = mechanism.compress_length, mechanism.compress_stride
    return f"{count} x {mechanism.block} of {length}/{stride}"


def _seer(mechanism: SeerSettings) -> str:
    form = "query blocks" if mechanism.form == "block" else "queries"
    seen = {
        "dense": f"blocks of {mechanism.block}, dense",
        "budget": f"{mechanism.count} x {mechanism.block}",
        "threshold": f"blocks of {mechanism.block} above {mechanism.threshold}",
    }
    return f"for {form}, {seen[mechanism.evaluate]} in evaluations"


def _indexer(mechanism: IndexerSettings) -> str:
    if mechanism.attend == "dense":
        return f"of blocks of {mechanism.block}, dense" if mechanism.block > 1 else "dense"
    if mechanism.block > 1:
        return f"{mechanism.count} x {mechanism.block}"
    hisa = mechanism.hisa
    among = f" out of {hisa.budget} x {hisa.block}" if hisa else ""
    return f"{mechanism.count:,} tokens{among}"


def _options(attention: AttentionSettings) -> Iterator[str]:
    if attention.output_gate != "none":
        yield f"gate per {attention.output_gate}"
    if attention.sinks:
        yield "sinks"
    if attention.scale is not None:
        yield f"scale {attention.scale:g}"
    if attention.log_scale_from is not None:
        yield f"sharper from {attention.log_scale_from:,}"
