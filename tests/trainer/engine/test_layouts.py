"""Every parallel layout computes what one rank computes: losses and gradient norms of 4 steps."""

import pytest
import torch
from longspan.trainer.engine.engine import Engine
from longspan.trainer.evaluation import local_part
from support.cases import train
from support.grid import sample
from support.mechanism_cases import MECHANISMS
from support.tiny import VOCAB, random_sample, tiny_run

LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "cp2_ring": (2, {"context": 2, "exchange": "ring"}),
    "cp2_all_gather": (2, {"context": 2, "exchange": "all_gather"}),
    "cp2_contiguous": (2, {"context": 2, "layout": "contiguous"}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "cp2_tp2_sp": (4, {"context": 2, "tensor": 2, "sequence": True}),
    "cp2_tp2": (4, {"context": 2, "tensor": 2}),
}


def relative(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> float:
    """Largest relative difference over losses and norms."""
    return max(
        abs(a - b) / abs(b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def one_rank(worlds):
    return worlds(1).run(train, tiny_run())[0]


@pytest.mark.parametrize("name", sample("layouts", LAYOUTS, 6))
def test_layout_equals_one_rank(worlds, one_rank, name):
    ranks, parallel = LAYOUTS[name]
    found = worlds(ranks).run(train, tiny_run(stage__parallel=parallel))
    assert all(result == found[0] for result in found), "ranks disagree on the global sums"
    assert relative(found[0], one_rank) < 1e-5


# Nothing divides 61 tokens: some ranks have spare rows.
ODD = 61
ODD_LAYOUTS = {
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "cp2_zigzag": (2, {"context": 2}),
    "cp2_striped": (2, {"context": 2, "layout": "striped", "exchange": "ring"}),
    "cp4_contiguous": (4, {"context": 4, "layout": "contiguous"}),
    "cp4_balanced": (4, {"context": 4, "layout": "balanced", "exchange": "ring"}),
    "cp2_tp2_sp": (4, {"context": 2, "tensor": 2, "sequence": True, "layout": "balanced"}),
    "cp2_pp2": (4, {"context": 2, "pipeline": 2, "layout": "balanced"}),
}


@pytest.fixture(scope="module")
def odd_one_rank(worlds):
    return worlds(1).run(train, tiny_run(ODD))[0]


@pytest.mark.parametrize("name", ODD_LAYOUTS)
def test_a_length_that_nothing_divides_equals_one_rank(worlds, odd_one_rank, name):
    ranks, parallel = ODD_LAYOUTS[name]
    # Sequences that are joined in one micro-batch are laid out together.
    width = 2 if ranks == 4 else 1
    run = tiny_run(ODD, stage__parallel=parallel, stage__micro_batch=width)
    found = worlds(ranks).run(train, run)
    assert all(result == found[0] for result in found), "ranks disagree on the global sums"
    assert relative(found[0], odd_one_rank) < 1e-5


@pytest.mark.parametrize(("exchange", "mechanism"), [("ring", "dense"), ("all_gather", "ssa")])
def test_a_rank_may_own_nothing(worlds, exchange, mechanism):
    attention = {"stage__attention": MECHANISMS[mechanism]}
    expected = worlds(1).run(train, tiny_run(3, **attention))[0]
    split = {"context": 4, "exchange": exchange}
    found = worlds(4).run(train, tiny_run(3, stage__parallel=split, **attention))
    assert relative(found[0], expected) < 1e-5


def losses_by_position(run, lengths):
    """Of a sample of each length the positions of this rank's tokens, and their losses."""
    engine = Engine(run, run.stages[0], VOCAB, train=False)
    found = []
    for length in lengths:
        sample = random_sample(length, length, min(3, length))
        index_T, losses_T = engine.place(sample).index_T, engine.losses(sample)
        assert torch.equal(local_part(engine, sample, torch.arange(length)), index_T)
        assert losses_T is None or len(losses_T) == len(index_T)
        found.append((index_T.tolist(), None if losses_T is None else losses_T.tolist()))
    return found


@pytest.mark.parametrize("name", ["tp2_sp", "cp2_striped", "cp4_balanced", "cp2_tp2_sp", "cp2_pp2"])
def test_losses_are_those_of_their_tokens(worlds, name):
    lengths = [ODD, 3, 10]
    want = worlds(1).run(losses_by_position, tiny_run(ODD), lengths)[0]
    ranks, parallel = ODD_LAYOUTS[name]
    found = worlds(ranks).run(losses_by_position, tiny_run(ODD, stage__parallel=parallel), lengths)
    for number, length in enumerate(lengths):
        index_T, losses_T = want[number]
        assert index_T == list(range(length)) and len(losses_T) == length
        together = {}
        for rank in found:
            for at, loss in zip(*rank[number], strict=True) if rank[number][1] is not None else ():
                assert loss == pytest.approx(losses_T[at], rel=1e-5)
                together[at] = loss
        assert sorted(together) == index_T


MOE = {"experts": 4, "top_k": 2, "aux_loss": 0.01}
# The load-balancing loss is most of the gradient.
HEAVY_MOE = {**MOE, "aux_loss": 1.0}
MOE_LAYOUTS = {
    "ep2": (2, {"expert": 2}),
    "cp2_ep2": (2, {"expert": 2, "context": 2}),
    "pp2": (2, {"pipeline": 2}),
    # With EP 1 megatron does not sum the experts' gradients over the tensor ranks by itself.
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "tp2_sp_ep2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
}


@pytest.fixture(scope="module")
def moe_one_rank(worlds):
    return worlds(1).run(train, tiny_run(model__moe=MOE))[0]


@pytest.mark.parametrize("name", sample("layouts of experts", MOE_LAYOUTS, 3))
def test_moe_layout_equals_one_rank(worlds, moe_one_rank, name):
    ranks, parallel = MOE_LAYOUTS[name]
    found = worlds(ranks).run(train, tiny_run(stage__parallel=parallel, model__moe=MOE))
    assert relative(found[0], moe_one_rank) < 1e-5


ODD_MOE_LAYOUTS = {
    "cp2_ep2": (2, {"expert": 2, "context": 2}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "cp2_tp2_sp_ep2": (4, {"context": 2, "tensor": 2, "sequence": True, "expert": 2}),
}


@pytest.fixture(scope="module")
def odd_moe_one_rank(worlds):
    return worlds(1).run(train, tiny_run(ODD, model__moe=HEAVY_MOE))[0]


@pytest.mark.parametrize("name", ODD_MOE_LAYOUTS)
def test_spare_rows_do_not_count_for_the_router(worlds, odd_moe_one_rank, name):
    ranks, parallel = ODD_MOE_LAYOUTS[name]
    recompute = "full" if name == "tp2_sp" else "none"
    run = tiny_run(ODD, recompute=recompute, stage__parallel=parallel, model__moe=HEAVY_MOE)
    assert relative(worlds(ranks).run(train, run)[0], odd_moe_one_rank) < 1e-5


VARIANTS = {
    "untied": {"model__tied_embeddings": False},
    "qkv_bias": {"model__qkv_bias": True},
    "recompute": {"recompute": "full"},
    "micro_batch": {"stage__micro_batch": 2},
    # Numbered over the whole model: each pipeline rank has one of these layers.
    "nope": {"stage__rope": {"nope_layers": [0, 3], "rotary_share": 0.5}},
}


@pytest.mark.parametrize("name", sample("variants", VARIANTS, 3))
def test_variant_splits_too(worlds, name):
    change = VARIANTS[name]
    expected = worlds(1).run(train, tiny_run(**change))[0]
    split = {"tensor": 2, "pipeline": 2}
    found = worlds(4).run(train, tiny_run(stage__parallel=split, **change))
    assert relative(found[0], expected) < 1e-5


def test_the_induction_start_is_the_same_on_every_layout(worlds):
    # One step only: heads as sharp as these turn rounding into other steps soon.
    heads = {"init": "induction", "qkv_bias": True, "qk_norm": False, "head_dim": 16}
    expected = worlds(1).run(train, tiny_run(model=heads), 1)[0]
    split = {"tensor": 2, "pipeline": 2}
    found = worlds(4).run(train, tiny_run(model=heads, stage__parallel=split), 1)
    assert relative(found[0], expected) < 1e-5


def test_recompute_and_micro_batches_change_nothing(worlds, one_rank):
    for change in ({"recompute": "full"}, {"stage__micro_batch": 2}):
        found = worlds(1).run(train, tiny_run(**change))[0]
        assert relative(found, one_rank) < 1e-5
