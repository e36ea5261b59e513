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


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process and Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def initialize(
    model: nn.Module, *, seed: int, std: float, layers: int, vocab: int, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of this rank's part of the model in place.

    Matrices are normal with `std`; those that write into the residual stream are scaled by
    1/sqrt(2 * layers) (GPT-2). Norm weights are one, biases zero.

    Args:
        model: A rank's model chunk, not yet wrapped.
        seed: The run's seed.
        std: Standard deviation.
        layers: Layers of the whole model.
        vocab: Real vocabulary size; padding rows are zero.
        tp_rank: This rank within its tensor group.
        tp_size: Ranks of the tensor group.
    """
    with torch.no_grad():
        for name, parameter in _global_names(model):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = re.search(r"(linear_proj|linear_fc2)\.weight$", name) is not None
            scale = std / math.sqrt(2 * layers) if residual else std
            parameter.copy_(
                _part(parameter, name, vocab, tp_rank, tp_size, stable_seed(seed, name), scale)
            )


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


def _part(
    parameter: nn.Parameter,
    name: str,
    vocab: int,
    tp_rank: int,
    tp_size: int,
    seed: int,
    std: float,
) -> torch.Tensor:
    """This rank's part of the parameter's full tensor."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    rows, columns = parameter.shape
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        full = torch.zeros(rows * tp_size, columns)
        full[:vocab] = draw(vocab, columns)
        return full.chunk(tp_size, dim=0)[tp_rank]
    # Experts are spread over ranks whole (expert tensor parallelism is 1).
    whole = "experts" in name or not getattr(parameter, "tensor_model_parallel", False)
    if tp_size == 1 or whole:
        return draw(rows, columns)
    if parameter.__dict__["partition_dim"] == 1:
        return draw(rows, columns * tp_size).chunk(tp_size, dim=1)[tp_rank]
    full = draw(rows * tp_size, columns)
    if "linear_fc1" in name:  # gate and up are split each on its own
        gate, up = full.chunk(2, dim=0)
        return torch.cat([half.chunk(tp_size, dim=0)[tp_rank] for half in (gate, up)])
    return full.chunk(tp_size, dim=0)[tp_rank]
