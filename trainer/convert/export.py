"""Export of a run or of one of its checkpoints, with everything that somebody else needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.manifest import MANIFEST, read_manifest
from ..checkpoint.store import open_store
from ..data.tokenizer import TextTokenizer
from ..run_directory import RunDirectory, write_atomically
from ..settings import RunSettings
from .attention import exported_attention
from .card import model_card
from .companions import copy_companions
from .convert import checkpoint_model, export_checkpoint
from .families import KEPT, family_for
from .hf_config import CONFIG, Dtype, HfModel, read_config


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, from where, and what is to be said of its attention."""

    run: RunDirectory
    checkpoint: CheckpointFiles
    model: HfModel
    companions: tuple[str, ...]
    attention: str | None


def export(what: Path, out: Path, *, dtype: Dtype | None = None) -> Exported:
    """Write a Hugging Face folder: weights, config.json, tokenizer, generation config, model card.

    Args:
        what: A run's folder, whose newest checkpoint is taken, or a checkpoint's.
        out: A folder that does not exist yet, or is empty.
        dtype: Of the weights; as they were trained when left out.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
        ConversionError: It cannot be written as a Hugging Face model.
        RunError: The checkpoint belongs to no run.
    """
    directory, checkpoint = _find(what)
    run = directory.load_settings()
    stage = read_manifest(checkpoint).cursor.stage
    attention = exported_attention(run.stages[stage].attention, run.model.layers)
    hf = _with_history(checkpoint_model(checkpoint), directory, run)
    companions: list[str] = []

    def add_files(folder: Path) -> None:
        companions.extend(copy_companions(directory.companions, folder))
        card = model_card(directory, run, checkpoint, out.name)
        write_atomically(folder / "README.md", card)

    written = export_checkpoint(checkpoint, out, hf=hf, dtype=dtype, add_files=add_files)
    return Exported(directory, checkpoint, written, tuple(companions), attention)


def _find(what: Path) -> tuple[RunDirectory, CheckpointFiles]:
    """The run and the checkpoint that a path means."""
    path = what.absolute()
    if (path / MANIFEST).is_file():
        return RunDirectory(path.parent.parent), CheckpointFiles.of(path)
    directory = RunDirectory(path)
    store = open_store(directory.load_settings().checkpoint.where, directory.path)
    complete = store.committed()
    if not complete:
        raise CheckpointError(f"{directory} has no complete checkpoint yet", "train it first")
    return directory, CheckpointFiles(store, complete[-1])


def _with_history(hf: HfModel, directory: RunDirectory, run: RunSettings) -> HfModel:
    """Token ids, and the length that the model was good for before, where its RoPE is the same."""
    raw: dict[str, Any] = {}
    origin = directory.companions / CONFIG
    if origin.is_file():
        raw = json.loads(origin.read_text("utf-8"))
    if not run.keeps_tokenizer:
        ids: dict[str, Any] = dict.fromkeys(KEPT)
        raw |= ids | {"eos_token_id": TextTokenizer.load(directory.companions).eod}
    length = hf.max_length
    before = raw.get("max_position_embeddings")
    family = family_for(hf.model, hf.rope, preferred=raw.get("model_type"))
    kept = run.model.weights and read_config(directory.companions).rope == hf.rope
    if kept and isinstance(before, int):
        length = max(length, before)
    return replace(hf, family=family, raw=raw, max_length=length)
