"""The settings of a short run that no test trains."""

from typing import Any

from longspan.trainer.settings import RunSettings

STAGE: dict[str, Any] = {
    "name": "short",
    "length": 256,
    "tokens": 8192,
    "batch_tokens": 1024,
    "data": {"sources": [{"kind": "python-stdlib"}]},
}


def short_run(**changes: Any) -> RunSettings:
    """One stage; `changes` replace what they name."""
    raw = {
        "model": {"hidden": 64, "layers": 2, "heads": 4, "ffn_hidden": 128},
        "tokenizer": {"kind": "train", "vocab": 512},
        "tracking": {"wandb": "off"},
        "stages": [STAGE],
    }
    return RunSettings.model_validate({**raw, **changes})
