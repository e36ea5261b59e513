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
        return engine.model.logits(engine.builder(length)(sample))


def compare(attention, tensor=1):
    run = tiny_run(stage__attention=attention, stage__parallel={"tensor": tensor})
    engine = Engine(run, run.stages[0], VOCAB, train=False)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(0))
    want = at_once(engine, tokens)
    decoder = Decoder(engine, LENGTH)
    bits = [37, 1, 1, 9, *[1] * 16]
    found = torch.cat([decoder.read(bit) for bit in tokens.split(bits)])
    torch.testing.assert_close(found, want, atol=2e-5, rtol=1e-5)
    continued = generate(engine, tokens[:40], 5)
    text = tokens[:40]
    for token in continued:
        padded = torch.cat([text, tokens[: 45 - len(text)]])
        assert int(at_once(engine, padded)[len(text) - 1].argmax()) == int(token)
        text = torch.cat([text, token[None]])


@pytest.mark.parametrize("name", MECHANISMS)
def test_bit_by_bit_is_at_once(worlds, name):
    worlds(1).run(compare, MECHANISMS[name])


def test_tensor_ranks_generate_together(worlds):
    worlds(2).run(compare, MECHANISMS["ssa"], 2)


def refused():
    run = tiny_run(stage__parallel={"context": 2})
    engine = Engine(run, run.stages[0], VOCAB, train=False)
    with pytest.raises(LongspanError, match="without pipeline, context and sequence"):
        Decoder(engine, 10)


def test_layouts_that_cannot_generate_are_refused(worlds):
    worlds(2).run(refused)
