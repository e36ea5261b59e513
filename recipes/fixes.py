"""Fixes: the numbers that a rule would let through, in words."""

from __future__ import annotations

from collections.abc import Sequence


def around(name: str, value: int, unit: int) -> str:
    """The multiples of `unit` next to a value: `length: 4092 or 4096`."""
    below = value // unit * unit
    return f"{name}: {either([number for number in (below, below + unit) if number])}"


def divisors(number: int) -> list[int]:
    """Those of a number, ascending."""
    return [n for n in range(1, min(number, 4096) + 1) if number % n == 0]


def either(numbers: Sequence[int]) -> str:
    """The first of some numbers: `1 or 2 or 4`."""
    return " or ".join(map(str, numbers[:8]))
