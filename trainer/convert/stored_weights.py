"""The weights of a checkpoint of ours, parameter by parameter, without building a model.

megatron stores the layers of a model as one tensor with a leading layer dimension (and an expert
dimension), in chunks as the ranks held them. A layer is put together from its chunks alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ...errors import CheckpointError

if TYPE_CHECKING:
    from ..engine.model import LongModel


class StoredWeights:
    """Reads single parameters of a checkpoint that `save_engine` wrote under any layout.

    Args:
        path: The checkpoint's folder. It is one of ours: its index is a pickle.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = FileSystemReader(path)
        try:
            self._metadata: Metadata = self._reader.read_metadata()
        except Exception as error:
            raise _unreadable(path, error) from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __call__(self, model: LongModel) -> None:
        """Fill every parameter of a model on one rank.

        Raises:
            CheckpointError: The checkpoint is of another model, or cannot be read.
        """
        from ..engine.partition import global_names

        with torch.no_grad():
            for name, parameter in global_names(model):
                full = self.read(name)
                # Layouts pad the vocabulary differently.
                rows = min(len(full), len(parameter))
                parameter[:rows].copy_(full[:rows])
                parameter[rows:].zero_()

    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._stored("decoder.final_layernorm.weight").properties.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter by its global name, padding rows included.

        Raises:
            CheckpointError: The checkpoint does not have it, or cannot be read.
        """
        key, index = _key(name)
        stored = self._stored(key)
        lead = len(index)
        full = torch.empty(stored.size[lead:], dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(
            torch.Size((*index, *([0] * full.dim()))), torch.Size((*([1] * lead), *full.shape))
        )
        items = create_read_items_for_chunk_list(key, stored, [chunk])
        planner = _Into(full.view(chunk.sizes))
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except Exception as error:
            raise _unreadable(self.path, error) from error
        return full

    def _stored(self, key: str) -> TensorStorageMetadata:
        stored = self._metadata.state_dict_metadata.get(key)
        if isinstance(stored, TensorStorageMetadata):
            return stored
        raise CheckpointError(
            f"checkpoint {self.path} has no {key}: it is of another model",
            "give the settings of the run that wrote it",
        )


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.target
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It lies in its place already."""


def _key(name: str) -> tuple[str, tuple[int, ...]]:
    """megatron's key of a parameter, and its place along the leading dimensions."""
    match = re.fullmatch(r"layer\.(\d+)\.(.+?)(?:@expert\.(\d+))?", name)
    if match is None:
        return name, ()
    layer, rest, expert = match.groups()
    own, _, inner = rest.partition("self_attention.attention.")
    if not own and inner:  # stored under the layer's own number, see SelfAttention
        return f"decoder.layers.self_attention.attention.{layer}.{inner}", ()
    if expert is None:
        return f"decoder.layers.{rest}", (int(layer),)
    rest = rest.replace("mlp.experts.", "mlp.experts.experts.")
    return f"decoder.layers.{rest}", (int(layer), int(expert))


def _unreadable(path: Path, error: Any) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} cannot be read: {type(error).__name__}: {error}",
        "give a complete checkpoint folder, such as runs/NAME/checkpoints/step-N",
    )
