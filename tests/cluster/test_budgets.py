"""Budgets of new starts: each cause has its own, and null has no end."""

from longspan.cluster.budgets import Budgets
from longspan.trainer.recovery_settings import RecoverySettings, RetrySettings


def test_each_cause_has_a_budget_of_its_own():
    budgets = Budgets(RecoverySettings(retries=RetrySettings(infrastructure=2, preemption=1)))
    assert [budgets.spend("infrastructure") for _ in range(4)] == [True, True, False, False]
    assert [budgets.spend("preemption") for _ in range(2)] == [True, False]
    assert budgets.words("infrastructure") == "retry 2 of 2 (infrastructure)"


def test_no_budget_is_no_new_start_and_null_has_no_end():
    budgets = Budgets(RecoverySettings(retries=RetrySettings(infrastructure=0)))
    assert not budgets.spend("infrastructure")
    assert all(budgets.spend("preemption") for _ in range(1000))
    assert budgets.words("preemption") == "retry 1000 (preemption)"
