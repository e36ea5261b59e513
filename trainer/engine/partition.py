"""Which part of the whole model's parameters a rank holds: names and places that no layout changes.

A parameter's global name counts layers and experts over the whole model. Its place says which rows
and columns of the full tensor are this rank's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """A rank's part of a full tensor.

    Attributes:
        rows: Ranges `[first, last)` along dimension 0, in the order in which the rank holds them.
        columns: Range along dimension 1; None where that is whole in every layout.
        shape: Of the full tensor.
    """

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None
    shape: tuple[int, ...]

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of `full`."""
        part = torch.cat([full[first:last] for first, last in self.rows])
        return part if self.columns is None else part[:, slice(*self.columns)]


def global_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters with layer and expert numbers counted over the whole model."""
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    offsets: dict[str, tuple[str, int]] = {}
    for path, module in model.named_modules():
        layer = getattr(module, "layer_number", None)
        if layer is not None and re.fullmatch(r"decoder\.layers\.\d+", path):
            offsets[f"{path}."] = ("layer", layer - 1)
        experts = getattr(module, "local_expert_indices", None)
        if experts is not None:
            for local, expert in enumerate(experts):
                offsets[f"{path}.experts.local_experts.{local}."] = ("expert", expert)
    named = []
    for path, parameter in model.named_parameters():
        name = path
        for prefix, (kind, index) in offsets.items():
            if path.startswith(prefix):
                tail = path.removeprefix(prefix)
                name = f"{kind}.{index}.{tail}" if kind == "layer" else f"{name}@expert.{index}"
        if name == "output_layer.weight" and tied:
            name = EMBEDDING  # the last pipeline rank's copy
        # The local number of an expert says nothing about which expert it is.
        named.append((re.sub(r"local_experts\.\d+\.", "", name), parameter))
    return named


EMBEDDING = "embedding.word_embeddings.weight"
"""The name of the input embedding, and of the output layer where that is the same matrix."""

ADDED = ".self_attention.attention."
"""In the names of all parameters of mechanisms and gates, which no pretrained model has."""


def is_added(name: str) -> bool:
    """Whether the stage's attention adds a parameter to the model, by its global name."""
    return ADDED in name


def place_of(parameter: nn.Parameter, name: str, tp_rank: int, tp_size: int) -> Place:
    """Where a rank's parameter lies in the full tensor.

    Args:
        parameter: This rank's, as megatron made and marked it.
        name: Its global name.
        tp_rank: This rank within its tensor group.
        tp_size: Ranks of the tensor group.
    """
    # Experts are spread over ranks whole (expert tensor parallelism is 1).
    if "experts" in name or not getattr(parameter, "tensor_model_parallel", False):
        tp_rank, tp_size = 0, 1
    dim = parameter.__dict__.get("partition_dim", 0) if tp_size > 1 else 0
    shape = list(parameter.shape)
    shape[dim] *= tp_size
    here = parameter.shape[dim]
    first, last = here * tp_rank, here * (tp_rank + 1)
    rows: tuple[tuple[int, int], ...] = ((0, shape[0]),)
    columns = (0, shape[1]) if len(shape) == 2 else None
    if dim == 1:
        columns = (first, last)
    elif "linear_fc1" in name and tp_size > 1:  # gate and up are split each on its own
        half = here // 2
        rows = tuple(
            (start + half * tp_rank, start + half * (tp_rank + 1)) for start in (0, half * tp_size)
        )
    else:
        rows = ((first, last),)
    return Place(rows, columns, tuple(shape))
