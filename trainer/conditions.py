"""Conditions of this attempt, measured on all ranks; `exactness` says what they mean."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..kernels.backends import OVERRIDE
from .data.corpus import Corpus
from .data.packing import Packing
from .exactness import Conditions
from .exchange_choice import ExchangeChoice
from .platform import device, processor
from .settings import RunSettings

# Of a stage what is data (their keys are compared), layout, or over once it has begun.
_NOT_COURSE = {"data", "parallel", "micro_batch", "carry_optimizer"}
# Where the first weights came from: they are in the checkpoint.
_NOT_MODEL = {"weights", "init"}
# The exchange that was chosen is compared instead, and the canary computes nothing that stays.
_NOT_LAYOUT = {"exchange", "inner", "across", "canary"}


def machine_conditions(run: RunSettings) -> dict[str, Any]:
    """What computes; the same on every rank, which all call it together."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, _this_rank())
    own = {"ranks": dist.get_world_size(), "precision": run.precision, "recompute": run.recompute}
    return own | joined(everywhere)


def joined(ranks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all ranks say; where they differ, all their answers."""
    return {key: " | ".join(sorted({rank[key] for rank in ranks})) for key in ranks[0]}


def stage_conditions(
    run: RunSettings,
    index: int,
    machine: Mapping[str, Any],
    corpus: Corpus,
    choice: ExchangeChoice,
) -> Conditions:
    """All conditions of a stage, but for the order of its data so far."""
    stage = run.stages[index]
    across = f" with {choice.across} between nodes" if choice.kind == "two_d" else ""
    layout = {
        "micro_batch": stage.micro_batch,
        "parallel": stage.parallel.model_dump(mode="json", exclude=_NOT_LAYOUT),
        "exchange": choice.words + across if stage.parallel.context > 1 else None,
    }
    model = run.model.model_dump(mode="json", exclude=_NOT_MODEL)
    return Conditions(
        machine=machine,
        layout=_at(index, layout),
        course={"seed": run.seed, "model": model},
        stage=_at(index, stage.model_dump(mode="json", exclude=_NOT_COURSE)),
        data={"training documents": corpus.content, "tokenizer": corpus.tokenizer_key},
    )


def order(packing: Packing, sequences: int) -> dict[str, str]:
    """The key of the first sequences' order, named for people."""
    return {f"order of the first {sequences:,} sequences": packing.digest(sequences)}


def _at(index: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings under their dotted path."""
    return {"stages": {str(index): settings}}


def _this_rank() -> dict[str, str]:
    found = {
        "device": device().type,
        "processor": processor(),
        f"kernels ({OVERRIDE})": os.environ.get(OVERRIDE, "chosen"),
        "longspan": __version__,
        "python": sys.version.split()[0],
    }
    if found["device"] == "cpu":
        found["threads (OMP_NUM_THREADS)"] = str(torch.get_num_threads())
    for package in ("torch", "megatron-core"):
        found[package] = _version(package)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
