"""Reading a text bit by bit gives the logits of reading it at once, for every mechanism."""

import pytest
import torch
from longspan.errors import LongspanError
from longspan.trainer.data.samples import Sample
from longspan.trainer.engine.engine import Engine
from longspan.trainer.engine.generation import Decoder, generate
from support.mechanism_cases import MECHANISMS
from support.tiny import LENGTH, VOCAB, tiny_run


def at_once(engine, tokens):
    """Logits of the whole text in one pass."""
    length = len(tokens)
    sample = Sample(tokens, tokens, torch.ones(length), torch.tensor([0, length]))
    engine.model.eval()
    with torch.no_grad():
        return engine.model.logits(engine.build(sample))


def read_and_continue(attention, tensor=1):
    """Logits at once and bit by bit, then a continuation token by token, and each next best."""
    run = tiny_run(stage__attention=attention, stage__parallel={"tensor": tensor})
    engine = Engine(run, run.stages[0], VOCAB, train=False)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(0))
    want = at_once(engine, tokens)
    decoder = Decoder(engine, LENGTH)
    bits = [37, 1, 1, 9, *[1] * 16]
    found = torch.cat([decoder.read(bit) for bit in tokens.split(bits)])
    continued = generate(engine, tokens[:40], 5)
    text, best = tokens[:40], []
    for token in continued:
        padded = torch.cat([text, tokens[: 45 - len(text)]])
        best.append(int(at_once(engine, padded)[len(text) - 1].argmax()))
        text = torch.cat([text, token[None]])
    return want, found, continued.tolist(), best


@pytest.mark.parametrize("name", MECHANISMS)
def test_bit_by_bit_is_at_once(worlds, name):
    want, found, continued, best = worlds(1).run(read_and_continue, MECHANISMS[name])[0]
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
    assert len(best) == 5 and continued == best


def test_tensor_ranks_generate_together(worlds):
    for want, found, continued, best in worlds(2).run(read_and_continue, MECHANISMS["ssa"], 2):
        torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
        assert continued == best


def refused():
    """What a rank says of a layout that cannot generate."""
    run = tiny_run(stage__parallel={"context": 2})
    engine = Engine(run, run.stages[0], VOCAB, train=False)
    try:
        Decoder(engine, 10)
    except LongspanError as error:
        return error.what
    return None


def test_layouts_that_cannot_generate_are_refused(worlds):
    for what in worlds(2).run(refused):
        assert "without pipeline, context and sequence parallelism" in what
