"""A RoPE of every kind, around an original length of 128 tokens; 32 channels turn."""

from typing import Any

from longspan.attention.settings import RopeSettings

ORIGINAL = 128
PAIRS = 16
LENGTHS = (64, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 1000)

_YARN = {"kind": "yarn", "factor": 8, "original_length": ORIGINAL}
_LONGROPE = {
    "kind": "longrope",
    "short_factors": [1 + pair / 40 for pair in range(PAIRS)],
    "long_factors": [1.5 + pair for pair in range(PAIRS)],
    "original_length": ORIGINAL,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"kind": "linear", "factor": 4},
    "ntk": {"kind": "ntk", "factor": 6},
    "dynamic": {"kind": "dynamic", "factor": 2, "original_length": ORIGINAL},
    "dynamic_1": {"kind": "dynamic", "factor": 1, "original_length": ORIGINAL},
    "yarn": _YARN,
    "yarn_betas": {**_YARN, "beta_fast": 6, "beta_slow": 2.5},
    "yarn_untruncated": {**_YARN, "truncate": False},
    "yarn_step": {**_YARN, "beta_fast": 6.0001, "beta_slow": 6, "truncate": False},
    "yarn_factor": {**_YARN, "attention_factor": 1.7},
    "yarn_mscale": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "llama3": {
        "kind": "llama3",
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_length": ORIGINAL,
    },
    "longrope": _LONGROPE,
    "longrope_factor": {**_LONGROPE, "factor": 32},
    "longrope_attention": {**_LONGROPE, "attention_factor": 0.9},
}


def rope(name: str, base: float = 10_000.0, **more: Any) -> RopeSettings:
    """The RoPE with a scaling of `SCALINGS`."""
    return RopeSettings.model_validate({"base": base, "scaling": SCALINGS[name], **more})
