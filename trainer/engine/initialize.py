"""Initial weights that do not depend on the layout: each is drawn from its own name and the seed.

Megatron draws a pipeline stage's weights from the rank's stream, so that stages repeat each other
when seeded alike and every layout starts elsewhere (trap S7). Here a parameter's full tensor is
drawn from a generator seeded by (seed, its name in the whole model) and each rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import nn

from ...attention.settings import RopeSettings
from ..settings import ModelSettings
from .induction import InductionStart
from .partition import global_names, place_of

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
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Fill parameters of this rank's part of the model in place.

    Matrices are normal with `init_std`; those that write into the residual stream are scaled by
    1/sqrt(2 * layers) (GPT-2). Norm weights are one, biases zero, and what a mechanism adds starts
    as it says. `init: induction` then changes two heads.

    Args:
        model: A rank's model chunk, not yet wrapped.
        settings: The whole model.
        rope: Of the stage.
        length: Tokens in a sequence of the stage.
        seed: The run's seed.
        vocab: Real vocabulary size; padding rows are zero.
        tp_rank: This rank within its tensor group.
        tp_size: Ranks of the tensor group.
        only: The global names of those to fill.
    """
    start = None
    if settings.init == "induction":
        generator = torch.Generator().manual_seed(stable_seed(seed, "induction"))
        start = InductionStart(settings, rope, length, generator)
    with torch.no_grad():
        for name, parameter in global_names(model):
            if not only(name):
                continue
            place = place_of(parameter, name, tp_rank, tp_size)
            full = _full(place.shape, name, parameter, settings, seed, vocab)
            if start is not None:
                start.fill(name, full)
            parameter.copy_(place.of(full))


def leave_empty(weight: torch.Tensor) -> torch.Tensor:
    """The initialiser that megatron is given: `initialize` fills the weight later."""
    return weight


def _full(
    shape: tuple[int, ...],
    name: str,
    parameter: nn.Parameter,
    settings: ModelSettings,
    seed: int,
    vocab: int,
) -> torch.Tensor:
    """The parameter's tensor over all tensor ranks."""
    start = getattr(parameter, "start", None)
    if start is not None:
        return torch.full(shape, start)
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0)
    std = settings.init_std
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= math.sqrt(2 * settings.layers)
    generator = torch.Generator().manual_seed(stable_seed(seed, name))
    full = torch.zeros(shape)
    rows = vocab if name.endswith(_VOCABULARY) else shape[0]
    full[:rows] = torch.randn(rows, *shape[1:], generator=generator) * std
    return full
