"""Once: what belongs to an object and is made on demand, once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar, cast

Made = TypeVar("Made")


class Once:
    """Something that other things are made from, each of them once."""

    @cached_property
    def made(self) -> dict[Hashable, Any]:
        """What was made so far."""
        return {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes, made once for each key."""
        if key not in self.made:
            self.made[key] = make()
        return cast(Made, self.made[key])
