"""Pairs: how many (query, key) pairs attention visits in a document, in closed form. No torch.

Tokens of a document are counted from 1, so that the t-th one sees t keys in dense attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

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
from .sharding import residue


def ramp(tokens: int, most: int) -> int:
    """Sum of min(t, most) over the tokens: a window of `most`, or so many chosen tokens."""
    rising = max(0, min(tokens, most))
    return rising * (rising + 1) // 2 + max(0, tokens - rising) * most


def dense(tokens: int) -> int:
    """Every earlier token and itself."""
    return ramp(tokens, tokens)


def chosen(tokens: int, block: int, count: int) -> int:
    """The query's own block up to the query, and the most of `count` - 1 earlier ones."""
    full, rest = divmod(tokens, block)
    own = full * dense(block) + dense(rest)
    return own + block * (block * ramp(full - 1, count - 1) + rest * min(full, count - 1))


def whole_blocks(tokens: int, block: int) -> int:
    """All earlier blocks, without the query's own."""
    full, rest = divmod(tokens, block)
    return dense(tokens) - full * dense(block) - dense(rest)


def windows(tokens: int, length: int, stride: int) -> int:
    """Complete windows of `length` tokens, `stride` apart."""
    return (tokens - length) // stride + 1 if tokens >= length else 0


def windows_seen(tokens: int, length: int, stride: int) -> int:
    """Pairs of a query and a complete window that ends by it."""
    made = windows(tokens, length, stride)
    return made * (tokens - length + 1) - stride * (made * (made - 1) // 2)


def blocks_met(tokens: int, block: int) -> int:
    """Pairs of a query and a block that begins by it."""
    full, rest = divmod(tokens, block)
    return block * dense(full) + rest * (full + 1)


def strided(tokens: int, block: int, local: int, stride: int, at: int) -> int:
    """Keys of the blocks b with b % stride == at that lie `local` blocks or more back."""
    made = max(0, ((tokens - 1) // block - local - at) // stride + 1)
    missed = block * (made * (at + local) + stride * (made * (made - 1) // 2))
    return block * (made * tokens - missed)


def visible_pairs(
    mechanism: MechanismSettings, tokens: int, heads: int, groups: int, *, learning: bool = True
) -> float:
    """(query, key) pairs that attention visits, over all query heads.

    A pooled key counts as one, and a key that two branches or streams see counts twice. Where the
    choice decides (an indexer of blocks that may leave out the query's own, a gate with a
    threshold) it is that of the query's own block and of as many others as the count allows.

    Args:
        mechanism: Of the layer.
        tokens: Of the document.
        heads: Query heads.
        groups: Key-value heads.
        learning: While weights are learned; otherwise in evaluations.
    """
    every = dense(tokens)
    match mechanism:
        case WindowSettings(window=window, first=first):
            return heads * (ramp(tokens, window) + ramp(tokens - window, first))
        case NsaSettings(compress_length=length, compress_stride=stride, window=window):
            near = ramp(tokens, window) + windows_seen(tokens, length, stride)
            return heads * (near + chosen(tokens, mechanism.block, mechanism.count))
        case InfllmV2Settings(block=block, dense_below=below):
            total = mechanism.count + mechanism.initial + mechanism.local
            return heads * (every if tokens < below else chosen(tokens, block, total))
        case SsaSettings(block=block):
            full, sparse = ssa_streams(mechanism, learning)
            count = mechanism.count if learning else mechanism.evaluate_count or mechanism.count
            return heads * (full * every + sparse * chosen(tokens, block, count))
        case MobaSettings(block=block, count=count):
            return heads * chosen(tokens, block, count)
        case ShardedHeadsSettings():
            return _sharded_heads(mechanism, tokens, heads, groups)
        case SeerSettings(evaluate=evaluate, block=block, count=count):
            sparse = not learning and evaluate != "dense"
            return heads * (chosen(tokens, block, count) if sparse else every)
        case IndexerSettings(attend="chosen", block=block, count=count):
            return heads * (ramp(tokens, count) if block == 1 else chosen(tokens, block, count))
        case _:
            return heads * every


def prefix_pairs(
    mechanisms: Sequence[MechanismSettings], heads: int, groups: int
) -> Callable[[int], float]:
    """Counts the visible pairs of a document's first tokens, over all layers, per query head.

    They never decrease with the tokens: documents of InfLLM-V2 all count as if they were long.

    Args:
        mechanisms: Of the layers.
        heads: Query heads of a layer.
        groups: Key-value heads of a layer.
    """
    # Few mechanisms, many layers.
    layers = Counter(
        mechanism.model_copy(update={"dense_below": 0})
        if isinstance(mechanism, InfllmV2Settings)
        else mechanism
        for mechanism in mechanisms
    )

    @lru_cache(maxsize=2**14)
    def pairs(tokens: int) -> float:
        return sum(
            count * visible_pairs(mechanism, tokens, heads, groups) / heads
            for mechanism, count in layers.items()
        )

    return pairs


def ssa_streams(mechanism: SsaSettings, learning: bool) -> tuple[float, float]:
    """The share of micro-batches in which the full and the sparse stream are computed."""
    if not learning:
        return (1, 0) if mechanism.evaluate == "full" else (0, 1)
    if mechanism.align:
        return 1, 1
    return 1 - mechanism.sparse_share, mechanism.sparse_share


def _sharded_heads(mechanism: ShardedHeadsSettings, tokens: int, heads: int, groups: int) -> int:
    block, local, stride = mechanism.block, mechanism.local, mechanism.stride
    shards = heads if mechanism.shard_by == "query_head" else groups
    far = sum(
        strided(tokens, block, local, stride, residue(shard, shards, stride))
        for shard in range(shards)
    )
    return heads * chosen(tokens, block, local) + heads // shards * far


def budget(mechanism: MechanismSettings) -> int | None:
    """Tokens of the longest document in which nothing is left out; None without a choice."""
    match mechanism:
        case NsaSettings(block=block, count=count) | MobaSettings(block=block, count=count):
            return block * count
        case InfllmV2Settings(block=block):
            total = block * (mechanism.count + mechanism.initial + mechanism.local)
            return max(total, mechanism.dense_below - 1)
        case SsaSettings(block=block, count=count):
            return block * count
        case ShardedHeadsSettings(block=block, local=local):
            return block * local
        case SeerSettings(evaluate="budget", block=block, count=count):
            return block * count
        case IndexerSettings(attend="chosen", block=block, count=count):
            return block * count
        case _:
            return None
