"""Stored: reads the parameters of a checkpoint, whatever layout wrote it."""

from __future__ import annotations

from typing import Literal

import torch

from ...errors import CheckpointError
from .boxes import Box, Part, matrix
from .files import CheckpointFiles
from .index import INDEX, Index, Stored, StoredParameter
from .shard import KINDS

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
_BYTES = 4
VOCAB = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters whose rows layouts pad differently."""


class StoredState:
    """The parameters and moments of a checkpoint.

    Args:
        files: Of the checkpoint.

    Raises:
        CheckpointError: It has no index, or one that cannot be read.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files
        try:
            self.index = Index.from_json(files.read(INDEX))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(
                f"{INDEX} of checkpoint {files} cannot be read: {error!r}",
                "`longspan checkpoint verify` names the newest intact checkpoint of a run",
            ) from error

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights as the model had them."""
        return torch.bfloat16 if self.index.dtype == "bf16" else torch.float32

    def __contains__(self, name: str) -> bool:
        return name in self.index.parameters

    def parameter(self, name: str) -> StoredParameter:
        """Shape and boxes of a parameter.

        Raises:
            CheckpointError: The checkpoint does not have it.
        """
        found = self.index.parameters.get(name)
        if found is None:
            raise CheckpointError(
                f"checkpoint {self.files} has no {name}: it is of another model",
                "give the settings of the run that wrote it",
            )
        return found

    def full(self, name: str, kind: Kind = "weight") -> torch.Tensor:
        """A whole parameter in fp32, padding rows included."""
        shape = self.parameter(name).shape
        rows, columns = matrix(shape)
        into = torch.zeros(rows, columns)
        self._fill(name, kind, into, Box(0, rows, 0, columns))
        return into.view(shape)

    def read(
        self, name: str, part: Part, kind: Kind, first: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Elements `[first, end)` of a rank's part of a parameter, fp32, flat.

        Rows beyond the stored ones, of a vocabulary that another layout pads more, are zeros.

        Raises:
            CheckpointError: The checkpoint does not have the parameter, or with another shape.
        """
        self._refuse_shape(name, part.shape)
        end = part.size if end is None else end
        into = torch.zeros(end - first)
        for box, start in part.boxes(first, end):
            at = start - first
            view = into[at : at + box.size].view(box.rows, box.columns)
            self._fill(name, kind, view, box)
        return into

    def _refuse_shape(self, name: str, shape: tuple[int, ...]) -> None:
        stored = self.parameter(name).shape
        padded = name in VOCAB and stored[1:] == shape[1:]
        if stored != shape and not padded:
            raise CheckpointError(
                f"{name} in checkpoint {self.files} has the shape {list(stored)}, "
                f"this run's model {list(shape)}: it is of another model",
                "give the settings of the run that wrote it",
            )

    def _fill(self, name: str, kind: Kind, into: torch.Tensor, box: Box) -> None:
        height, width = matrix(self.parameter(name).shape)
        wanted = box.within(Box(0, height, 0, width))
        left = 0 if wanted is None else wanted.size
        for stored in self.parameter(name).boxes:
            both = box.within(stored.box)
            if both is not None:
                found = self._rows(stored, kind, both)
                rows = slice(both.row - box.row, both.row_end - box.row)
                columns = slice(both.column - box.column, both.column_end - box.column)
                into[rows, columns].copy_(found)
                left -= both.size
        if left:
            raise CheckpointError(
                f"{name} in checkpoint {self.files} lacks {left} elements",
                "`longspan checkpoint verify` names the newest intact checkpoint of a run",
            )

    def _rows(self, stored: Stored, kind: Kind, box: Box) -> torch.Tensor:
        """A box within a stored one."""
        width = stored.box.columns * _BYTES
        first = stored.offsets[KINDS.index(kind)] + (box.row - stored.box.row) * width
        raw = self.files.read(stored.file, first, first + box.rows * width)
        if len(raw) != box.rows * width:
            raise CheckpointError(
                f"{stored.file} of checkpoint {self.files} is shorter than its index says",
                "`longspan checkpoint verify` names the newest intact checkpoint of a run",
            )
        found = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(box.rows, -1)
        return found[:, box.column - stored.box.column : box.column_end - stored.box.column]
