"""The rules of exchanges: what each of them needs of ranks and heads."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..parallel.settings import ParallelSettings
from ..trainer.settings import ModelSettings
from .fixes import divisors, either

_OF_NODES = ("double_ring", "two_d")


def check_exchange(model: ModelSettings, parallel: ParallelSettings, at: str) -> Iterator[Problem]:
    """What is wrong with an exchange.

    Args:
        model: Whose heads are shared.
        parallel: The ranks and the exchange.
        at: Path of the parallel settings.
    """
    kind, context, inner = parallel.exchange, parallel.context, parallel.inner
    if parallel.across is not None and kind != "two_d":
        expected = f"no such setting: exchange {kind} is not of two dimensions"
        fix = "remove it, or exchange: two_d"
        yield Problem(f"{at}.across", parallel.across, expected, fix)
    if kind not in _OF_NODES:
        if inner is not None:
            why = "chooses it" if kind == "auto" else "knows no nodes"
            expected = f"no such setting: exchange {kind} {why}"
            fix = "remove it, or exchange: two_d or double_ring"
            yield Problem(f"{at}.inner", str(inner), expected, fix)
    elif context > 1:
        works = [n for n in divisors(context) if 1 < n < context]
        if inner not in works:
            expected = f"a divisor of context ({context}) between 1 and {context}"
            fix = f"inner: {either(works)}" if works else "exchange: ring or fetch"
            yield Problem(f"{at}.inner", str(inner or "nothing"), expected, fix)
            return
    if kind == "ulysses" and parallel.keep_keys:
        expected = "false: ulysses always keeps what a rank's heads attend to"
        yield Problem(f"{at}.keep_keys", "true", expected, "remove it, or another exchange")
    heads = model.heads // parallel.tensor
    sharing = {"ulysses": context, "two_d": inner or 1}.get(kind, 1)
    if sharing > heads and model.heads % parallel.tensor == 0:
        name = "context" if kind == "ulysses" else "inner"
        expected = f"at most the {heads} query heads of a tensor rank, which {kind} divides"
        fix = f"{name}: {heads} or less, or another exchange"
        yield Problem(f"{at}.{name}", str(sharing), expected, fix)
