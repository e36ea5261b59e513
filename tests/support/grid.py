"""Grids of cases: a sample of them, another one every day; all where the environment asks."""

import os
from datetime import UTC, datetime
from random import Random

NAME = "LONGSPAN_TEST_GRID"
DRAW = os.environ.get(NAME) or datetime.now(UTC).date().isoformat()


def sample(key, cases, count):
    """`count` of the cases, or all of them.

    Args:
        key: Tells tests apart, so that they draw different cases.
        cases: The whole grid.
        count: How many of them.
    """
    cases = list(cases)
    if DRAW == "full":
        return cases
    return Random(f"{key} {DRAW}").sample(cases, min(count, len(cases)))
