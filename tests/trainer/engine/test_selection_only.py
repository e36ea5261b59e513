"""Stages in which only what selects keys learns, and what tensor ranks hold twice."""

from itertools import product

import pytest
import torch
from longspan.trainer.engine.checkpoint import load_engine, save_engine
from longspan.trainer.engine.engine import Engine
from longspan.trainer.engine.partition import global_names
from support.cases import batches, take_step
from support.grid import sample
from support.mechanism_cases import MECHANISMS, SEER
from support.tiny import VOCAB, tiny_run

CASES = {
    "seer_token": {"mechanism": SEER["token"]},
    "seer_block": {"mechanism": SEER["block"]},
    "warm_up": MECHANISMS["indexer_warm_up"],
    "chosen": MECHANISMS["indexer_by_kv_head"],
    "some_layers": {"layers": [{"layers": [1], "mechanism": SEER["token"]}], "sinks": True},
}
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
}


def settings(name, **changes):
    return tiny_run(stage__attention=CASES[name], stage__trainable="selection", **changes)


def selection(engine):
    return [p for p in engine.model.parameters() if getattr(p, "selects", False)]


def learn(run, steps=5):
    """Model loss, auxiliary loss and gradient norm of the first steps, on two batches in turn."""
    engine = Engine(run, run.stages[0], VOCAB)
    found = []
    for step in range(steps):
        given = batches(engine, step % 2)
        sums = engine.train_step(given, 1e-2, False, ("test", step))
        host, (noted,) = sums.on_host(), sums.noted().values()
        found.append((host["loss"] / host["tokens"], noted, host["square_norm"] ** 0.5))
    return found


def check_frozen(name, folder):
    """The model stands still bit by bit, its moments too; the selection moves."""
    dense = tiny_run(stage__attention={k: v for k, v in CASES[name].items() if k == "sinks"})
    engine = Engine(dense, dense.stages[0], VOCAB)
    take_step(engine, 0)
    save_engine(engine, folder)
    engine = Engine(settings(name), settings(name).stages[0], VOCAB)
    load_engine(engine, folder, optimizer=True)
    chosen = selection(engine)
    optimizer = engine.optimizer

    def state():
        return {
            model: [model.detach().clone(), *(x.clone() for x in [main, *held.values()])]
            for model, main, held, _ in optimizer.shards()
        }

    before = state()
    assert 0 < len(chosen) < len(before)
    for step in (1, 2):
        take_step(engine, step)
    moved = 0
    for model, now in state().items():
        same = all(torch.equal(a, b) for a, b in zip(before[model], now, strict=True))
        assert same != any(model is p for p in chosen)
        moved += not same
    assert moved == len(chosen)


@pytest.mark.parametrize("name", CASES)
def test_the_model_stands_still(worlds, tmp_path, name):
    (tmp_path / "shards").mkdir()
    worlds(1).run(check_frozen, name, tmp_path / "shards")


@pytest.mark.parametrize("name", sample("layouts of selections", CASES, 3))
def test_every_layout_and_recompute_equal_one_rank(worlds, name):
    want = worlds(1).run(learn, settings(name))[0]
    assert worlds(1).run(learn, settings(name, recompute="full"))[0] == want
    assert want[-1][1] < want[0][1], "nothing is learned"
    for layout, (ranks, parallel) in LAYOUTS.items():
        found = worlds(ranks).run(learn, settings(name, stage__parallel=parallel))
        assert all(result == found[0] for result in found), layout
        for one, other in zip(found[0], want, strict=True):
            assert one == pytest.approx(other, rel=1e-5), layout


def replicated(name, parallel, steps):
    """Every parameter that this tensor rank shares with the others, after some steps."""
    run = tiny_run(stage__attention=MECHANISMS[name], stage__parallel=parallel)
    engine = Engine(run, run.stages[0], VOCAB)
    for step in range(steps):
        take_step(engine, step)
    return {
        key: parameter.detach().clone()
        for key, parameter in global_names(engine.model)
        if not getattr(parameter, "tensor_model_parallel", False)
    }


SHARED = list(product(["indexer", "indexer_by_kv_head", "nsa_token_gate"], [False, True]))


@pytest.mark.parametrize(("name", "sequence"), sample("tensor ranks share", SHARED, 2))
def test_what_tensor_ranks_share_stays_bit_equal(worlds, name, sequence):
    parallel = {"tensor": 2, "sequence": sequence}
    one, other = worlds(2).run(replicated, name, parallel, 20)
    assert len(one) > 8 and any("self_attention.attention." in key for key in one)
    for key, parameter in one.items():
        assert torch.equal(parameter, other[key]), key
