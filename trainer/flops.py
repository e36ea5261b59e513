"""FLOPs of training, from the settings alone: what the model needs, not what is computed again."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ..attention.cost import attention_cost
from .parameters import active_parameters, layer_shape
from .settings import ModelSettings, StageSettings


def training_flops(
    model: ModelSettings, stage: StageSettings, vocab: int, document: int | None = None
) -> float:
    """FLOPs per token of a forward and a backward pass over the whole model.

    Products of matrices only: 6 per parameter that a token is multiplied with, and those of
    attention over what it visits. Where only a selection learns the model has no backward.

    Args:
        model: The model.
        stage: The stage.
        vocab: Tokens of the vocabulary.
        document: Tokens of a document; left out: the stage's length.
    """
    tokens = document or stage.length
    frozen, shape = stage.trainable == "selection", layer_shape(model)
    # Few mechanisms, many layers.
    of_layers = stage.attention.mechanisms(model.layers)
    attention = sum(
        of_layers.count(mechanism)
        * attention_cost(stage.attention, mechanism, shape, tokens).training(frozen=frozen)
        for mechanism in dict.fromkeys(of_layers)
    )
    return (2 if frozen else 6) * active_parameters(model, vocab) + attention / tokens


class FlopsCounter:
    """FLOPs that the model needs for documents, each length counted once.

    Args:
        model: The model.
        stage: The stage.
        vocab: Tokens of the vocabulary.
    """

    def __init__(self, model: ModelSettings, stage: StageSettings, vocab: int) -> None:
        self._of_length = lru_cache(maxsize=2**14)(
            lambda tokens: tokens * training_flops(model, stage, vocab, tokens)
        )

    def __call__(self, lengths: Iterable[int]) -> float:
        """FLOPs of training on documents of these lengths."""
        return sum(map(self._of_length, lengths))


PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}
"""Dense bf16 products per second, from NVIDIA's data sheets."""


def peak_flops(name: str) -> float | None:
    """What a GPU could do at most in bf16, by its name; None where that is not known.

    It is not of a part of a GPU, whose name has MIG in it.
    """
    if "MIG" in name:
        return None
    # An RTX A1000 is no A100.
    known = (peak for gpu, peak in PEAKS.items() if re.search(rf"{gpu}(?![0-9])", name))
    return next(known, None)
