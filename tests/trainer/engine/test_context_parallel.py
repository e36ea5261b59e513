"""Twenty steps of two layers over context ranks, by every exchange, beside every other layout."""

import pytest
from longspan.tests.trainer.engine.test_layouts import HEAVY_MOE, ODD, relative
from support.cases import load_and_go_on, save_then_go_on, train
from support.grid import sample
from support.tiny import tiny_run

# Every step adds up the gradients of four micro-batches.
LAYOUTS = {
    "cp2": (2, {"context": 2}),
    "cp4_two_d": (4, {"context": 4, "exchange": "two_d", "inner": 2}),
    "cp4_two_d_gathered": (
        4,
        {"context": 4, "exchange": "two_d", "inner": 2, "across": "all_gather", "keep_keys": True},
    ),
    "cp4_double_ring": (4, {"context": 4, "exchange": "double_ring", "inner": 2}),
    "cp4_ulysses": (4, {"context": 4, "exchange": "ulysses", "layout": "contiguous"}),
    "cp4_fetch": (4, {"context": 4, "exchange": "fetch", "layout": "balanced"}),
    "cp4_kept": (4, {"context": 4, "exchange": "fetch", "layout": "striped", "keep_keys": True}),
    "cp2_tp2": (4, {"context": 2, "tensor": 2, "exchange": "ulysses"}),
    "cp2_pp2": (4, {"context": 2, "pipeline": 2, "exchange": "fetch"}),
    "cp4_tp2": (8, {"context": 4, "tensor": 2, "exchange": "fetch", "layout": "balanced"}),
    "cp4_pp2": (8, {"context": 4, "pipeline": 2, "exchange": "two_d", "inner": 2}),
}
EXPERTS = {
    "cp2_ep2": (2, {"context": 2, "expert": 2, "exchange": "ring"}),
    "cp4_ep2": (4, {"context": 4, "expert": 2, "exchange": "double_ring", "inner": 2}),
}


def small_run(**changes):
    return tiny_run(ODD, model__layers=2, **changes)


def twenty(worlds, ranks, **changes):
    # A larger rate makes the last bit of a sum a percent of the loss in twenty steps.
    found = worlds(ranks).run(train, small_run(**changes), 20, 1e-3)
    assert all(result == found[0] for result in found), "ranks disagree on the global sums"
    return found[0]


@pytest.fixture(scope="module")
def alone(worlds):
    return twenty(worlds, 1)


@pytest.mark.parametrize("name", sample("twenty steps", LAYOUTS, 3))
def test_twenty_steps_are_those_of_one_rank(worlds, alone, name):
    ranks, parallel = LAYOUTS[name]
    assert relative(twenty(worlds, ranks, stage__parallel=parallel), alone) < 1e-5


@pytest.mark.parametrize("name", sample("twenty steps of experts", EXPERTS, 1))
def test_experts_too(worlds, name):
    ranks, parallel = EXPERTS[name]
    want = twenty(worlds, 1, model__moe=HEAVY_MOE)
    found = twenty(worlds, ranks, model__moe=HEAVY_MOE, stage__parallel=parallel)
    assert relative(found, want) < 1e-5


@pytest.mark.parametrize("degrees", [(4, 2), (2, 4), (4, 1)])
def test_a_checkpoint_goes_on_over_another_number_of_context_ranks(worlds, tmp_path, degrees):
    before, after = degrees
    layouts = {1: {}, 2: {"context": 2}, 4: LAYOUTS["cp4_fetch"][1]}
    run = small_run(stage__parallel=layouts[before])
    want = worlds(before).run(save_then_go_on, run, str(tmp_path), 3)[0]
    run = small_run(stage__parallel=layouts[after])
    found = worlds(after).run(load_and_go_on, run, str(tmp_path), 3)[0]
    assert relative(found, want) <= 1e-5
