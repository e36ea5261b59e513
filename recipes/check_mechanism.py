"""The rules of one attention mechanism: its numbers fit each other, the model and the stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..attention.frequencies import rotary_channels
from ..attention.mechanism_settings import (
    IndexerSettings,
    InfllmV2Settings,
    MechanismSettings,
    NsaSettings,
    SeerSettings,
    ShardedHeadsSettings,
    SsaSettings,
    WindowSettings,
)
from ..attention.pairs import budget
from ..attention.settings import DynamicScaling, LongRopeScaling, NtkScaling, RopeSettings
from ..attention.sharding import covered
from ..errors import Problem
from ..trainer.settings import ModelSettings, StageSettings
from .fixes import around


def check_mechanism(
    model: ModelSettings,
    stage: StageSettings,
    mechanism: MechanismSettings,
    layers: list[int],
    at: str,
) -> Iterator[Problem]:
    """What is wrong with a mechanism.

    Args:
        model: The model.
        stage: The stage.
        mechanism: Of some of its layers.
        layers: Those layers.
        at: Path of the mechanism, such as `stages.0.attention.mechanism`.
    """
    turns = not layers or not set(layers) <= set(stage.rope.nope_layers)
    match mechanism:
        case WindowSettings():
            yield from _check_window(mechanism, stage.length, at)
        case NsaSettings():
            yield from _check_nsa(mechanism, model, stage.length, turns, at)
            if mechanism.compress_after_rope and not turns:
                expected = "false: rope.nope_layers has all layers with nsa, where nothing turns"
                yield Problem(f"{at}.compress_after_rope", "true", expected, "remove it")
        case InfllmV2Settings():
            yield from _check_infllm_v2(mechanism, stage.length, at)
        case SsaSettings():
            yield from _check_ssa(mechanism, at)
        case ShardedHeadsSettings():
            yield from _check_sharded_heads(mechanism, model, at)
        case SeerSettings():
            yield from _check_seer(mechanism, stage, at)
            if turns:
                yield from _check_turning(model, stage.rope, mechanism.dim, None, at)
        case IndexerSettings():
            yield from _check_indexer(mechanism, at)
            if turns:
                share = mechanism.rotary_share
                yield from _check_turning(model, stage.rope, mechanism.dim, share, at)
        case _:
            pass


def warn_of_mechanism(mechanism: MechanismSettings, length: int) -> Iterator[str]:
    """What works, but may not be wanted.

    Args:
        mechanism: Of some layers.
        length: Of the stage, and so of its longest documents.
    """
    kind, most = mechanism.kind, budget(mechanism)
    if isinstance(mechanism, InfllmV2Settings) and length < mechanism.dense_below:
        below = f"documents below {mechanism.dense_below:,} tokens are attended densely"
        yield f"{kind} never chooses: {below}, and sequences have {length:,}"
    elif most is not None and length <= most:
        yield f"{kind} never chooses: a query may see {most:,} tokens, and there are {length:,}"
    match mechanism:
        case SeerSettings(form="block", evaluate="budget" | "threshold"):
            yield (
                "in evaluations of seer with form block later queries bear on what earlier ones "
                "see, so that their loss is not a language model's"
            )
        case _:
            pass


def _check_window(mechanism: WindowSettings, length: int, at: str) -> Iterator[Problem]:
    if mechanism.window + mechanism.first >= length:
        got = f"{mechanism.window}" + (f" and {mechanism.first} first" if mechanism.first else "")
        expected = f"less than the stage's length ({length}): it would see everything"
        yield Problem(f"{at}.window", got, expected, "kind: dense, or less")


def _check_nsa(
    mechanism: NsaSettings, model: ModelSettings, length: int, turns: bool, at: str
) -> Iterator[Problem]:
    yield from _check_compression(mechanism, length, at)
    yield from _check_forced(mechanism, at)
    if mechanism.window >= length:
        expected = f"less than the stage's length ({length}): its branch would see everything"
        yield Problem(f"{at}.window", str(mechanism.window), expected)
    places, how = mechanism.encode_position, mechanism.compress
    if places == "keys" and how != "mlp" and (mechanism.compress_after_rope or not turns):
        expected = f"none: with compress {how} and no RoPE after it all keys change alike"
        yield Problem(f"{at}.encode_position", places, expected, "encode_position: none")
    if mechanism.branch_kv == "independent" and (model.qk_norm or model.qkv_bias):
        expected = "shared: the branches' own projections have neither model.qk_norm nor qkv_bias"
        yield Problem(f"{at}.branch_kv", "independent", expected, "branch_kv: shared")


def _check_compression(
    mechanism: NsaSettings | InfllmV2Settings, length: int, at: str
) -> Iterator[Problem]:
    stride = mechanism.compress_stride
    for name in ("block", "compress_length"):
        value = getattr(mechanism, name)
        if value % stride:
            expected = f"a multiple of compress_stride ({stride})"
            yield Problem(f"{at}.{name}", str(value), expected, around(name, value, stride))
        elif name == "compress_length" and value > length:
            expected = f"at most the stage's length ({length}): no key would be compressed"
            yield Problem(f"{at}.{name}", str(value), expected)


def _check_forced(mechanism: NsaSettings, at: str) -> Iterator[Problem]:
    forced = mechanism.initial + mechanism.local
    if forced > mechanism.count:
        parts = f"initial ({mechanism.initial}) + local ({mechanism.local})"
        expected = f"at least {parts}: the blocks that are always chosen count"
        yield Problem(f"{at}.count", str(mechanism.count), expected, f"count: {forced} or more")


def _check_infllm_v2(mechanism: InfllmV2Settings, length: int, at: str) -> Iterator[Problem]:
    yield from _check_compression(mechanism, length, at)
    if mechanism.coarse == 1:
        expected = "0, or at least 2: keys pooled over once as many tokens are the same keys"
        yield Problem(f"{at}.coarse", "1", expected, "coarse: 0")
    below, local = mechanism.dense_below, mechanism.local * mechanism.block
    if 0 < below < local:
        expected = f"0, or at least the tokens of the local blocks ({local}), which are always seen"
        yield Problem(f"{at}.dense_below", str(below), expected, f"dense_below: 0 or {local}")


def _check_ssa(mechanism: SsaSettings, at: str) -> Iterator[Problem]:
    if not mechanism.align and mechanism.beta != _default(mechanism, "beta"):
        expected = "no such setting: with align 0 the streams are not compared"
        yield Problem(f"{at}.beta", f"{mechanism.beta:g}", expected, "remove it, or set align")
    count = mechanism.evaluate_count
    if mechanism.evaluate == "full" and count is not None:
        expected = "no such setting: evaluations see the full stream"
        fix = "remove it, or evaluate: sparse"
        yield Problem(f"{at}.evaluate_count", str(count), expected, fix)
    if not mechanism.align and not mechanism.sparse_share and mechanism.evaluate == "full":
        expected = "more than 0 with align 0 and evaluate full: nothing would be sparse"
        yield Problem(f"{at}.sparse_share", "0", expected, "kind: dense, or some sparse share")


def _check_sharded_heads(
    mechanism: ShardedHeadsSettings, model: ModelSettings, at: str
) -> Iterator[Problem]:
    """The heads together see every block; heads are those of the model, not of a tensor rank."""
    by_query = mechanism.shard_by == "query_head"
    heads = model.heads if by_query else model.kv_heads
    if covered(heads, mechanism.stride) == mechanism.stride:
        return
    name = "model.heads" if by_query else "model.query_groups"
    expected = f"at most {name} ({heads}): other blocks no head would see"
    fixes = [f"stride: {heads} or less"] if heads > 1 else []
    if not by_query and model.heads >= mechanism.stride:
        fixes.append("shard_by: query_head")
    fixes.append(f"{name}: {mechanism.stride} or more")
    yield Problem(f"{at}.stride", str(mechanism.stride), expected, ", or ".join(fixes))


def _check_seer(mechanism: SeerSettings, stage: StageSettings, at: str) -> Iterator[Problem]:
    if mechanism.form == "block" and stage.parallel.context > 1:
        expected = "token: the queries of a block may be on several context ranks"
        yield Problem(f"{at}.form", "block", expected, "form: token, or parallel.context: 1")
    if mechanism.dim % 2:
        expected = "an even number: channels turn in pairs"
        yield Problem(f"{at}.dim", str(mechanism.dim), expected, around("dim", mechanism.dim, 2))
    evaluate, threshold = mechanism.evaluate, mechanism.threshold
    if evaluate == "threshold" and threshold is None:
        expected = "a probability: evaluations see the blocks above it"
        yield Problem(f"{at}.threshold", "nothing", expected, "threshold: 0.0005")
    if evaluate != "threshold" and threshold is not None:
        expected = f"no such setting: evaluate {evaluate} knows no threshold"
        fix = "remove it, or evaluate: threshold"
        yield Problem(f"{at}.threshold", f"{threshold:g}", expected, fix)
    if evaluate == "dense" and mechanism.count != _default(mechanism, "count"):
        expected = "no such setting: evaluate dense sees everything"
        fix = "remove it, or evaluate: budget"
        yield Problem(f"{at}.count", str(mechanism.count), expected, fix)


def _check_indexer(mechanism: IndexerSettings, at: str) -> Iterator[Problem]:
    count, local, hisa = mechanism.count, mechanism.local, mechanism.hisa
    if mechanism.dim % 2:
        expected = "an even number: channels turn in pairs"
        yield Problem(f"{at}.dim", str(mechanism.dim), expected, around("dim", mechanism.dim, 2))
    if mechanism.block == 1 and local:
        expected = "0 with block 1: only blocks are always chosen, not tokens"
        yield Problem(f"{at}.local", str(local), expected, "remove it, or block: 128")
    elif local > count:
        expected = f"at most count ({count}), of which local blocks are a part"
        yield Problem(f"{at}.local", str(local), expected, f"count: {local} or more")
    if hisa is None:
        return
    if mechanism.block > 1:
        expected = f"no such setting: it chooses tokens, and block is {mechanism.block}"
        yield Problem(f"{at}.hisa", "a mapping", expected, "remove it, or block: 1")
    elif mechanism.attend == "dense":
        expected = "no such setting: attend dense chooses nothing"
        yield Problem(f"{at}.hisa", "a mapping", expected, "remove it, or attend: chosen")
    elif hisa.budget * hisa.block < count:
        expected = f"at least {-(-count // hisa.block)}: blocks that hold count ({count}) tokens"
        yield Problem(f"{at}.hisa.budget", str(hisa.budget), expected)


def _check_turning(
    model: ModelSettings, rope: RopeSettings, dim: int, share: float | None, at: str
) -> Iterator[Problem]:
    """The stage's RoPE can turn the queries and keys of a selection.

    Args:
        model: The model.
        rope: Of the stage.
        dim: Width of a query of the selection; an odd one is its own problem and not told here.
        share: Of the channels that turn, where the mechanism has one; None for that of the RoPE.
        at: Path of the mechanism.
    """
    if dim % 2:
        return
    own = rope if share is None else rope.model_copy(update={"rotary_share": share})
    channels, scaling = rotary_channels(own, dim), rope.scaling
    name, got = "dim", f"{dim} ({channels} channels turn)"
    if share is not None:
        name, got = "rotary_share", f"{share:g} ({channels} channels)"
    if channels % 2 or not channels:
        expected = f"a share that makes an even number of {dim} channels"
        if share is None:
            expected = f"a width of which rope.rotary_share ({rope.rotary_share:g}) is even"
        fix = "" if share is None else _share(max(2, channels // 2 * 2), dim)
        yield Problem(f"{at}.{name}", got, expected, fix)
    elif isinstance(scaling, NtkScaling | DynamicScaling) and channels < 4:
        expected = f"at least 4 channels: rope.scaling {scaling.kind} changes all pairs but one"
        yield Problem(f"{at}.{name}", got, expected)
    elif isinstance(scaling, LongRopeScaling):
        wanted = rotary_channels(rope, model.head_width)
        if channels != wanted:
            expected = f"{wanted} channels that turn: rope.scaling has a factor for each pair"
            fits = share is not None and wanted <= dim
            yield Problem(f"{at}.{name}", got, expected, _share(wanted, dim) if fits else "")


def _share(channels: int, dim: int) -> str:
    # Rounded up, as the channels are rounded down.
    return f"rotary_share: {math.ceil(channels / dim * 10_000) / 10_000:g}"


def _default(mechanism: MechanismSettings, name: str) -> Any:
    return type(mechanism).model_fields[name].default
