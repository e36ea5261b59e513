"""The proof of context against its definition, on one rank and split."""

import numpy as np
import pytest
import torch
from longspan.trainer.data.samples import LongDocuments, Sample
from support.tiny import LENGTH, VOCAB, tiny_run

VISIBLE = 16
STEP = 8
COUNT = 3


class Documents:
    """Random documents, longer than the stage's length."""

    def __init__(self):
        self.texts = np.random.default_rng(0).integers(0, VOCAB, (COUNT, LENGTH + 1))
        self.lengths = np.full(COUNT, LENGTH + 1)

    def read(self, document, start, length):
        return self.texts[document, start : start + length]


def proof(run):
    from longspan.trainer.context_proof import context_proof
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB, train=False)
    long = LongDocuments(Documents(), LENGTH, COUNT)
    return context_proof(engine, [long[i] for i in range(COUNT)], VISIBLE)


def naive_proof(run):
    """Mean losses of each document's tokens from VISIBLE on: whole text, cut text; by bucket."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB, train=False)

    def losses(text):
        tokens, labels = torch.from_numpy(text[:-1]), torch.from_numpy(text[1:])
        bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
        sample = Sample(tokens, labels, torch.ones(len(tokens)), bounds)
        with torch.no_grad():
            logits = engine.model.logits(engine.build(sample)).double()
        return -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]

    full, cut = [], []
    for text in Documents().texts:
        full.append(losses(text))
        # Blocks of STEP tokens, each from a text that begins VISIBLE - 1 tokens before it.
        blocks = [
            losses(text[at - VISIBLE + 1 : at + STEP + 1])[-STEP:]
            for at in range(VISIBLE, LENGTH, STEP)
        ]
        cut.append(torch.cat(blocks))
    return torch.stack(full), torch.stack(cut)


@pytest.fixture(scope="module")
def expected(worlds):
    return worlds(1).run(naive_proof, tiny_run())[0]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"context": 2}),
        (2, {"pipeline": 2}),
        (2, {}),
        (2, {"tensor": 2}),
        # 64 tokens over 3 ranks leave 2 spare rows.
        (3, {"context": 3, "layout": "balanced"}),
    ],
    ids=str,
)
def test_the_proof_is_its_definition_on_every_layout(worlds, expected, ranks, parallel):
    found = worlds(ranks).run(proof, tiny_run(stage__parallel=parallel))
    assert all(result == found[0] for result in found)
    full, cut = expected
    gain = cut.mean(1) - full[:, VISIBLE:].mean(1)
    result = found[0]["gain"]
    assert result["full"] == pytest.approx(float(full[:, VISIBLE:].mean()), abs=1e-6)
    assert result["visible_only"] == pytest.approx(float(cut.mean()), abs=1e-6)
    assert result["gain"] == pytest.approx(float(gain.mean()), abs=1e-6)
    assert result["standard_error"] == pytest.approx(float(gain.std() / COUNT**0.5), abs=1e-6)
    assert (result["documents"], result["visible"]) == (COUNT, VISIBLE)
    assert result["visible_most"] == VISIBLE + STEP - 1
    for bucket in found[0]["buckets"]:
        span = full[:, bucket["first"] : bucket["last"]]
        assert bucket["tokens"] == span.numel()
        assert bucket["loss"] == pytest.approx(float(span.mean()), abs=1e-6)
