"""Exchange choice: which exchange a stage's context ranks use, and why, from settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING

from ..attention.mechanism_settings import (
    IndexerSettings,
    InfllmV2Settings,
    MechanismSettings,
    MobaSettings,
    NsaSettings,
    SsaSettings,
    WindowSettings,
)
from ..attention.pairs import prefix_pairs, visible_pairs
from ..parallel.auto import CPU, GPU, Prediction, Work, predict
from ..parallel.volume import Call
from .settings import ModelSettings, StageSettings

if TYPE_CHECKING:
    from ..parallel.exchange import Across, ExchangeKind

REACHED = {"zigzag": 0.75, "contiguous": 1.0, "striped": 1.0, "balanced": 0.1}
"""The share of the other ranks' keys that causal queries of a rank reach (of the last rank, where
they are contiguous): in one long document, and under `balanced`, which is for packed ones, in
documents of an eighth of the stage's length."""

CUTTING = 0.3, 8192
"""How much longer attention takes whose keys come in parts, and for so many tokens of a rank: what
rings lose on H100s. Longer parts lose less."""

SORTING = 0.15
"""How much longer it takes for each further part if keys are chosen, as choices are sorted anew."""


@dataclass(frozen=True)
class ExchangeChoice:
    """An exchange, as `make_exchange` wants it.

    Attributes:
        kind: The exchange.
        inner: Context ranks of a node, where the exchange knows nodes.
        across: How two_d goes on between nodes.
        reason: Why it was taken, in words; empty where the recipe names it.
    """

    kind: ExchangeKind
    inner: int = 1
    across: Across = "ring"
    reason: str = ""

    @property
    def words(self) -> str:
        """The exchange in words: `two_d over 8`."""
        return f"{self.kind} over {self.inner}" if self.inner > 1 else self.kind


def choose_exchange(
    model: ModelSettings, stage: StageSettings, *, node: int, gpu: bool, wire: int
) -> ExchangeChoice:
    """The exchange that the recipe names, or with `auto` the one that should be the fastest.

    One document as long as the stage is assumed (see `REACHED`), and the average of its layers.

    Args:
        model: The model.
        stage: The stage.
        node: Ranks of a node.
        gpu: Whether ranks are GPUs.
        wire: Bytes of a number of keys and values.
    """
    parallel = stage.parallel
    if parallel.exchange != "auto":
        across = parallel.across or "ring"
        return ExchangeChoice(parallel.exchange, parallel.inner or 1, across)
    context = parallel.context
    if context == 1:
        return ExchangeChoice("all_gather")
    in_node = gcd(context, max(1, node // parallel.tensor))
    found = predict(_work(model, stage, wire), in_node, GPU if gpu else CPU)
    best = found[0].candidate
    return ExchangeChoice(best.kind, best.inner, reason=_reason(found, gpu))


def _work(model: ModelSettings, stage: StageSettings, wire: int) -> Work:
    """What the average layer of a tensor rank does in a micro-batch of one document."""
    parallel, tokens = stage.parallel, stage.length
    ranks, mechanisms = parallel.context, stage.attention.mechanisms(model.layers)
    heads, groups = model.heads // parallel.tensor, model.kv_heads // parallel.tensor
    size = -(-tokens // ranks)
    document = tokens // 8 if parallel.layout == "balanced" else tokens
    documents = tokens / max(1, document)

    def mean(of: Sequence[float]) -> float:
        return sum(of) / len(of)

    pairs = prefix_pairs(mechanisms, heads, groups)

    def busiest(parts: int) -> float:
        # Of contiguous parts the last one sees most; other layouts give equal work.
        last = pairs(tokens) - pairs(tokens - tokens // parts)
        return last * parts / pairs(tokens) if parallel.layout == "contiguous" else 1.0

    width = model.head_width
    choosers, choices = max((_choices(each, heads, groups) for each in mechanisms), key=prod)
    call = Call(heads, groups, width, width, wire, 4, choosers, choices, keeps=parallel.keep_keys)
    seen = mean([visible_pairs(each, document, heads, groups) for each in mechanisms])
    return Work(
        sizes=[size] * ranks,
        call=call,
        pairs=seen * documents / ranks,
        busiest=busiest,
        reached=mean([_reached(each, parallel.layout, size, ranks) for each in mechanisms]),
        cutting=CUTTING[0] * min(1.0, CUTTING[1] / size),
        sorting=mean([SORTING * bool(_choices(each, heads, groups)[1]) for each in mechanisms]),
    )


def _choices(mechanism: MechanismSettings, heads: int, groups: int) -> tuple[int, int]:
    """Heads that choose for themselves while the layer learns, and how many blocks or tokens."""
    match mechanism:
        case MobaSettings(count=count):
            return heads, count
        case InfllmV2Settings(count=count, initial=initial, local=local):
            return groups, count + initial + local
        case NsaSettings(count=count) | SsaSettings(count=count):
            return groups, count
        case IndexerSettings(attend="chosen", count=count, share=share):
            return (1 if share == "all_heads" else groups), count
        case _:
            return 0, 0


def _reached(mechanism: MechanismSettings, layout: str, size: int, ranks: int) -> float:
    """The share of the other ranks' keys that some query of a rank reaches."""
    share = REACHED[layout]
    if isinstance(mechanism, WindowSettings) and layout != "striped":
        edges = 1 if layout == "contiguous" else 2
        halo = edges * (mechanism.window + mechanism.first)
        share = min(share, halo / (size * (ranks - 1)))
    return share


def _reason(found: Sequence[Prediction], gpu: bool) -> str:
    """The three fastest with their times."""
    times = [f"{_name(each)} {_time(each.seconds)}" for each in found[:3]]
    where = "GPUs" if gpu else "CPU ranks"
    return f"predicted per layer on {where}: {', '.join(times)}"


def _name(prediction: Prediction) -> str:
    kind, inner = prediction.candidate
    return f"{kind} over {inner}" if kind in ("double_ring", "two_d") else kind


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
