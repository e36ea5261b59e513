"""A checkpoint goes on under every layout as the run that wrote it does, optimizer included."""

from pathlib import Path

import pytest
from support.cases import load_and_go_on, save_then_go_on, take_step
from support.grid import sample
from support.mechanism_cases import MECHANISMS, SEER
from support.tiny import VOCAB, tiny_run

STEPS = 3
LAYOUTS = {
    "one_rank": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
}
MOE = {"experts": 4, "top_k": 2}
MOE_LAYOUTS = {
    "one_rank": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, {"pipeline": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "ep2": (2, {"expert": 2}),
    "cp2_ep2": (2, {"context": 2, "expert": 2}),
    "tp2_sp_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
}
LARGE_LAYOUTS = {
    **LAYOUTS,
    "cp2_tp2": (4, {"context": 2, "tensor": 2}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
}


def assert_goes_on(worlds, folder, saved, loaded, layouts=LAYOUTS, **model):
    """Steps after a load under each layout equal those of the run that saved under one."""

    def under(name):
        ranks, parallel = layouts[name]
        return worlds(ranks), tiny_run(stage__parallel=parallel, **model)

    folder = folder / saved
    folder.mkdir()
    world, run = under(saved)
    expected = world.run(save_then_go_on, run, str(folder), STEPS)[0]
    for name in loaded:
        world, run = under(name)
        found = world.run(load_and_go_on, run, str(folder), STEPS)
        assert all(rank == found[0] for rank in found), "ranks disagree on the global sums"
        if name == saved:
            assert found[0] == expected, f"{name} is not bit-equal"
        for one, other in zip(found[0], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5), f"{saved} -> {name}"


@pytest.mark.parametrize("mechanism", ["dense", *sample("resharded", ["nsa", "ssa", "indexer"], 1)])
def test_context_ranks_go_on_under_any_layout(worlds, tmp_path, mechanism):
    model = {"stage__attention": MECHANISMS[mechanism]} if mechanism != "dense" else {}
    assert_goes_on(worlds, tmp_path, "cp2", LAYOUTS, **model)


@pytest.mark.parametrize("saved", sample("to context", ["one_rank", "dp2", "tp2", "pp2"], 2))
def test_any_layout_goes_on_under_context_ranks(worlds, tmp_path, saved):
    untied = {"model__tied_embeddings": False, "model__qkv_bias": True}
    assert_goes_on(worlds, tmp_path, saved, [saved, "cp2"], **untied)


def test_experts_go_on_under_any_layout(worlds, tmp_path):
    others = [name for name in MOE_LAYOUTS if name != "ep2"]
    loaded = ["ep2", *sample("experts under any layout", others, 3)]
    assert_goes_on(worlds, tmp_path, "ep2", loaded, MOE_LAYOUTS, model__moe=MOE)


@pytest.mark.parametrize("saved", sample("to experts", ["one_rank", "dp2", "pp2", "tp2_sp_ep2"], 2))
def test_any_layout_goes_on_with_experts_apart(worlds, tmp_path, saved):
    loaded = [saved, "ep2", "cp2_ep2"]
    assert_goes_on(worlds, tmp_path, saved, loaded, MOE_LAYOUTS, model__moe=MOE)


def test_four_ranks_split_two_ways_go_on_as_two_and_back(worlds, tmp_path):
    ways = {"cp2_tp2": ["cp2_tp2", "tp2_pp2", "cp2"], "cp2": ["cp2_tp2", "tp2_pp2"]}
    for saved, loaded in sample("four ranks", ways.items(), 1):
        assert_goes_on(worlds, tmp_path, saved, loaded, LARGE_LAYOUTS)


def test_main_weights_are_more_than_what_bf16_shows(worlds, tmp_path):
    assert_goes_on(worlds, tmp_path, "cp2", ["cp2"], precision="bf16")


def selection_then_all(run, folder: str, write: bool):
    """Steps of the whole model, after two in which its selection only learned; and all ages."""
    from longspan.trainer.engine.checkpoint import load_engine, save_engine
    from longspan.trainer.engine.engine import Engine

    stage = run.stages[0]
    if write:
        engine = Engine(run, stage.model_copy(update={"trainable": "selection"}), VOCAB)
        for step in range(2):
            take_step(engine, step)
        save_engine(engine, Path(folder))
    engine = Engine(run, stage, VOCAB)
    load_engine(engine, Path(folder), optimizer=True)
    assert engine.optimizer is not None
    ages = {(getattr(p, "selects", False), n) for p, n in engine.optimizer.steps().items()}
    return [take_step(engine, 2 + step) for step in range(STEPS)], ages


def test_parameters_of_different_ages_keep_them(worlds, tmp_path):
    seer = {"stage__attention": {"mechanism": SEER["token"]}}
    ((expected, _),) = worlds(1).run(selection_then_all, tiny_run(**seer), str(tmp_path), True)
    for ranks, parallel in LAYOUTS.values():
        run = tiny_run(stage__parallel=parallel, **seer)
        found = worlds(ranks).run(selection_then_all, run, str(tmp_path), False)
        assert set().union(*(ages for _, ages in found)) == {(True, 2), (False, 0)}
        for one, other in zip(found[0][0], expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5), parallel
