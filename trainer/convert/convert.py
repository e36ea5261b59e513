"""A Hugging Face checkpoint in, and a checkpoint of ours out, a block or a parameter at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...attention.settings import RopeSettings
from ...errors import CheckpointError, ConversionError
from ..checkpoint.files import CheckpointFiles
from ..checkpoint.manifest import MANIFEST
from ..data.tokenizer import TextTokenizer
from ..run_directory import write_atomically
from ..settings import ModelSettings
from .companions import copy_companions
from .families import family_for
from .hf_config import CONFIG, Dtype, HfModel, write_config
from .names import assemblies
from .safetensors_folder import SHARD_BYTES, write_folder
from .stored_weights import StoredWeights
from .weights import FolderWeights, split

AddFiles = Callable[[Path], None]
_TORCH: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
_STORED: dict[str, Dtype] = {"BF16": "bf16", "F32": "fp32"}


def import_checkpoint(hf_dir: Path, out: Path, *, dtype: Dtype | None = None) -> HfModel:
    """Check a Hugging Face folder and write it as one that a run can start from.

    `out` holds the weights as safetensors under their Hugging Face names, one dtype, nothing
    superfluous, and config.json with every default written out. An engine reads it under any
    layout (`FolderWeights`), and so does transformers.

    Args:
        hf_dir: A folder with config.json and safetensors.
        out: A folder that does not exist yet, or is empty.
        dtype: Of the weights in `out`; as they are when left out.

    Returns:
        The model.

    Raises:
        ConversionError: The folder cannot be imported, or `out` not be written. `out` is then as
            it was.
    """
    weights = FolderWeights(hf_dir)
    _refuse_tokenizer(hf_dir, weights.hf.vocab)
    dtype = dtype or _own_dtype(weights)
    hf = replace(weights.hf, dtype=dtype)
    shapes = _shapes(hf)
    blocks = (block for name in shapes for block in weights.blocks(name))

    def add_files(folder: Path) -> None:
        copy_companions(hf_dir, folder)

    _write(out, hf, dtype, blocks, SHARD_BYTES, add_files)
    return hf


def export_checkpoint(
    checkpoint: CheckpointFiles,
    out: Path,
    *,
    hf: HfModel | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    add_files: AddFiles | None = None,
) -> HfModel:
    """Write a checkpoint of ours, of any layout, as a Hugging Face folder.

    Args:
        checkpoint: Of a run.
        out: A folder that does not exist yet, or is empty.
        hf: What the model is; read from the checkpoint when left out.
        dtype: Of the weights in `out`; as they are when left out.
        shard_bytes: The most bytes in one file.
        add_files: Called with the folder before it gets its name, to add more to it.

    Returns:
        The model as it was written.

    Raises:
        ConversionError: No family computes what the model does, or `out` cannot be written.
        CheckpointError: The checkpoint cannot be read.
    """
    hf = hf or checkpoint_model(checkpoint)
    stored = StoredWeights(checkpoint)
    if dtype is None:
        dtype = "bf16" if stored.dtype() == torch.bfloat16 else "fp32"
    blocks = (
        part
        for name, assembly in assemblies(hf.model, hf.vocab).items()
        for _, part in split(stored.read(name), assembly)
    )
    hf = replace(hf, dtype=dtype)
    _write(out, hf, dtype, blocks, shard_bytes, add_files)
    return hf


def checkpoint_model(checkpoint: CheckpointFiles) -> HfModel:
    """The model of a checkpoint that a run wrote, in the family that computes the same.

    Raises:
        CheckpointError: Its manifest does not say what model it holds.
        ConversionError: No family computes what it does.
    """
    try:
        state: dict[str, Any] = json.loads(checkpoint.read(MANIFEST))
        model = ModelSettings.model_validate(state["model"])
        rope = RopeSettings.model_validate(state["rope"])
        vocab, length = int(state["vocab"]), int(state["length"])
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} does not say what model it holds: {error!r}",
            "give a checkpoint folder of a run, such as runs/NAME/checkpoints/step-N",
        ) from error
    return HfModel(family_for(model, rope), model, rope, vocab, length, None)


def _refuse_tokenizer(folder: Path, vocab: int) -> None:
    """Refuse a tokenizer whose tokens the embedding does not have."""
    if not (folder / "tokenizer.json").is_file():
        return
    known = TextTokenizer.load(folder).vocab
    if known > vocab:
        raise ConversionError(
            f"the tokenizer in {folder} has {known} tokens, the model's embedding {vocab}",
            "take the tokenizer that the model was trained with, or resize the embedding first",
        )


def _own_dtype(weights: FolderWeights) -> Dtype:
    """The dtype that all tensors have, or fp32 where it holds them all exactly."""
    found = weights.dtypes()
    if "F16" in found:
        raise ConversionError(
            f"the weights in {weights.path} are fp16, which no run trains in",
            "say which dtype to take: fp32 is exact, bf16 rounds",
        )
    return _STORED[found.pop()] if len(found) == 1 else "fp32"


def _shapes(hf: HfModel) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of a model, in the order in which they are written."""
    table = assemblies(hf.model, hf.vocab)
    return {name: shape for assembly in table.values() for name, shape in assembly.shapes().items()}


def _write(
    out: Path,
    hf: HfModel,
    dtype: Dtype,
    blocks: Iterator[torch.Tensor],
    shard_bytes: int,
    add_files: AddFiles | None,
) -> None:
    config = write_config(hf, dtype)
    with _new_folder(out) as folder:
        write_folder(folder, _shapes(hf), _TORCH[dtype], blocks, shard_bytes=shard_bytes)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        if add_files is not None:
            add_files(folder)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when the block ends well, and else vanishes."""
    out = out.expanduser().absolute()
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = f"{out} exists already" + (" and is not empty" if out.is_dir() else "")
            raise ConversionError(what, "give another folder, or remove that one")
        part.mkdir(parents=True)
        yield part
        handle = os.open(part, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        part.rename(out)
    except OSError as error:
        raise ConversionError(
            f"{out} cannot be written: {error.strerror or error}; nothing was left there",
            "free some space, or give a folder that can be written to",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
