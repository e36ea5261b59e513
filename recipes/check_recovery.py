"""The rules of recovery: every setting has an effect, and there is a checkpoint to go back to."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..trainer.recovery_settings import HangSettings, RecoverySettings
from ..trainer.settings import RunSettings

_NEEDS = {
    "spike: skip or rewind": ("sigma", "window"),
    "nonfinite or spike: skip": ("max_skips",),
    "nonfinite or spike: rewind": ("back", "max_rewinds"),
}


def check_recovery(run: RunSettings) -> Iterator[Problem]:
    """What is wrong with a run's recovery; paths start at `recovery`."""
    recovery = run.recovery
    met = {
        "spike: skip or rewind": recovery.spike != "none",
        "nonfinite or spike: skip": "skip" in recovery.policies,
        "nonfinite or spike: rewind": "rewind" in recovery.policies,
    }
    for needed, names in _NEEDS.items():
        for name in names:
            value = getattr(recovery, name)
            if not met[needed] and value != RecoverySettings.model_fields[name].default:
                expected = f"no such setting: without {needed} it has no effect"
                fix = f"remove it, or set {needed}"
                yield Problem(f"recovery.{name}", f"{value:g}", expected, fix)
    if met["nonfinite or spike: rewind"] and recovery.back > run.checkpoint.keep:
        expected = f"at most the {run.checkpoint.keep} checkpoints that checkpoint.keep leaves"
        fix = f"back: {run.checkpoint.keep}, or checkpoint.keep: {recovery.back}"
        yield Problem("recovery.back", str(recovery.back), expected, fix)
    yield from _hang(recovery.hang)


def _hang(hang: HangSettings) -> Iterator[Problem]:
    """A limit below another one that holds as well has no effect."""
    for name, least in (("first", hang.least), ("data", hang.first)):
        value = getattr(hang, name)
        if value < least:
            other = "least" if name == "first" else "first"
            expected = f"{least:g} or more, as recovery.hang.{other} holds as well"
            fix = f"{name}: {least:g}, or lower recovery.hang.{other}"
            yield Problem(f"recovery.hang.{name}", f"{value:g}", expected, fix)
