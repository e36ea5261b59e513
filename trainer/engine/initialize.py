"""Initial weights that do not depend on the layout: each is drawn from its own name and the seed.

Megatron draws a pipeline stage's weights from the rank's stream, so that stages repeat each other
when seeded alike and every layout starts elsewhere (trap S7). Here a parameter's full tensor is
drawn from a generator seeded by (seed, its name in the whole model) and each rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math
import re

import torch
from torch import nn

from ...attention.settings import RopeSettings
from ..settings import ModelSettings
from .induction import InductionStart

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process and Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initialize(
    model: nn.Module,
    settings: ModelSettings,
    rope: RopeSettings,
    *,
    length: int,
    seed: int,
    vocab: int,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill every parameter of this rank's part of the model in place.

    Matrices are normal with `init_std`; those that write into the residual stream are scaled by
    1/sqrt(2 * layers) (GPT-2). Norm weights are one, biases zero. `init: induction` then changes
    two heads.

    Args:
        model: A rank's model chunk, not yet wrapped.
        settings: The whole model.
        rope: Of the stage.
        length: Tokens in a sequence of the stage.
        seed: The run's seed.
        vocab: Real vocabulary size; padding rows are zero.
        tp_rank: This rank within its tensor group.
        tp_size: Ranks of the tensor group.
    """
    start = None
    if settings.init == "induction":
        generator = torch.Generator().manual_seed(stable_seed(seed, "induction"))
        start = InductionStart(settings, rope, length, generator)
    with torch.no_grad():
        for name, parameter in _global_names(model):
            split = _split_over_tensor_ranks(parameter, name)
            full = _full(parameter, name, settings, seed, vocab, tp_size if split else 1)
            if start is not None:
                start.fill(name, full)
            parameter.copy_(_part(full, parameter, name, tp_rank, tp_size) if split else full)


def leave_empty(weight: torch.Tensor) -> torch.Tensor:
    """The initialiser that megatron is given: `initialize` fills the weight later."""
    return weight


def _global_names(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
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
            name = "embedding.word_embeddings.weight"  # the last pipeline rank's copy
        # The local number of an expert says nothing about which expert it is.
        named.append((re.sub(r"local_experts\.\d+\.", "", name), parameter))
    return named


def _split_over_tensor_ranks(parameter: nn.Parameter, name: str) -> bool:
    """Experts are spread over ranks whole (expert tensor parallelism is 1)."""
    return "experts" not in name and getattr(parameter, "tensor_model_parallel", False)


def _full(
    parameter: nn.Parameter, name: str, settings: ModelSettings, seed: int, vocab: int, parts: int
) -> torch.Tensor:
    """The parameter's tensor over all tensor ranks."""
    shape = list(parameter.shape)
    shape[parameter.__dict__.get("partition_dim", 0)] *= parts
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0)
    std = settings.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * settings.layers)
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    full = torch.zeros(shape)
    rows = vocab if name.endswith(_VOCABULARY) else shape[0]
    full[:rows] = torch.randn(rows, shape[1], generator=generator) * std
    return full


def _part(
    full: torch.Tensor, parameter: nn.Parameter, name: str, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """This tensor rank's part."""
    if "linear_fc1" in name:  # gate and up are split each on its own
        gate, up = full.chunk(2, dim=0)
        return torch.cat([half.chunk(tp_size, dim=0)[tp_rank] for half in (gate, up)])
    return full.chunk(tp_size, dim=parameter.__dict__["partition_dim"])[tp_rank]
