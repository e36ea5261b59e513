"""Counted pairs are those that the mechanisms visit, and FLOPs follow from them."""

from dataclasses import replace
from itertools import pairwise
from timeit import repeat

import pytest
import torch
from longspan.attention.catalogue import ENTRIES
from longspan.attention.cost import Cost, attention_cost
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.pairs import budget, dense, prefix_pairs, visible_pairs, windows_seen
from longspan.attention.parameters import LayerShape
from longspan.parallel.exchange import Exchange, Local
from support.mechanisms import context, inputs, make, site

SHAPE = LayerShape(hidden=12, heads=4, groups=2, dim=8)
LENGTHS = [1, 3, 7, 8, 9, 31, 32, 33, 50, 64]
NSA = {"kind": "nsa", "block": 8, "count": 4, "window": 5, "compress_length": 8,
       "compress_stride": 4, "compress": "mean"}  # fmt: skip
INFLLM = {"kind": "infllm_v2", "block": 8, "count": 2, "local": 2, "compress_length": 8,
          "compress_stride": 4, "dense_below": 0}  # fmt: skip
INDEX = {"kind": "indexer", "dim": 8, "count": 7}
BLOCK_INDEX = {**INDEX, "block": 8, "count": 2, "local": 1, "share": "kv_head"}
SEER = {"kind": "seer", "dim": 8, "block": 8, "count": 3}
MECHANISMS = [
    {"kind": "dense"},
    {"kind": "window", "window": 5},
    {"kind": "window", "window": 5, "first": 3},
    {"kind": "window", "window": 2, "first": 9},
    NSA,
    {**NSA, "initial": 0, "local": 1, "count": 1, "compress_stride": 8, "window": 64},
    INFLLM,
    {**INFLLM, "count": 0, "initial": 0, "local": 1},
    {**INFLLM, "dense_below": 50},
    {"kind": "ssa", "block": 4, "count": 3},
    {"kind": "moba", "block": 8, "count": 3},
    {"kind": "moba", "block": 5, "count": 1},
    {"kind": "sharded_heads", "block": 4, "local": 2, "stride": 3},
    {"kind": "sharded_heads", "block": 3, "local": 1, "stride": 4},
    {"kind": "sharded_heads", "block": 3, "local": 1, "stride": 2, "shard_by": "kv_head"},
    SEER,
    {**SEER, "form": "block", "evaluate": "dense"},
    INDEX,
    {**INDEX, "attend": "dense"},
    {**INDEX, "count": 16, "hisa": {"block": 8, "budget": 4}},
    BLOCK_INDEX,
]


def settings_of(raw):
    return AttentionSettings.model_validate({"mechanism": raw}).mechanism


class Counting(Exchange):
    """Counts the (query, key) pairs of all heads, mask by mask, and computes nothing."""

    pairs = 0

    def attend(self, q_THD, k_TGD, v_TGV, reach, blocks=None, **how):
        key_S = torch.arange(len(k_TGD))
        seen_TS = (key_S >= reach.first_T[:, None]) & (key_S < reach.last_T[:, None])
        chosen_TCS = seen_TS[:, None]
        if blocks is not None:
            block_S = torch.bucketize(key_S, blocks.grid.starts_B1, right=True) - 1
            chosen_TCS = (blocks.ids_QCN[..., None] == block_S).any(2)
            if blocks.query_starts is not None:
                chosen_TCS = chosen_TCS.repeat_interleave(blocks.query_starts.diff(), 0)
            chosen_TCS = chosen_TCS & seen_TS[:, None]
        self.pairs += int(chosen_TCS.sum()) * q_THD.shape[1] // chosen_TCS.shape[1]
        return torch.zeros_like(q_THD), q_THD.new_zeros(q_THD.shape[:2])


def visited(raw, cu, **changes) -> int:
    """The pairs that the mechanism itself visits."""
    where, counting = site(), Counting(Local())
    given, ctx = inputs(cu[-1], where), replace(context(cu, **changes), cp=counting)
    make(raw, where)(given.hidden, given.q, given.k, given.v, ctx)
    return counting.pairs


def counted(raw, cu, learning) -> float:
    lengths = [b - a for a, b in pairwise(cu)]
    return sum(visible_pairs(settings_of(raw), n, 4, 2, learning=learning) for n in lengths)


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("raw", MECHANISMS, ids=str)
def test_pairs_are_those_that_a_mechanism_visits(raw, learning):
    cu = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    changes = {} if learning else {"training": False, "learns": False}
    assert visited(raw, cu, **changes) == counted(raw, cu, learning)


def test_all_mechanisms_are_counted():
    assert {raw["kind"] for raw in MECHANISMS} == {entry.kind for entry in ENTRIES}


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_one_stream_of_ssa_is_a_mean_over_draws(share):
    raw, cu = {"kind": "ssa", "block": 4, "count": 3, "align": 0, "sparse_share": share}, [0, 50]
    draws = [visited(raw, cu, draw=lambda name, at=at: at) for at in (0, 0.3, 0.6, 0.9)]
    assert counted(raw, cu, True) == sum(draws) / 4
    raw |= {"evaluate_count": 5}
    evaluations = {"training": False, "learns": False}
    assert counted(raw, cu, False) == visited(raw, cu, **evaluations)
    raw |= {"evaluate": "full", "evaluate_count": None}
    assert counted(raw, cu, False) == visited(raw, cu, **evaluations) == 4 * dense(50)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_closed_forms(tokens):
    assert dense(tokens) == tokens * (tokens + 1) // 2
    for length, stride in ((8, 4), (8, 8), (5, 3), (1, 1)):
        starts = range(0, tokens - length + 1, stride)
        seen = sum(t >= start + length for start in starts for t in range(1, tokens + 1))
        assert windows_seen(tokens, length, stride) == seen


@pytest.mark.parametrize("raw", MECHANISMS, ids=str)
def test_longer_prefixes_have_no_fewer_pairs(raw):
    count = prefix_pairs([settings_of(raw)], 4, 2)
    pairs = [count(tokens) for tokens in range(80)]
    assert pairs[0] == 0 and all(one <= other for one, other in pairwise(pairs))


def test_prefixes_are_counted_over_all_layers():
    kinds = [settings_of(raw) for raw in (NSA, {"kind": "dense"}, NSA)]
    assert prefix_pairs(kinds, 4, 2)(50) == sum(visible_pairs(x, 50, 4, 2) for x in kinds) / 4


@pytest.mark.parametrize("raw", MECHANISMS, ids=str)
def test_within_the_budget_everything_is_seen(raw):
    """And one token more is too much, but for the branches of NSA, which are not only chosen."""
    settings = settings_of(raw)
    most = budget(settings)
    if most is None:
        pairs = [visible_pairs(settings, n, 4, 2, learning=False) for n in (4, 64)]
        assert raw["kind"] == "window" or pairs == [4 * dense(4), 4 * dense(64)]
        return
    own = 0 if raw["kind"] != "nsa" else None
    for tokens, everything in ((most, True), (most + 1, False)):
        pairs = visible_pairs(settings, tokens, 4, 2, learning=False)
        if own is None:
            near = {**raw, "kind": "window", "window": raw["window"]}
            window = {key: near[key] for key in ("kind", "window")}
            pairs -= visible_pairs(settings_of(window), tokens, 4, 2)
            length, stride = raw["compress_length"], raw["compress_stride"]
            pairs -= 4 * windows_seen(tokens, length, stride)
        elif raw["kind"] == "ssa" or raw["kind"] == "seer":
            assert visible_pairs(settings, tokens, 4, 2) >= 4 * dense(tokens)
        assert (pairs == 4 * dense(tokens)) is everything


def cost(raw, tokens, learning=True, **options) -> Cost:
    stage = AttentionSettings.model_validate({"mechanism": raw, **options})
    return attention_cost(stage, stage.mechanism, SHAPE, tokens, learning=learning)


def score(pairs: int) -> int:
    """All heads' scores of so many pairs of a query and a key."""
    return 2 * SHAPE.heads * SHAPE.dim * pairs


@pytest.mark.parametrize("n", [1, 31, 64])
def test_what_choosing_costs(n):
    seen = {(length, stride): windows_seen(n, length, stride)
            for length, stride in ((8, 4), (16, 8), (8, 8), (4, 4))}  # fmt: skip
    assert cost({"kind": "dense"}, n) == Cost(2 * score(dense(n)))
    assert cost({"kind": "window", "window": 5}, n).choice == 0
    assert cost(NSA, n).choice == score(seen[8, 4])
    assert cost({**INFLLM, "coarse": 2}, n).choice == score(seen[8, 4] + seen[16, 8])
    assert cost({**INFLLM, "coarse": 0}, n).choice == score(2 * seen[8, 4])
    assert cost({**INFLLM, "dense_below": n + 1}, n).choice == 0
    assert cost({"kind": "moba", "block": 8}, n).choice == score(seen[8, 8])
    ssa = {"kind": "ssa", "block": 4}
    assert cost(ssa, n).choice == score(2 * seen[4, 4])
    assert cost(ssa | {"align": 0, "sparse_share": 0}, n).choice == 0
    assert cost(ssa | {"evaluate": "full"}, n, learning=False).choice == 0


@pytest.mark.parametrize("n", [1, 31, 64])
def test_what_an_index_costs(n):
    # 4 index heads of 8 channels for one choice; 8 for two.
    token = 2 * 4 * 8
    projected = 2 * n * 12 * (4 * 8 + 8 + 4)
    warm, chosen = cost({**INDEX, "attend": "dense"}, n), cost(INDEX, n)
    assert warm.choice == score(dense(n)) and warm.learner == projected + token * dense(n)
    few = sum(min(t, 7) for t in range(1, n + 1))
    assert chosen.choice == token * dense(n) + score(few)
    assert chosen.learner == projected + token * few
    assert cost(INDEX, n, learning=False) == Cost(2 * score(few), projected + token * dense(n))
    assert cost({**INDEX, "attend": "dense"}, n, learning=False) == Cost(2 * score(dense(n)))
    hisa = cost({**INDEX, "hisa": {"block": 8, "budget": 2}}, n, learning=False)
    blocks = sum(-(-t // 8) for t in range(1, n + 1))
    inside = sum(min(t, t - t // 8 * 8 + 8 if t % 8 else 16) for t in range(1, n + 1))
    assert hisa.choice == projected + token * (blocks + inside)
    two = cost(BLOCK_INDEX, n, learning=False).choice
    assert two == 2 * n * 12 * (2 * 4 * 8 + 8 + 2 * 4) + 2 * token * dense(n)


@pytest.mark.parametrize("rows", [0.5, 1])
@pytest.mark.parametrize("n", [1, 31, 64])
def test_what_a_gate_costs(n, rows):
    raw, blocks = {**SEER, "rows": rows}, -(-n // 8)
    learns = [t for t in range(n) if t >= n - -(-n * rows // 1)]
    projected = 2 * (n * 4 * 8 * 8 + blocks * 2 * 3 * 8 * 8)
    token = cost(raw, n)
    assert token.choice == score(sum(t // 8 * 8 for t in learns))
    assert token.learner == projected + 2 * 2 * 8 * sum(t // 8 for t in learns)
    scored = 2 * 2 * 8 * sum(t // 8 for t in range(n))
    evaluated = cost(raw, n, learning=False)
    assert evaluated.choice == projected + scored and evaluated.learner == 0
    assert cost({**raw, "evaluate": "dense"}, n, learning=False).choice == 0
    threshold = {**raw, "evaluate": "threshold", "threshold": 0.1}
    assert cost(threshold, n, learning=False).choice == projected + 2 * scored
    block = cost({**raw, "form": "block"}, n)
    whole = [b for b in range(blocks) if b * 8 in learns]
    seen = sum(t + 1 for b in whole for t in range(b * 8, min(n, b * 8 + 8)))
    assert block.choice == score(seen)
    projected = 2 * (blocks * 4 * 8 * 8 + blocks * 2 * 3 * 8 * 8)
    assert block.learner == projected + 2 * 4 * 8 * sum(b + 1 for b in whole)


def test_what_parameters_cost():
    n, made = 64, 15
    plain = cost(NSA, n).model
    assert cost({**NSA, "gate": "token"}, n).model == plain - 2 * n * 12 * (12 - 3)
    independent = cost({**NSA, "branch_kv": "independent"}, n).model
    assert independent == plain + 2 * n * 12 * 4 * 2 * 8
    linear, mlp = (cost({**NSA, "compress": how}, n).model for how in ("linear", "mlp"))
    assert linear == plain + made * 2 * 2 * 2 * 8 * 8 * 8
    assert mlp == plain + made * 2 * 2 * 2 * (8 * 8 * 16 + 16 * 8)
    assert cost({**NSA, "compress": "mlp"}, 7).model == cost(NSA, 7).model
    dense_model = cost({"kind": "dense"}, n).model
    assert cost({"kind": "dense"}, n, output_gate="channel").model == dense_model + 2 * n * 12 * 32
    ssa = {"kind": "ssa", "align": 0, "sparse_share": 0}
    assert cost(ssa, n).model == dense_model + 2 * n * 12 * 4


def test_a_backward_costs_two_forwards():
    part = Cost(model=100, choice=10, learner=1)
    assert part.forward == 111
    assert part.training() == 313 and part.training(frozen=True) == 113


@pytest.mark.parametrize("raw", MECHANISMS, ids=str)
def test_a_million_tokens_take_no_time(raw):
    stage = AttentionSettings.model_validate({"mechanism": raw})
    shape = LayerShape(4096, 64, 8, 128)
    runs = repeat(lambda: attention_cost(stage, stage.mechanism, shape, 2**20), number=1, repeat=20)
    assert min(runs) < 1e-3
