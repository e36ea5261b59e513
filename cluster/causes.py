"""Causes: why a gang ended, which decides whether it begins again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import LongspanError
from ..trainer.failure import (
    COMPLETE,
    CRASHED,
    INTERRUPTED,
    STOPPED,
    Failure,
    first_cause,
)
from .watch import End, Hang

Cause = Literal["complete", "stopped", "user", "infrastructure", "preemption"]
"""`user`: what a new start would only repeat."""

# What a rank says that lost another one, or whose machine fails it.
_SECOND_HAND = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket timeout|timed out|nccl|gloo|"
    r"cuda error|cudnn_status|cublas_status|ecc error|address already in use|eaddrinuse|"
    r"distbackenderror|distnetworkerror|diststoreerror|wait timeout|"
    r"stale file handle|input/output error|"
    r"transport endpoint|no route to host|network is unreachable|getactortimeout|actordied|"
    r"ray\.exceptions",
    re.IGNORECASE,
)
# These are the machine's too, and yet another start would only repeat them.
_NOT_PASSING = re.compile(r"CUDA out of memory|OutOfMemoryError", re.IGNORECASE)


@dataclass(frozen=True)
class Evidence:
    """What is known of the end of a gang.

    Attributes:
        ranks: Of the gang.
        nodes: The node of each rank that had joined.
        ends: How processes of ranks ended.
        failures: What ranks left, earliest first.
        lost: Nodes of the gang that are gone.
        hang: If it hung.
        preempted: Nodes that Ray is about to lose.
        died: Ranks whose Ray worker died, with what Ray says of it.
        error: What Ray says if the gang did not even start, or the engine failed.
        asked: Whether the driver was asked to stop.
        complete: Whether the run is.
    """

    ranks: int
    nodes: Mapping[int, str]
    ends: Mapping[int, End]
    failures: Sequence[Failure]
    lost: Sequence[str]
    hang: Hang | None
    preempted: Sequence[str]
    died: Mapping[int, str]
    error: str
    asked: bool
    complete: bool


@dataclass(frozen=True)
class Verdict:
    """Why a gang ended.

    Attributes:
        cause: What follows depends on it.
        code: Exit code of the run if it ends here.
        failure: What to show; None where nothing failed.
        struck: Nodes that had a part in it.
    """

    cause: Cause
    code: int
    failure: Failure | None = None
    struck: tuple[str, ...] = ()


def judge(found: Evidence, describe: Callable[[int, int], Failure]) -> Verdict:
    """Why a gang ended.

    Args:
        found: What is known.
        describe: Describes a rank that left no message, by its number and exit code.
    """
    codes = {rank: end.code for rank, end in found.ends.items()}
    if found.complete or (codes and len(codes) == found.ranks and not any(codes.values())):
        return Verdict("complete", COMPLETE)
    clean = set(codes.values()) <= {COMPLETE, STOPPED} and not found.failures
    if found.asked and not found.lost and clean:
        return Verdict("stopped", STOPPED)
    if found.asked and INTERRUPTED in codes.values():
        return Verdict("stopped", INTERRUPTED)
    bad = {r: c for r, c in codes.items() if c not in (COMPLETE, STOPPED, INTERRUPTED)}
    failure = first_cause(found.failures, bad, describe)
    if found.lost:
        return _infrastructure(found, failure)
    leaving = {*found.preempted, *(node for end in found.ends.values() for node in end.nodes)}
    if leaving or any(end.noticed for end in found.ends.values()):
        names = ", ".join(node[:8] for node in sorted(leaving))
        words = f"node {names} is taken away" if leaving else "a worker was asked to end"
        return Verdict("preemption", CRASHED, _words(words), tuple(sorted(leaving)))
    if found.hang is not None:
        node = found.hang.node
        return Verdict("infrastructure", CRASHED, _words(found.hang.words), (node,) if node else ())
    # A rank that loses another one while they save says so in the words of a failed save.
    taken_along = failure is not None and bool(found.died.keys() - {failure.rank})
    if failure is not None and not taken_along and _is_the_users(failure, bad):
        return Verdict("user", failure.exit_code, failure)
    return _infrastructure(found, failure)


def broken_off(error: Exception) -> Verdict:
    """Why an attempt ended that the driver itself could not lead to its end.

    Args:
        error: What it met; one that is not ours is a defect, or the cluster's.
    """
    if isinstance(error, LongspanError):
        failure = Failure(0, "user", error.what, "", time.time())
        return Verdict("user", error.exit_code, failure)
    return Verdict("infrastructure", CRASHED, _words(f"{type(error).__name__}: {error}"))


def _is_the_users(failure: Failure, codes: Mapping[int, int]) -> bool:
    """Whether a new start would only repeat a failure."""
    if failure.kind == "user":
        return True
    if failure.rank in codes and codes[failure.rank] < 0:  # killed, without a word
        return False
    text = f"{failure.message}\n{failure.traceback}"
    if "left no message" in failure.message:
        return False
    return bool(_NOT_PASSING.search(text)) or not _SECOND_HAND.search(text)


def _infrastructure(found: Evidence, failure: Failure | None) -> Verdict:
    if found.lost:
        ranks = [rank for rank, node in found.nodes.items() if node in found.lost]
        names = ", ".join(node[:8] for node in found.lost)
        words = f"lost node {names}"
        if ranks:  # it may be lost before any has joined
            words += f", with rank{'s' * (len(ranks) > 1)} {_few(ranks)}"
        return Verdict("infrastructure", CRASHED, _words(words), tuple(found.lost))
    if found.died:
        words = f"the worker process of rank {_few(sorted(found.died))} ended"
        first = min(found.died)
        struck = tuple({found.nodes[rank] for rank in found.died if rank in found.nodes})
        text = found.died[first]
        return Verdict("infrastructure", CRASHED, _words(words, text, first), struck)
    if failure is not None:
        node = found.nodes.get(failure.rank)
        return Verdict("infrastructure", CRASHED, failure, (node,) if node else ())
    line = found.error.strip().splitlines()
    words = f"the gang could not go on: {line[-1] if line else 'its workers ended without a word'}"
    return Verdict("infrastructure", CRASHED, _words(words, found.error))


def _words(message: str, traceback: str = "", rank: int = 0) -> Failure:
    return Failure(rank, "internal", message, traceback, time.time())


def _few(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
