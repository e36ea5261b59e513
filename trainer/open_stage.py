"""OpenStage: a stage at work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..attention.catalogue import words
from .checkpoint.cursor import Cursor
from .conditions import order
from .data.corpus import Corpus
from .data.packing import Packing
from .engine.engine import Engine
from .exactness import Conditions
from .plan import StagePlan
from .settings import StageSettings


@dataclass
class OpenStage:
    """A stage's settings, documents and their order, engine and conditions."""

    index: int
    settings: StageSettings
    plan: StagePlan
    corpus: Corpus
    packing: Packing
    engine: Engine
    conditions: Conditions

    def conditions_at(self, cursor: Cursor) -> Conditions:
        """The conditions with the order of its data up to the cursor."""
        sequences = order(self.packing, cursor.next_sample)
        return replace(self.conditions, data={**self.conditions.data, **sequences})

    def about(self) -> dict[str, Any]:
        """What is told of it when it begins."""
        settings, plan, parallel = self.settings, self.plan, self.settings.parallel
        return {
            "length": settings.length,
            "steps": plan.steps,
            "tokens_per_step": plan.sequences_per_step * settings.length,
            "rope": settings.rope.words,
            "attention": words(settings.attention, self.engine.run.model.layers),
            "parallel": parallel.model_dump() | {"data": plan.data},
            "exchange": self.engine.choice.words if parallel.context > 1 else None,
            "parameters": self.engine.parameters,
            "data": self.corpus.info,
        }
