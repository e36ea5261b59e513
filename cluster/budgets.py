"""Budgets: how often a run's ranks may still be started again, cause by cause."""

from __future__ import annotations

from typing import Literal

from ..trainer.recovery_settings import RecoverySettings

Cause = Literal["infrastructure", "preemption"]
"""Why a gang ended that may begin again."""


class Budgets:
    """New starts that are left to a run.

    Args:
        recovery: Of the run.
    """

    def __init__(self, recovery: RecoverySettings) -> None:
        retries = recovery.retries
        self._all = {"infrastructure": retries.infrastructure, "preemption": retries.preemption}
        self._spent = dict.fromkeys(self._all, 0)

    def spend(self, cause: Cause) -> bool:
        """Take one new start; False if there is none left, and then nothing is taken."""
        most = self._all[cause]
        if most is not None and self._spent[cause] >= most:
            return False
        self._spent[cause] += 1
        return True

    def words(self, cause: Cause) -> str:
        """What was spent: `retry 3 of 10 (infrastructure)`."""
        most = self._all[cause]
        return f"retry {self._spent[cause]}{'' if most is None else f' of {most}'} ({cause})"
