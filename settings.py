"""The base of all settings, and numbers with units: `64K`, `5B`, `30min`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    WithJsonSchema,
    model_validator,
)


class Settings(BaseModel):
    """Frozen settings that refuse unknown keys. The string under a field documents it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # `from` is a word of Python's
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, raw: Any) -> Any:
        """Python takes True for 1: as text it is refused where a number belongs."""
        if not isinstance(raw, dict):
            return raw
        flags = {name for name, field in cls.model_fields.items() if field.annotation is bool}
        return {
            key: str(value).lower() if isinstance(value, bool) and key not in flags else value
            for key, value in raw.items()
        }


_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?(?:e\+?[0-9]{1,3})?)\s*([A-Za-z]*)")
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {"": 1, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def _scaled(value: Any, units: dict[str, int], example: str) -> Any:
    """`value` times its unit; anything that is not a number with a unit is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value.strip().replace("_", ""))
    if match is None or match[2] not in units:
        names = ", ".join(unit for unit in units if unit)
        raise ValueError(f"a number with one of the units {names}, such as {example}")
    amount = Fraction(match[1]) * units[match[2]]
    return int(amount) if amount.denominator == 1 else float(amount)


def parse_length(value: Any) -> Any:
    """Tokens in a sequence, binary units: 64K is 65,536."""
    return _scaled(value, _BINARY, "64K")


def parse_count(value: Any) -> Any:
    """A budget of tokens or samples, decimal units: 5B is 5,000,000,000."""
    return _scaled(value, _DECIMAL, "5B")


def parse_seconds(value: Any) -> Any:
    """A duration in seconds: 30min is 1800."""
    return _scaled(value, _SECONDS, "30min")


def _unit(parse: Any, kind: str, example: str) -> tuple[BeforeValidator, WithJsonSchema]:
    schema = {"anyOf": [{"type": kind}, {"type": "string"}], "examples": [example]}
    return BeforeValidator(parse), WithJsonSchema(schema)


_LENGTH = _unit(parse_length, "integer", "64K")
_COUNT = _unit(parse_count, "integer", "5B")
_SECOND = _unit(parse_seconds, "number", "30min")
Length = Annotated[int, _LENGTH[0], _LENGTH[1]]
Count = Annotated[int, _COUNT[0], _COUNT[1]]
Seconds = Annotated[float, _SECOND[0], _SECOND[1]]
