"""FLOPs of training, from the settings alone: what the model needs, not what is computed again."""

from __future__ import annotations

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
