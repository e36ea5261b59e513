"""Generation with a cache of keys and values: exact for every mechanism, for evaluations.

Not fast: every mechanism plans and pools anew at each step. Shapes: T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ...attention.context import Context
from ...attention.documents import Documents
from ...attention.notes import Notes
from ...attention.rope import Rope
from ...errors import LongspanError
from ...parallel.exchange import Exchange, Local
from .engine import Engine
from .key_cache import KeyCache
from .microbatch import MicroBatch


class Decoder:
    """Reads a text bit by bit, and predicts the next token after each bit.

    Tensor ranks make the same calls together. What a mechanism decides by the length of the
    document (InfLLM-V2's `dense_below`) it decides by `length`, so that the text reads the same in
    one pass or in many.

    Args:
        engine: The model; it is set to evaluate.
        length: Tokens that the text will have in the end.

    Raises:
        LongspanError: The stage's layout or attention cannot generate.
    """

    def __init__(self, engine: Engine, length: int) -> None:
        parallel = engine.stage.parallel
        if parallel.pipeline > 1 or parallel.context > 1 or parallel.sequence:
            raise LongspanError(
                "text is generated without pipeline, context and sequence parallelism",
                fix="load the checkpoint in a stage with parallel: {tensor: N} at most",
            )
        self.engine, self.length, self.tokens = engine, length, 0
        self._cache = KeyCache()

    @torch.no_grad()
    def read(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Logits [T, V] after each of the next tokens.

        Args:
            tokens_T: int64, on any device.

        Raises:
            ValueError: More tokens than `length`.
        """
        if self.tokens + len(tokens_T) > self.length:
            raise ValueError(f"{self.tokens + len(tokens_T)} tokens of a text of {self.length}")
        with _evaluating(self.engine):
            logits_TV = self.engine.model.logits(self._batch(tokens_T))
        self.tokens += len(tokens_T)
        return logits_TV

    def _batch(self, tokens_T: torch.Tensor) -> MicroBatch:
        engine, device = self.engine, self.engine.device
        rows_T = torch.arange(self.tokens, self.tokens + len(tokens_T))
        total = self.tokens + len(tokens_T)
        rope = Rope(engine.stage.rope, engine.stage.length)
        context = Context(
            cp=Exchange(Local()),
            documents=Documents([0, total], rows_T, self.length),
            rope=rope,
            positions_T=rows_T.to(device),
            positions_S=torch.arange(total, device=device),
            weights_T=torch.zeros(len(rows_T), device=device),
            notes=Notes(),
        )
        return MicroBatch(
            qkv_format="thd",
            attention=context,
            nope_layers=rope.settings.nope_layers,
            tokens_R=tokens_T.to(device),
            cache=self._cache,
        )


def generate(engine: Engine, prompt_T: torch.Tensor, count: int) -> torch.Tensor:
    """The most probable continuation of a prompt, token by token, int64 [count] on the host.

    Args:
        engine: The model.
        prompt_T: Tokens, at least one.
        count: Tokens to generate.

    Raises:
        LongspanError: The stage's layout or attention cannot generate.
    """
    decoder, found = Decoder(engine, len(prompt_T) + count), []
    tokens_T = prompt_T
    for _ in range(count):
        tokens_T = decoder.read(tokens_T)[-1:].argmax(-1)
        found.append(tokens_T.cpu())
    return torch.cat(found) if found else prompt_T[:0].cpu()


@contextmanager
def _evaluating(engine: Engine) -> Iterator[None]:
    training = engine.model.training
    engine.model.eval()
    try:
        yield
    finally:
        engine.model.train(training)
