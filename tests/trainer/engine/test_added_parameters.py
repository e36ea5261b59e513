"""A stage whose attention adds parameters: old ones and their moments stay, new ones join."""

import pytest
import torch
from longspan.trainer.engine.checkpoint import load_engine, save_engine
from longspan.trainer.engine.engine import Engine
from longspan.trainer.engine.partition import global_names, is_added
from support.cases import take_step
from support.tiny import VOCAB, tiny_run

SSA = {"mechanism": {"kind": "ssa", "block": 4, "count": 3}, "sinks": False}
PP2 = {"pipeline": 2}


def everything(engine):
    """Weight, moments and step count of each parameter of the only rank, by global name."""
    optimizer = engine.optimizer
    names = {parameter: name for name, parameter in global_names(engine.model)}
    held = {}
    for model, main, state, _ in optimizer.shards():
        moments = [state[key].clone() for key in ("exp_avg", "exp_avg_sq")] if state else []
        step = int(state["step"]) if state else None
        held[names[model]] = (model.detach().clone(), main.detach().clone(), *moments, step)
    return held


def same(one, other):
    """Whether weights, moments and steps are bit-equal."""
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def joined(folder, added, **layout):
    """Two dense steps, then a stage with more parameters; before and after its own two steps."""
    dense = tiny_run(**layout)
    engine = Engine(dense, dense.stages[0], VOCAB)
    for step in range(2):
        take_step(engine, step)
    before = everything(engine)
    save_engine(engine, folder)
    run = tiny_run(stage__attention=added, **layout)
    engine = Engine(run, run.stages[0], VOCAB)
    fresh = {n: p.detach().clone() for n, p in global_names(engine.model) if is_added(n)}
    new = load_engine(engine, folder, optimizer=True)
    return before, fresh, everything(engine), new, engine


def check_joined(folder, added):
    before, fresh, after, new, engine = joined(folder, added)
    assert fresh and len(new) == len(fresh), (new, list(fresh))
    assert set(after) == set(before) | set(fresh)
    for name, held in after.items():
        if name in before:
            assert same(held, before[name]), name
        else:
            weight, main, *moments, step = held
            assert torch.equal(weight, fresh[name]) and torch.equal(main, weight.flatten()), name
            assert step == 0 and not any(bool(x.any()) for x in moments), name
    take_step(engine, 2)
    steps = {name: held[-1] for name, held in everything(engine).items()}
    assert {steps[name] for name in before} == {3} and {steps[name] for name in fresh} == {1}


def check_resumed(folder, added, trainable="all"):
    """A checkpoint with parameters of two ages goes on as if nothing had happened."""
    changes = {"stage__attention": added, "stage__trainable": trainable}
    *_, engine = joined(folder / "dense", added)
    if trainable != "all":
        run = tiny_run(**changes)
        engine = Engine(run, run.stages[0], VOCAB)
        load_engine(engine, folder / "dense", optimizer=True)
    take_step(engine, 2)
    save_engine(engine, folder / "both")
    want = [take_step(engine, step) for step in (3, 4)]
    held = everything(engine)
    run = tiny_run(**changes)
    engine = Engine(run, run.stages[0], VOCAB)
    assert load_engine(engine, folder / "both", optimizer=True) == []
    assert [take_step(engine, step) for step in (3, 4)] == want
    assert all(same(held[name], now) for name, now in everything(engine).items())


def losses_after(folder, added, **layout):
    """Losses after a checkpoint of dense steps, under any layout."""
    run = tiny_run(stage__attention=added, **layout)
    engine = Engine(run, run.stages[0], VOCAB)
    load_engine(engine, folder, optimizer=True)
    return [take_step(engine, step) for step in (2, 3)]


ADDED = {
    "ssa": SSA,
    "gate_and_sinks": {"output_gate": "head", "sinks": True},
    "some_layers": {"layers": [{"last": 1, "mechanism": SSA["mechanism"]}]},
}


@pytest.fixture(params=ADDED)
def added(request):
    return ADDED[request.param]


def folder_of(tmp_path, name):
    path = tmp_path / name
    path.mkdir(parents=True)
    return path


def test_old_parameters_are_bit_equal_and_new_ones_start_by_seed(worlds, tmp_path, added):
    worlds(1).run(check_joined, folder_of(tmp_path, "shards"), added)


def test_killed_and_resumed_with_parameters_of_two_ages(worlds, tmp_path, added):
    for name in ("dense", "both"):
        folder_of(tmp_path, name)
    worlds(1).run(check_resumed, tmp_path, added)


def test_any_layout_adds_the_same_parameters(worlds, tmp_path):
    path = folder_of(tmp_path, "shards")
    worlds(1).run(save_dense, path)
    want = worlds(1).run(losses_after, path, SSA)[0]
    for layout in ({"tensor": 2}, {"pipeline": 2}):
        found = worlds(2).run(losses_after_layout, path, SSA, layout)[0]
        for one, other in zip(found, want, strict=True):
            assert one == pytest.approx(other, rel=1e-5), layout


def save_dense(folder):
    run = tiny_run()
    engine = Engine(run, run.stages[0], VOCAB)
    for step in range(2):
        take_step(engine, step)
    save_engine(engine, folder)


def losses_after_layout(folder, added, parallel):
    return losses_after(folder, added, stage__parallel=parallel)


def test_a_stage_without_them_drops_them(worlds, tmp_path):
    for name in ("dense", "added"):
        folder_of(tmp_path, name)
    worlds(1).run(check_dropped, tmp_path)


def check_dropped(folder):
    *_, engine = joined(folder / "dense", SSA)
    take_step(engine, 2)
    save_engine(engine, folder / "added")
    held = everything(engine)
    run = tiny_run()
    engine = Engine(run, run.stages[0], VOCAB)
    assert load_engine(engine, folder / "added", optimizer=True) == []
    now = everything(engine)
    assert not any(is_added(name) for name in now)
    assert all(same(held[name], state) for name, state in now.items())
