"""Every mechanism through megatron's own schedule: all layouts compute what one rank computes."""

from functools import cache

import pytest
from support.cases import train, train_and_resume
from support.grid import sample
from support.mechanism_cases import MECHANISMS
from support.tiny import tiny_run

LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "cp2": (2, {"context": 2, "exchange": "all_gather"}),
    "cp2_ring": (2, {"context": 2, "exchange": "ring", "layout": "contiguous"}),
}
ODD = 61


def relative(found, expected):
    """Largest relative difference over losses and norms."""
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) / abs(b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def alone(worlds):
    """`alone(name)` are the steps of a mechanism on one rank."""
    return cache(lambda name: worlds(1).run(train, tiny_run(stage__attention=MECHANISMS[name]))[0])


@pytest.mark.parametrize("name", sample("resumed mechanisms", MECHANISMS, 6))
def test_a_resumed_run_is_bit_equal(worlds, alone, tmp_path, name):
    run = tiny_run(stage__attention=MECHANISMS[name])
    (tmp_path / "shards").mkdir()
    assert worlds(1).run(train_and_resume, run, tmp_path / "shards") == [alone(name)]


@pytest.mark.parametrize("name", sample("layouts of mechanisms", MECHANISMS, 7))
def test_every_layout_and_recompute_equal_one_rank(worlds, alone, name):
    want = alone(name)
    again = worlds(1).run(train, tiny_run(stage__attention=MECHANISMS[name], recompute="full"))[0]
    assert relative(again, want) < 1e-6
    for layout, (ranks, parallel) in sample(f"layouts {name}", LAYOUTS.items(), 1):
        changed = tiny_run(stage__attention=MECHANISMS[name], stage__parallel=parallel)
        found = worlds(ranks).run(train, changed)
        assert all(result == found[0] for result in found), layout
        assert relative(found[0], want) < 1e-5, (layout, found[0], want)


EXCHANGES = ("auto", "all_gather", "ring", "fetch", "ulysses")
BESIDE = [
    (other, exchange, layout)
    for number, exchange in enumerate(EXCHANGES)
    for other in ("tensor", "pipeline")
    for layout in [("zigzag", "striped", "balanced", "contiguous")[number % 4]]
]


@pytest.mark.parametrize("name", sample("mechanisms for twenty steps", MECHANISMS, 2))
def test_twenty_steps_of_context_ranks_beside_others(worlds, name):
    """Recomputed, and one context rank has a spare row."""
    attention = {"stage__attention": MECHANISMS[name]}
    # A larger rate makes the last bit of a sum a percent of the loss in twenty steps.
    want = worlds(1).run(train, tiny_run(ODD, **attention), 20, 1e-3)[0]
    for other, exchange, layout in sample(name, BESIDE, 1):
        parallel = {other: 2, "context": 2, "exchange": exchange, "layout": layout}
        changed = tiny_run(ODD, **attention, recompute="full", stage__parallel=parallel)
        found = worlds(4).run(train, changed, 20, 1e-3)
        assert all(result == found[0] for result in found)
        assert relative(found[0], want) < 1e-5, (parallel, found[0], want)
