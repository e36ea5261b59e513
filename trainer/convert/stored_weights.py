"""The weights of a checkpoint of ours, parameter by parameter, without building a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.stored import StoredState

if TYPE_CHECKING:
    from ..engine.model import LongModel


class StoredWeights:
    """Reads single parameters of a checkpoint that a run wrote under any layout.

    Args:
        files: Of the checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read.
    """

    def __init__(self, files: CheckpointFiles) -> None:
        self._state = StoredState(files)

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
        """Of the weights as the model had them."""
        return self._state.dtype

    def read(self, name: str) -> torch.Tensor:
        """A whole parameter by its global name, as the model had it, padding rows included.

        Raises:
            CheckpointError: The checkpoint does not have it, or cannot be read.
        """
        return self._state.full(name).to(self._state.dtype)
