"""Parity of a conversion: transformers on one side, the engine on the other.

Both compute in fp32, from weights that are rounded to the dtype that was written.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...errors import ConversionError
from ..data.samples import Sample
from ..data.tokenizer import TextTokenizer
from ..platform import set_up
from ..settings import RunSettings
from .hf_config import Dtype, HfModel
from .one_rank import one_rank
from .parity import TEXT, Logits, Parity, compare

if TYPE_CHECKING:
    from ..engine.model import Weights

TOLERANCE = 1e-4
"""Of the largest logit, in fp32."""

_CONTINUED = 32


def verify(hf: HfModel, weights: Weights, folder: Path, text: str | None) -> Parity:
    """Compare the engine with transformers.

    Args:
        hf: The model of both.
        weights: Fills the engine's model.
        folder: That transformers reads.
        text: What is compared; a built-in text when None. At most `hf.max_length` tokens count.

    Raises:
        ConversionError: transformers is not installed, or cannot read the folder.
    """
    theirs = _transformers(folder, hf.dtype)
    tokens_T = _tokens(folder, hf, text)
    set_up(0, 1)
    with one_rank():
        return compare(_engine(hf, weights), theirs, tokens_T, _CONTINUED)


def _tokens(folder: Path, hf: HfModel, text: str | None) -> Tensor:
    """The text as tokens; bytes where the folder has no tokenizer."""
    words = TEXT if text is None else text
    if (folder / "tokenizer.json").is_file():
        ids = torch.from_numpy(TextTokenizer.load(folder).encode_batch([words])[0])
    else:
        ids = torch.tensor(list(words.encode())) % hf.vocab
    if not len(ids) or int(ids.max()) >= hf.vocab:
        what = "has no tokens" if not len(ids) else f"has tokens beyond the model's {hf.vocab}"
        raise ConversionError(f"the text to compare {what}", "give another text with --text")
    return ids[: max(1, hf.max_length - _CONTINUED)].long()


def _round(model: torch.nn.Module, dtype: Dtype | None) -> None:
    """Round fp32 weights to the dtype that they are stored in, if it is a smaller one."""
    if dtype == "bf16":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16().float())


def require_transformers() -> None:
    """Say at once, before anything is converted, what a comparison lacks."""
    if importlib.util.find_spec("transformers") is None:
        raise ConversionError(
            "--verify compares with transformers, which is not installed",
            "pip install transformers, or leave --verify out",
        )


def _transformers(folder: Path, dtype: Dtype | None) -> Logits:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except Exception as error:
        what = f"transformers cannot read {folder}: {type(error).__name__}: {error}"
        raise ConversionError(what, "install a transformers that knows the model") from error
    _round(model.eval(), dtype)
    return lambda tokens_T: model(tokens_T[None]).logits[0]


def _engine(hf: HfModel, weights: Weights) -> Logits:
    """An engine of one rank."""
    from ..engine.engine import Engine

    run = _run(hf)
    engine = Engine(run, run.stages[0], hf.vocab, train=False, weights=weights)
    _round(engine.model, hf.dtype)

    def logits(tokens_T: Tensor) -> Tensor:
        count = len(tokens_T)
        bounds = torch.tensor([0, count], dtype=torch.int32)
        sample = Sample(tokens_T, torch.zeros_like(tokens_T), torch.ones(count), bounds)
        # transformers picks LongRoPE's and dynamic NTK's by the text.
        engine.build.rope = replace(engine.build.rope, length=count)
        with torch.no_grad():
            return engine.model.logits(engine.build(sample)).cpu()

    return logits


def _run(hf: HfModel) -> RunSettings:
    """Settings of an engine that computes the model; data and optimizer are never looked at."""
    stage = {
        "name": "parity",
        "length": hf.max_length,
        "tokens": hf.max_length,
        "batch_tokens": hf.max_length,
        "rope": hf.rope.model_dump(mode="json"),
        "data": {"sources": [{"kind": "python-stdlib"}]},
    }
    return RunSettings.model_validate(
        {
            "precision": "fp32",
            "ranks": 1,
            "model": hf.model.model_dump(mode="json"),
            "tokenizer": {"kind": "train"},
            "stages": [stage],
        }
    )
