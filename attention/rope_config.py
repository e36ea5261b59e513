"""RoPE in a Hugging Face config.json: transformers 4 and 5 are read, 5 is written. No torch.

transformers 5 keeps everything in `rope_parameters`; transformers 4 has `rope_theta` and
`partial_rotary_factor` at the top and the scaling in `rope_scaling`, whose `rope_type` was once
`type`; Phi-3 keeps `original_max_position_embeddings` at the top in both.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ..errors import LongspanError
from ..settings import Settings
from .frequencies import scaled_base
from .settings import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    RopeSettings,
    YarnScaling,
)

_KINDS: dict[str, type[Settings]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
}
_OLD_TYPES = {"su": "longrope"}
_ORIGINAL = "original_max_position_embeddings"
_LENGTH = "max_position_embeddings"
_SPELLING = {
    "base": "rope_theta",
    "rotary_share": "partial_rotary_factor",
    "original_length": _ORIGINAL,
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
"""Our names where Hugging Face has others."""

_COMMON = {"rope_type", "rope_theta", "partial_rotary_factor"}
_TOP = {"rope_theta", "partial_rotary_factor", _ORIGINAL}
_BLOCKS = ("rope_parameters", "rope_scaling")
_NOPE = ("no_rope_layers", "no_rope_layer_interval")
_DEFAULT_BASE = {
    "llama": 10_000.0,
    "mistral": 10_000.0,
    "phi3": 10_000.0,
    "qwen2": 10_000.0,
    "qwen3": 10_000.0,
    "smollm3": 2_000_000.0,
}
"""What transformers takes for a `rope_theta` that is left out, by `model_type`."""


def read_rope(config: Mapping[str, Any]) -> RopeSettings:
    """The RoPE that transformers computes with for a config.json.

    What transformers derives from `max_position_embeddings` (the factor of LongRoPE, and of YaRN
    where it is null) is written out, so that it does not change with a stage's length. YaRN's
    factor counts as it stands, as in transformers 5; transformers 4 takes the ratio of the lengths.

    Args:
        config: A config.json as a dict.

    Raises:
        LongspanError: A field is missing, unknown, out of range, or contradicts another.
    """
    fields = _collect(config)
    kind, scaling = _kind(fields), None
    if kind != "default":
        scaling = {"kind": kind, **_scaling(config, fields, _KINDS[kind])}
    _refuse_unknown(fields, kind)
    settings: dict[str, Any] = {
        "base": _base(config, fields),
        "scaling": scaling,
        "nope_layers": _nope_layers(config),
    }
    if "partial_rotary_factor" in fields:
        settings["rotary_share"] = fields["partial_rotary_factor"].value
    try:
        return RopeSettings.model_validate(settings)
    except ValidationError as error:
        raise _translated(error, fields) from None


def write_rope(
    rope: RopeSettings, *, max_length: int, layers: int, head_dim: int
) -> dict[str, Any]:
    """The fields of a config.json that mean `rope` to transformers 5.

    Static NTK becomes the base that it computes, and LongRoPE's factor is written out. Where no
    layer is without RoPE, `no_rope_layers` is left out; SmolLM3 takes that for every fourth layer.

    Args:
        rope: The RoPE.
        max_length: Longest sequence that the model is for. Dynamic NTK needs the original length
            in `max_position_embeddings`, and this one is then not in the file.
        layers: Layers of the model.
        head_dim: Channels of one head; the base of static NTK depends on it.

    Raises:
        LongspanError: A layer without RoPE that the model does not have.
    """
    scaling, kind = rope.scaling, "default"
    base, length, named = rope.base, max_length, {}
    if isinstance(scaling, NtkScaling):
        base = scaled_base(rope, head_dim, max_length)
    elif scaling is not None:
        kind = scaling.kind
        named = scaling.model_dump(mode="json", exclude={"kind"}, exclude_none=True)
    if isinstance(scaling, DynamicScaling):
        length = named.pop("original_length")
    if isinstance(scaling, LongRopeScaling) and scaling.factor is None:
        named["factor"] = max(1.0, max_length / scaling.original_length)
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": base}
    if rope.rotary_share < 1:
        parameters["partial_rotary_factor"] = rope.rotary_share
    parameters |= {_SPELLING.get(name, name): value for name, value in named.items()}
    fields: dict[str, Any] = {"rope_parameters": parameters, _LENGTH: length}
    if isinstance(scaling, LongRopeScaling):
        # Phi3Config has its own default at the top, which would win.
        fields[_ORIGINAL] = scaling.original_length
    if rope.nope_layers:
        if rope.nope_layers[-1] >= layers:
            wrong = f"rope.nope_layers: got {rope.nope_layers[-1]}"
            raise LongspanError(f"{wrong}; expected less than the model's {layers} layers")
        fields["no_rope_layers"] = [int(layer not in rope.nope_layers) for layer in range(layers)]
    return fields


@dataclass(frozen=True)
class _Field:
    """A value and where it stands."""

    path: str
    value: Any


def _collect(config: Mapping[str, Any]) -> dict[str, _Field]:
    """Every RoPE field that has a value, by its name in transformers 5."""
    found: dict[str, _Field] = {}
    for block in ("", *_BLOCKS):
        values = config.get(block) if block else config
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise _wrong(block, values, "a mapping")
        for name, value in values.items():
            if value is None or (not block and not _is_ours(name, value)):
                continue
            field = _Field(f"{block}.{name}" if block else name, value)
            if isinstance(value, Mapping):
                expected = "one RoPE for all layers, not one per kind of layer"
                raise _wrong(field.path, sorted(value), expected, "use another model")
            if name in ("type", "rope_type"):
                name, field = "rope_type", _Field(field.path, _OLD_TYPES.get(value, value))
            other = found.setdefault(name, field)
            if other.value != field.value:
                expected = f"the {other.value!r} of {other.path}"
                raise _wrong(field.path, value, expected, "remove the one that does not hold")
    return found


def _is_ours(name: str, value: Any) -> bool:
    """Whether a field at the top is one that is read by name.

    Raises:
        LongspanError: It is about RoPE, is switched on, and is not known here.
    """
    if name in _TOP:
        return True
    about_rope = "rope" in name or "rotary" in name
    if about_rope and name not in (*_BLOCKS, *_NOPE) and value is not False:
        known = ", ".join((*sorted(_TOP), *_BLOCKS, *_NOPE))
        raise _wrong(name, value, f"no field about RoPE but {known}", "use another model")
    return False


def _kind(fields: Mapping[str, _Field]) -> str:
    if "rope_type" not in fields:
        return "default"
    kind = fields["rope_type"]
    if kind.value not in ("default", *_KINDS):
        names = ["default", *_KINDS]
        fix = _nearest(str(kind.value), names) or "use another model"
        raise _wrong(kind.path, kind.value, f"one of {', '.join(names)}", fix)
    return kind.value


def _scaling(
    config: Mapping[str, Any], fields: Mapping[str, _Field], scaling: type[Settings]
) -> dict[str, Any]:
    """The settings of a kind of scaling, by our names."""
    values: dict[str, Any] = {}
    for name, about in scaling.model_fields.items():
        spelling = _SPELLING.get(name, name)
        if name == "kind":
            continue
        if scaling is DynamicScaling and name == "original_length":
            values[name] = _dynamic_original(config, fields)
        elif spelling in fields:
            values[name] = fields[spelling].value
        elif name == "factor" and scaling in (YarnScaling, LongRopeScaling):
            implied = _implied_factor(config, fields)
            values[name] = max(1.0, implied) if scaling is LongRopeScaling else implied
        elif about.is_required():
            block = fields["rope_type"].path.rpartition(".")[0]
            raise _missing(f"{block}.{spelling}", f"rope_type {fields['rope_type'].value}")
    return values


def _dynamic_original(config: Mapping[str, Any], fields: Mapping[str, _Field]) -> Any:
    """transformers takes `max_position_embeddings` for it, whatever else is there."""
    length, original = config.get(_LENGTH), fields.get(_ORIGINAL)
    if length is None:
        raise _missing(_LENGTH, "rope_type dynamic")
    if original is not None and original.value != length:
        expected = f"{length}: for rope_type dynamic transformers reads {_LENGTH} instead"
        raise _wrong(original.path, original.value, expected, f"{_LENGTH}: {original.value}")
    return length


def _implied_factor(config: Mapping[str, Any], fields: Mapping[str, _Field]) -> float:
    """The ratio of the lengths."""
    length, original = config.get(_LENGTH), fields.get(_ORIGINAL)
    for path, value in ((_LENGTH, length), (_ORIGINAL, original and original.value)):
        if value is None:
            raise _missing(path, "the factor is left out")
        if type(value) is not int or value < 2:
            raise _wrong(path, value, "a whole number of tokens, at least 2")
    assert length is not None and original is not None
    return length / original.value


def _refuse_unknown(fields: Mapping[str, _Field], kind: str) -> None:
    """What a kind does not know is an error within a block; at the top it may serve another."""
    names = set(_COMMON)
    if kind != "default":
        names |= {_SPELLING.get(name, name) for name in _KINDS[kind].model_fields} - {"kind"}
    for name, field in fields.items():
        if name not in names and "." in field.path:
            fix = _nearest(name, sorted(names)) or "remove it if it means nothing"
            expected = f"for rope_type {kind} only {', '.join(sorted(names))}"
            raise _wrong(field.path, field.value, expected, fix)


def _base(config: Mapping[str, Any], fields: Mapping[str, _Field]) -> Any:
    if "rope_theta" in fields:
        return fields["rope_theta"].value
    base = _DEFAULT_BASE.get(str(config.get("model_type")))
    if base is None:
        raise _missing("rope_theta", f"model_type {config.get('model_type')!r}")
    return base


def _nope_layers(config: Mapping[str, Any]) -> list[int]:
    """Layers without RoPE; a list counts before an interval, as in SmolLM3."""
    listed, interval = (config.get(name) for name in _NOPE)
    layers = config.get("num_hidden_layers")
    if listed is not None:
        if not isinstance(listed, list) or any(entry not in (0, 1) for entry in listed):
            raise _wrong(_NOPE[0], listed, "a list of 1 (RoPE) and 0 (none), one per layer")
        if layers is not None and len(listed) < layers:
            expected = f"an entry for each of num_hidden_layers ({layers})"
            raise _wrong(_NOPE[0], f"{len(listed)} entries", expected)
        return [layer for layer, turns in enumerate(listed[:layers]) if not turns]
    if interval is None and config.get("model_type") == "smollm3":
        interval = 4
    if interval is None:
        return []
    if type(interval) is not int or interval < 1:
        raise _wrong(_NOPE[1], interval, "a whole number from 1")
    if layers is None:
        raise _missing("num_hidden_layers", _NOPE[1])
    return list(range(interval - 1, layers, interval))


def _translated(error: ValidationError, fields: Mapping[str, _Field]) -> LongspanError:
    """The first thing that pydantic refuses, at its place in the config."""
    detail = error.errors(include_url=False)[0]
    keys = [key for key in detail["loc"] if key not in ("scaling", *_KINDS)]
    name = _SPELLING.get(str(keys[0]), str(keys[0]))
    path = fields[name].path if name in fields else name
    expected = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    path = ".".join([path, *map(str, keys[1:])])
    return _wrong(path, detail["input"], expected)


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def _missing(path: str, reason: str) -> LongspanError:
    return LongspanError(f"config.json: {path} is missing ({reason})", fix=f"add {path}")


def _wrong(path: str, value: Any, expected: str, fix: str = "") -> LongspanError:
    return LongspanError(
        f"config.json: {path}: got {value!r}; expected {expected}", fix=fix or f"correct {path}"
    )
