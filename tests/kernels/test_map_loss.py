from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels.attend import attend
from longspan.kernels.attention_map import AttentionMap
from longspan.kernels.blocks import Blocks
from longspan.kernels.gate import Gate
from longspan.kernels.grid import Grid
from longspan.kernels.index_selection import select_tokens
from longspan.kernels.indexer import Index
from longspan.kernels.map_loss import gate_loss, index_loss
from longspan.kernels.query_groups import QueryGroups
from longspan.kernels.reach import Reach
from longspan.kernels.scoring import Scoring
from reference.attention import naive_attend
from reference.indexer import naive_block_scores, naive_index_scores
from reference.map_loss import naive_divergence, naive_map
from reference.visibility import chosen, visible_in
from support.accuracy import assert_as_good_as

F64 = torch.float64


@pytest.fixture(autouse=True)
def poison():
    """What was never written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, dtype=F64):
    return torch.randn(*shape, dtype=dtype)


def draw_target(reach, keys, heads, maps, dtype=F64, **more):
    q, k, v = (
        draw(n, h, 4, dtype=dtype) for n, h in zip((len(reach), keys, keys), heads, strict=False)
    )
    bounds = (visible_in(reach.first_T, reach.last_T, keys), 0.7, more.get("softcap"))
    lse = naive_attend(q, k, v, *bounds, key_bias_SH=more.get("key_bias_SH"))[1]
    folds = {name: more.pop(name) for name in ("over_heads", "over_keys") if name in more}
    lse = lse.to(F64 if dtype == F64 else torch.float32)
    return AttentionMap(q, k, lse, Scoring(0.7, **more), maps, **folds)


def draw_index(rows, keys, maps, key_heads=1, dtype=F64):
    q, k = draw(rows, maps, 3, 5, dtype=dtype), draw(keys, key_heads, 5, dtype=dtype)
    return Index(q, k, draw(rows, maps, 3, dtype=dtype), 0.6)


def visible_CTS(target, reach, over):
    """What each map may be about."""
    keys = len(target.k_SKD)
    seen = visible_in(reach.first_T, reach.last_T, keys).expand(target.maps, -1, -1)
    if isinstance(over, Grid):
        return seen
    group_T = torch.arange(len(reach)) if over.group_T is None else over.group_T.on(seen.device)
    return seen & chosen(over.ids_QCN, over.grid.starts_B1, group_T, target.maps, keys)


def naive_groups(x_CTB, sizes):
    """The largest entry over each group of rows, [C, Q, B]; 0 for an empty group."""
    parts = [part.amax(1) if part.shape[1] else part.sum(1) for part in x_CTB.split(sizes, dim=1)]
    return torch.stack(parts, dim=1)


def naive_loss(target, predictor, reach, over, weight_T, dtype=F64, groups=None):
    """Loss, weight and gradients of the twin."""
    grid = over.grid if isinstance(over, Blocks) else over
    visible = visible_CTS(target, reach, over)
    seen = naive_block_scores(visible.double(), visible, grid.starts_B1) > 0
    scoring = target.scoring
    mass = naive_map(
        target.q_THD, target.k_SKD, target.lse_TH, visible, grid.starts_B1, scoring.scale,
        scoring.softcap, scoring.key_bias_SH, (target.over_heads, target.over_keys), dtype,
    )  # fmt: skip
    if groups is not None:
        cuts = groups.starts_Q1.diff().tolist()
        mass = naive_groups(mass, cuts)
        seen = naive_groups(seen.double(), cuts) > 0
    with torch.enable_grad():
        if isinstance(predictor, Index):
            inputs = predictor.q_TCJD, predictor.k_SED, predictor.weight_TCJ
            leaves = [x.to(dtype).requires_grad_() for x in inputs]
            scores = naive_index_scores(*leaves, predictor.scale, dtype=dtype)
            scores = naive_block_scores(scores, visible, grid.starts_B1)
        else:
            leaves = [x.to(dtype).requires_grad_() for x in (predictor.q_TCD, predictor.k_BED)]
            k = leaves[1].expand(-1, target.maps, -1)
            scores = predictor.scale * torch.einsum("tcd,bcd->ctb", leaves[0], k)
        total, weight = naive_divergence(mass, scores, seen, weight_T)
        if not total.requires_grad:
            return total, weight, [torch.zeros_like(x) for x in leaves]
        return total.detach(), weight, torch.autograd.grad(total, leaves)


def loss(target, predictor, *args, **how):
    kernel = index_loss if isinstance(predictor, Index) else gate_loss
    return kernel(target, predictor, *args, **how)


def assert_equals_the_twin(target, predictor, reach, over, weight_T, **how):
    got, grads = loss(target, predictor, reach, over, weight_T, **how)
    groups = {"groups": how["groups"]} if "groups" in how else {}
    total, weight, wants = naive_loss(target, predictor, reach, over, weight_T, **groups)
    torch.testing.assert_close(got.total, total, atol=1e-10, rtol=1e-10)
    assert float(got.weight) == pytest.approx(weight, abs=1e-5)
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-10, rtol=1e-10)


@st.composite
def cases(draw_from):
    cu = torch.tensor([0, *draw_from(st.lists(st.integers(0, 18), min_size=1, max_size=4))])
    cu = cu.cumsum(0)
    keys = int(cu[-1])
    torch.manual_seed(draw_from(st.integers(0, 999)))
    reach = Reach.documents(cu, draw_from(st.none() | st.integers(1, 9)))
    if draw_from(st.booleans()):
        reach = reach.rows(torch.randperm(keys)[: draw_from(st.integers(0, keys))])
    if draw_from(st.booleans()):
        nothing = torch.rand(len(reach)) < 0.3
        reach = Reach(reach.first_T, reach.last_T.masked_fill(nothing, 0))
    groups, maps = draw_from(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 2), (2, 4), (4, 2)]))
    heads = max(groups, maps) * draw_from(st.integers(1, 3))
    more = {
        "softcap": draw_from(st.sampled_from([None, 2.0])),
        "key_bias_SH": draw_from(st.sampled_from([None, draw(keys, heads)])),
        "over_heads": draw_from(st.sampled_from(["sum", "max"])),
        "over_keys": draw_from(st.sampled_from(["sum", "max"])),
    }
    target = draw_target(reach, keys, (heads, groups, groups), maps, **more)
    grid = Grid.documents(cu, draw_from(st.sampled_from([1, 1, 3, 4])))
    weight = torch.rand(len(reach)) * (torch.rand(len(reach)) > 0.2)
    return target, reach, grid, weight


@st.composite
def choices(draw_from, reach, grid, maps):
    """Random blocks of a grid, some of them out of reach, of rows or of groups of rows."""
    if not draw_from(st.booleans()):
        return grid
    starts = None
    groups = len(reach)
    if draw_from(st.booleans()):
        starts = torch.arange(0, groups + 3, 3).clamp(max=groups)
        groups = len(starts) - 1
    block_heads = draw_from(st.sampled_from([1, maps]))
    ids = torch.randint(-1, max(1, len(grid)), (groups, block_heads, draw_from(st.integers(1, 6))))
    return Blocks.choose(ids if len(grid) else ids.fill_(-1), grid, starts)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_an_index(case, data):
    target, reach, grid, weight = case
    over = data.draw(choices(reach, grid, target.maps))
    key_heads = data.draw(st.sampled_from([1, target.maps]))
    index = draw_index(len(reach), len(target.k_SKD), target.maps, key_heads)
    elements = data.draw(st.sampled_from([1, 200, 2**22]))
    assert_equals_the_twin(target, index, reach, over, weight, elements=elements)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_gate(case, data):
    target, reach, grid, weight = case
    over = data.draw(choices(reach, grid, target.maps))
    key_heads = data.draw(st.sampled_from([1, target.maps]))
    gate = Gate(draw(len(reach), target.maps, 5), draw(len(grid), key_heads, 5), 0.4)
    elements = data.draw(st.sampled_from([1, 200, 2**22]))
    assert_equals_the_twin(target, gate, reach, over, weight, elements=elements)


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_a_gate_of_groups_of_queries(case, data):
    target, reach, grid, _ = case
    sizes = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=30))
    if data.draw(st.booleans()):
        sizes = sizes[:1] * len(sizes)
    starts = torch.tensor([0, *sizes, 99]).cumsum(0).clamp(max=len(reach))
    groups, count = QueryGroups(starts), len(starts) - 1
    weight = torch.rand(count) * (torch.rand(count) > 0.2)
    gate = Gate(draw(count, target.maps, 5), draw(len(grid), 1, 5), 0.4)
    how = {"groups": groups, "elements": data.draw(st.sampled_from([1, 200, 2**22]))}
    assert_equals_the_twin(target, gate, reach, grid, weight, **how)


CU = [0, 14, 14, 15, 40]


def fixed(dtype=F64, window=None, size=1, maps=1, **more):
    torch.manual_seed(2)
    reach, grid = Reach.documents(CU, window), Grid.documents(CU, size)
    target = draw_target(reach, 40, (4, 2, 2), maps, dtype, **more)
    return target, draw_index(40, 40, maps, dtype=dtype), reach, grid, torch.rand(40)


def test_rows_and_weights():
    target, index, reach, grid, weight = fixed(maps=2)
    got, _ = index_loss(target, index, reach, grid, weight)
    torch.testing.assert_close((got.rows_TC * weight[:, None]).sum(), got.total)
    # The first row of a document sees one key.
    assert not bool(got.rows_TC[[0, 14, 15]].any()) and bool((got.rows_TC[1:14] > 0).all())
    weight[[0, 14, 15]] = 0
    torch.testing.assert_close(got.weight, 2 * weight.double().sum())


def test_a_prediction_equal_to_the_target_costs_nothing():
    target, _, reach, grid, weight = fixed(maps=4)
    # One index head per query head without relu is the attention itself.
    q = target.q_THD.unsqueeze(2)
    k = target.k_SKD.repeat_interleave(2, dim=1)
    got, grads = index_loss(target, Index(q, k, None, 0.7, False), reach, grid, weight)
    assert abs(float(got.total)) < 1e-12
    assert all(float(x.abs().max()) < 1e-12 for x in grads if x is not None)


@pytest.mark.parametrize("size", [1, 5])
def test_the_chosen_of_a_sparse_attention(size):
    # The lse is then over the chosen keys too, and a choice of all keys is the dense loss.
    target, index, reach, grid, weight = fixed(size=size)
    tokens = select_tokens(index, reach, 6)
    over = tokens if size == 1 else Blocks.choose(torch.randint(0, len(grid), (40, 1, 3)), grid)
    v = draw(40, 2, 3)
    lse = attend(target.q_THD, target.k_SKD, v, reach, over, scale=0.7)[1]
    assert_equals_the_twin(replace(target, lse_TH=lse), index, reach, over, weight)
    everything = Blocks.choose(torch.arange(len(grid)).expand(40, 1, -1), grid)
    for a, b in zip(
        index_loss(target, index, reach, everything, weight)[1],
        index_loss(target, index, reach, grid, weight)[1],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("folds", [("sum", "sum"), ("sum", "max"), ("max", "sum"), ("max", "max")])
@pytest.mark.parametrize("chosen", [False, True])
def test_heads_on_two_tensor_ranks(folds, chosen):
    target, index, reach, grid, weight = fixed(size=4, over_heads=folds[0], over_keys=folds[1])
    over = Blocks.choose(torch.randint(0, len(grid), (40, 1, 5)), grid) if chosen else grid
    halves = [
        replace(target, q_THD=target.q_THD[:, h], k_SKD=target.k_SKD[:, h // 2],
                lse_TH=target.lse_TH[:, h])
        for h in (torch.tensor([0, 1]), torch.tensor([2, 3]))
    ]  # fmt: skip
    halves = [replace(x, k_SKD=x.k_SKD[:, :1]) for x in halves]
    sent = []
    first = replace(halves[0], reduce=lambda x: sent.append(x.clone()) or x)
    index_loss(first, index, reach, over, weight, elements=300)
    replies = iter(sent)
    fold = torch.add if folds[0] == "sum" else torch.maximum
    second = replace(halves[1], reduce=lambda x: fold(x, next(replies)))
    got, grads = index_loss(second, index, reach, over, weight, elements=300)
    want, want_grads = index_loss(target, index, reach, over, weight)
    assert len(sent) > 1 and next(replies, None) is None
    torch.testing.assert_close(got.total, want.total)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_it_loses_no_more_than_the_same_in_its_dtype(dtype, sparse):
    target, index, reach, over, weight = fixed(dtype, size=3, maps=2)
    if sparse:
        over = Blocks.choose(torch.randint(0, len(over), (40, 2, 4)), over)
    got, grads = index_loss(target, index, reach, over, weight)
    assert {x.dtype for x in (*got, *grads)} == {torch.float32}
    total, _, wants = naive_loss(target, index, reach, over, weight)
    bar, _, bars = naive_loss(target, index, reach, over, weight, dtype)
    pairs = [(got.total, total, bar), *zip(grads, wants, bars, strict=True)]
    for x, want, naive in pairs:
        assert_as_good_as(naive, x, want)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_depends_on_what_a_row_does_not_see(size, sparse):
    target, index, reach, over, weight = fixed(size=size, window=9)
    if sparse:
        over = Blocks.choose(torch.randint(0, len(over), (40, 1, 4)), over)
    got, grads = index_loss(target, index, reach, over, weight)
    changed = False
    for key in (0, 5, 13, 14, 22, 39):
        k, index_k = target.k_SKD.clone(), index.k_SED.clone()
        # Far beyond the lse: a weight that no mask hides would be infinite.
        k[key], index_k[key] = 1e3, 1e3
        there = replace(target, k_SKD=k), replace(index, k_SED=index_k)
        other, other_grads = index_loss(*there, reach, over, weight)
        blind = ~visible_CTS(target, reach, over)[0, :, key]
        assert torch.equal(other.rows_TC[blind], got.rows_TC[blind])
        assert torch.equal(other_grads.dq_TCJD[blind], grads.dq_TCJD[blind])
        changed |= not torch.equal(other_grads.dq_TCJD, grads.dq_TCJD)
    assert changed


def test_padding_weighs_nothing():
    target, index, reach, grid, weight = fixed(size=4)
    weight[7] = 0
    got, grads = index_loss(target, index, reach, grid, weight)
    q = index.q_TCJD.clone()
    q[7] = 3.0
    other, other_grads = index_loss(target, replace(index, q_TCJD=q), reach, grid, weight)
    assert torch.equal(got.total, other.total)
    assert torch.equal(grads.dk_SED, other_grads.dk_SED) and not bool(grads.dq_TCJD[7].any())


def test_a_target_that_underflowed_everywhere():
    target, index, reach, grid, weight = fixed(torch.float32)
    lse = target.lse_TH.clone()
    lse[20] = 1e4
    got, grads = index_loss(replace(target, lse_TH=lse), index, reach, grid, weight)
    assert float(got.rows_TC[20]) == 0 and not bool(grads.dq_TCJD[20].any())
    assert all(bool(x.isfinite().all()) for x in (*got, *grads))


def test_an_attention_that_saw_nothing_teaches_nothing():
    target, index, reach, grid, weight = fixed(size=4)
    lse = target.lse_TH.clone()
    lse[20] = float("-inf")
    got, grads = index_loss(replace(target, lse_TH=lse), index, reach, grid, weight)
    assert float(got.rows_TC[20]) == 0 and not bool(grads.dq_TCJD[20].any())


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_waits_for_the_device(sparse):
    # A meta tensor has no values: whatever asked for one would raise.
    def meta(*shape):
        return torch.empty(shape, device="meta")

    reach, over = Reach.documents(CU, 20), Grid.documents(CU, 4)
    gate = Gate(meta(40, 2, 5), meta(len(over), 1, 5), 1.0)
    if sparse:
        ids = torch.zeros(20, 2, 6, dtype=torch.int32, device="meta")
        over = Blocks(ids, over, torch.arange(0, 41, 2))
    target = AttentionMap(meta(40, 4, 5), meta(40, 2, 5), meta(40, 4), Scoring(1.0), 2)
    index = Index(meta(40, 2, 3, 5), meta(40, 1, 5), meta(40, 2, 3))
    for predictor in (index, gate):
        got, grads = loss(target, predictor, reach, over, meta(40))
        assert {x.device.type for x in (*got, *grads)} == {"meta"}


def test_shapes_that_contradict_each_other():
    target, index, reach, grid, weight = fixed(maps=2)
    with pytest.raises(ValueError, match="one per row"):
        index_loss(target, index, reach, grid, weight[1:])
    with pytest.raises(ValueError, match="cannot predict"):
        index_loss(replace(target, maps=1), index, reach, grid, weight)
    with pytest.raises(ValueError, match="index keys"):
        index_loss(target, replace(index, k_SED=index.k_SED[1:]), reach, grid, weight)
    with pytest.raises(ValueError, match="choices of"):
        over = Blocks.choose(torch.zeros(39, 2, 1, dtype=torch.int32), grid)
        index_loss(target, index, reach, over, weight)
    with pytest.raises(ValueError, match="gate keys"):
        gate_loss(target, Gate(draw(40, 2, 3), draw(4, 1, 3), 1.0), reach, grid, weight)
    gate = Gate(draw(10, 2, 3), draw(40, 1, 3), 1.0)
    fours = QueryGroups(torch.arange(0, 41, 4))
    gate_loss(target, gate, reach, grid, weight[:10], groups=fours)
    with pytest.raises(ValueError, match="per row or group"):
        gate_loss(target, gate, reach, grid, weight, groups=fours)
    with pytest.raises(ValueError, match="per row or group"):
        gate_loss(target, gate, reach, grid, weight[:10], groups=QueryGroups(fours.starts_Q1 // 2))
    with pytest.raises(ValueError, match="over choices"):
        gate_loss(target, gate, reach, over, weight[:10], groups=fours)
    with pytest.raises(ValueError, match="ascend"):
        QueryGroups(torch.tensor([0, 3, 2]))
    with pytest.raises(ValueError, match="a grid of"):
        index_loss(target, index, reach, Grid.documents([0, 41], 1), weight)
    with pytest.raises(ValueError, match="3 maps"):
        replace(target, maps=3)
    with pytest.raises(ValueError, match="lse"):
        replace(target, lse_TH=target.lse_TH[1:])
    with pytest.raises(ValueError, match="a gate wants"):
        Gate(draw(4, 2, 3), draw(4, 3, 3), 1.0)
