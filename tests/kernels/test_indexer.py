from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from longspan.kernels import index_selection
from longspan.kernels.grid import Grid
from longspan.kernels.index_selection import (
    select_index_blocks,
    select_tokens,
    select_tokens_in_blocks,
)
from longspan.kernels.indexer import Index, IndexGradients, add_index_gradients, index_scores
from longspan.kernels.reach import Reach
from longspan.kernels.running_top import RunningTop
from longspan.kernels.slots import Slots
from longspan.kernels.top import top_ids
from reference.indexer import naive_block_scores, naive_choice, naive_index_scores
from reference.visibility import visible_in
from support.memory import peak_growth

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def draw_index(rows, keys, heads=(1, 2), key_heads=1, dim=4, seed=0, whole=True, weighted=True):
    """Small whole numbers: products are exact in any order, and ties are the rule."""
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = values(rows, *heads) if weighted else None
    return Index(values(rows, *heads, dim), values(keys, key_heads, dim), weight, 0.5)


@st.composite
def cases(draw):
    cu = torch.tensor([0, *draw(LENGTHS)]).cumsum(0)
    keys, seed = int(cu[-1]), draw(st.integers(0, 999))
    reach = Reach.documents(cu, draw(st.none() | st.integers(1, 20)))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        reach = reach.rows(torch.randperm(keys, generator=generator)[: draw(st.integers(0, keys))])
    if draw(st.booleans()):
        nothing = torch.rand(len(reach), generator=torch.Generator().manual_seed(seed)) < 0.3
        reach = Reach(reach.first_T, reach.last_T.masked_fill(nothing, 0))
    heads = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    shape = {"heads": heads, "key_heads": draw(st.sampled_from([1, heads[0]])), "seed": seed}
    index = draw_index(len(reach), keys, weighted=draw(st.booleans()), **shape)
    return reach, Grid.documents(cu, draw(st.integers(1, 9))), index


def naive_scores(index, reach):
    visible_TS = visible_in(reach.first_T, reach.last_T, len(index.k_SED))[0]
    args = index.q_TCJD, index.k_SED, index.weight_TCJ, index.scale, index.relu
    return naive_index_scores(*args), visible_TS


def lists(blocks):
    ascending = blocks.ids_QCN.tolist()
    full = [[[b for b in choice if b >= 0] for choice in row] for row in ascending]
    width = blocks.ids_QCN.shape[2]
    padded = [[c + [-1] * (width - len(c)) for c in row] for row in full]
    assert padded == ascending  # -1 comes last
    return full


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Keys come in tiles of 8, so that every loop loops."""
    monkeypatch.setattr(index_selection, "TILE_KEYS", 8)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 50), st.sampled_from([1, 300, 2**22]))
def test_tokens_are_those_of_the_definition(case, count, elements):
    reach, _, index = case
    blocks = select_tokens(index, reach, count, elements=elements)
    scores_CTS, visible_TS = naive_scores(index, reach)
    want = naive_choice(scores_CTS.masked_fill(~visible_TS, float("-inf")), count)
    assert lists(blocks) == want
    assert blocks.grid.largest <= 1 and len(blocks.grid) == len(index.k_SED)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 9), st.data(), st.sampled_from([1, 300, 2**22]))
def test_blocks_are_those_of_the_definition(case, count, data, elements):
    reach, grid, index = case
    initial = data.draw(st.integers(0, min(2, count)))
    local = data.draw(st.integers(0, min(3, count - initial)))
    forced = {"initial": initial, "local": local}
    blocks = select_index_blocks(index, reach, grid, count, **forced, elements=elements)
    scores_CTB = naive_block_scores(*naive_scores(index, reach), grid.starts_B1)
    for row in range(len(reach)):
        seen = (scores_CTB[0, row] > float("-inf")).nonzero()[:, 0].tolist()
        for block in seen[:initial] + seen[len(seen) - local :]:
            scores_CTB[:, row, block] = float("inf")
    assert lists(blocks) == naive_choice(scores_CTB, count)


@settings(max_examples=80, deadline=None)
@given(cases(), st.integers(1, 50), st.sampled_from(["mean", "max"]), st.sampled_from([1, 2**22]))
def test_two_steps_choose_as_one_where_the_budget_covers_the_reach(case, count, pool, elements):
    reach, grid, index = case
    first_T, last_T = grid.span(reach)
    most = int((last_T - first_T).max()) if len(reach) else 0
    how = {"pool": pool, "elements": elements}
    two = select_tokens_in_blocks(index, reach, count, grid, max(2, most), **how)
    assert lists(two) == lists(select_tokens(index, reach, count))


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 30), st.integers(2, 4), st.sampled_from(["mean", "max"]))
def test_two_steps_with_a_small_budget(case, count, budget, pool):
    reach, grid, index = case
    two = select_tokens_in_blocks(index, reach, count, grid, budget, pool=pool)
    scores_CTS, visible_TS = naive_scores(index, reach)
    bounds = grid.starts_B1.tolist()
    pooled = [index.k_SED[a:b].double() for a, b in pairwise(bounds)]
    how = (lambda x: x.mean(0)) if pool == "mean" else (lambda x: x.amax(0))
    # In fp32, like the selection: means must round alike to tie alike.
    pooled = torch.stack([how(x.float()) for x in pooled]) if pooled else index.k_SED[:0]
    args = index.q_TCJD, pooled, index.weight_TCJ, index.scale
    coarse_CTB = naive_index_scores(*args, dtype=torch.float32)
    for block, (start, stop) in enumerate(pairwise(bounds)):
        seen_T = visible_TS[:, start:stop].any(1)
        partly_T = seen_T & ~visible_TS[:, start:stop].all(1)
        coarse_CTB[:, partly_T, block] = float("inf")
        coarse_CTB[:, ~seen_T, block] = float("-inf")
    for row, heads in enumerate(lists(two)):
        for head, keys in enumerate(heads):
            near = coarse_CTB[head, row]
            # Rounding may decide between coarse scores that are nearly equal.
            bar = near.sort(descending=True).values[:budget][-1:] if len(near) else near
            sure = {b for b in range(len(near)) if near[b] > bar + 1e-4}
            maybe = {b for b in range(len(near)) if near[b] >= bar - 1e-4 and near[b] > -1e30}
            of = torch.bucketize(torch.tensor(keys), grid.starts_B1, right=True) - 1
            assert set(of.tolist()) <= maybe
            allowed = torch.zeros(len(index.k_SED), dtype=torch.bool)
            for b in sure:
                allowed[bounds[b] : bounds[b + 1]] = True
            sums = scores_CTS[head, row]
            worst = min((float(sums[key]) for key in keys), default=float("inf"))
            missed = allowed & visible_TS[row]
            missed[keys] = False
            # What was surely searched and not chosen is no better than the worst that was chosen.
            assert len(keys) <= count
            assert not bool(missed.any()) or (
                len(keys) == count and float(sums[missed].max()) <= worst
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_sums_do_not_round_to_the_dtype(dtype, elements):
    reach = Reach.documents([0, 60])
    wide = draw_index(60, 60, heads=(2, 7), key_heads=2, dim=300)
    index = Index(*(x.to(dtype) for x in (wide.q_TCJD, wide.k_SED, wide.weight_TCJ)), 0.5)
    scores_CTS, visible_TS = naive_scores(wide, reach)
    want = naive_choice(scores_CTS.masked_fill(~visible_TS, float("-inf")), 9)
    assert lists(select_tokens(index, reach, 9, elements=elements)) == want


def test_no_choice_changes_with_a_key_out_of_reach():
    cu = [0, 30, 30, 71]
    reach, grid = Reach.documents(cu, 25), Grid.documents(cu, 8)
    index = draw_index(71, 71, heads=(2, 2), whole=False)

    def choose(index):
        return [
            select_tokens(index, reach, 5).ids_QCN,
            select_index_blocks(index, reach, grid, 2, local=1).ids_QCN,
            select_tokens_in_blocks(index, reach, 5, grid, 2).ids_QCN,
            select_tokens_in_blocks(index, reach, 5, grid, 2, pool="max").ids_QCN,
        ]

    before, changed = choose(index), [False] * 4
    for key in (0, 13, 29, 30, 47, 70):
        other_k = index.k_SED.clone()
        other_k[key] = 50.0
        blind = ~visible_in(reach.first_T, reach.last_T, 71)[0][:, key]
        after = choose(Index(index.q_TCJD, other_k, index.weight_TCJ, index.scale))
        for at, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(a[blind], b[blind]), (key, at)
            changed[at] |= not torch.equal(a, b)
    assert all(changed)


@pytest.mark.parametrize("heads", [(1, 3), (2, 1), (3, 2)])
@pytest.mark.parametrize("shared_key", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("elements", [1, 2**22])
def test_scores_and_their_gradients(heads, shared_key, relu, elements):
    cu = [0, 9, 24]
    reach, grid = Reach.documents(cu), Grid.documents(cu, 5)
    key_heads = 1 if shared_key else heads[0]
    index = draw_index(24, 24, heads=heads, key_heads=key_heads, whole=False)
    leaves = [x.clone().requires_grad_() for x in (index.q_TCJD, index.k_SED, index.weight_TCJ)]
    index = Index(index.q_TCJD, index.k_SED, index.weight_TCJ, 0.5, relu)
    want_CTS = naive_index_scores(*leaves, 0.5, relu)
    dscores = torch.randn_like(want_CTS)
    chunk = index_selection.Chunk(0, 24, 0, 24)
    slots = Slots.shared(chunk, slice(0, len(grid)), grid, reach, index.k_SED)
    # The tails of the documents leave places without a key: [5, 4], [5, 5, 5].
    real = torch.tensor([key for key in range(25) if key != 9])
    got = index_scores(index, slots, elements)[..., real]
    torch.testing.assert_close(got, want_CTS)
    padded = dscores.new_zeros(heads[0], 24, 25)
    padded[..., real] = dscores
    total = IndexGradients.zeros(index)
    add_index_gradients(total, index, slots, padded, elements)
    for grad, want in zip(total, torch.autograd.grad(want_CTS, leaves, dscores), strict=True):
        torch.testing.assert_close(grad, want)


VALUES = st.sampled_from([float("-inf"), -2.5, -0.0, 0.0, 3.0, float("inf")])


@settings(deadline=None)
@given(st.lists(VALUES, max_size=20), st.lists(st.integers(0, 20), max_size=3), st.integers(1, 9))
def test_parts_of_the_candidates_choose_as_all_of_them(row, cuts, count):
    scores = torch.tensor([row, row[::-1]], dtype=torch.float32)
    top = RunningTop(2, count, scores.device)
    edges = sorted({0, len(row), *(min(cut, len(row)) for cut in cuts)})
    for start, stop in pairwise(edges):
        top.add(scores[:, start:stop], start)
    assert torch.equal(top.ids(), top_ids(scores, count))


def test_numbers_beyond_31_bits_of_a_sum_stay_exact():
    top = RunningTop(1, 2, torch.device("cpu"))
    top.add(torch.tensor([[1.0, 1.0]]), 2**31 - 3)
    assert top.ids().tolist() == [[2**31 - 3, 2**31 - 2]]


def test_a_score_that_overflows_does_not_push_out_what_is_forced():
    index = Index(torch.ones(64, 1, 1, 1), torch.full((64, 1, 1), 3e38), None, 2.0)
    grid, reach = Grid.documents([0, 64], 8), Reach.documents([0, 64])
    blocks = select_index_blocks(index, reach, grid, 3, local=1)
    assert blocks.ids_QCN[-1, 0].tolist() == [0, 1, 7]


def test_rows_all_over_64k_tokens_in_bounded_memory(monkeypatch):
    monkeypatch.undo()
    tokens = 2**16
    some = torch.arange(3, tokens, 4)
    index = draw_index(len(some), tokens, heads=(1, 1), dim=16)
    with peak_growth() as grown:
        chosen = select_tokens(index, Reach.documents([0, tokens]).rows(some), 1024)
    # 64 MiB of it are the choice. The scores would be 4 GiB.
    assert grown.mib < 256, grown.mib
    assert bool((chosen.ids_QCN[255:] >= 0).all())


def test_selection_over_64k_tokens_in_bounded_memory(monkeypatch):
    monkeypatch.undo()
    tokens = 2**16
    cu = [0, 20_000, 20_001, tokens]
    index = draw_index(tokens, tokens, heads=(1, 2), dim=16)
    window, all_keys = Reach.documents(cu, 1024), Reach.documents(cu)
    some = torch.arange(tokens - 1024, tokens)
    few = Index(index.q_TCJD[some], index.k_SED, index.weight_TCJ[some], 0.5)
    grid = Grid.documents(cu, 64)
    with peak_growth() as grown:
        near = select_tokens(index, window, 64)
        far = select_tokens(few, all_keys.rows(some), 64)
        two = select_tokens_in_blocks(few, all_keys.rows(some), 64, grid, 8)
        wide = select_index_blocks(few, all_keys.rows(some), grid, 16, local=1)
    assert grown.mib < 512, grown.mib
    assert near.ids_QCN.shape == (tokens, 1, 64)
    rows = torch.tensor([0, 500, 1023])
    scores = naive_index_scores(few.q_TCJD[rows], index.k_SED, few.weight_TCJ[rows], 0.5)
    visible = visible_in(*(x[some][rows] for x in (all_keys.first_T, all_keys.last_T)), tokens)[0]
    want = naive_choice(scores.masked_fill(~visible, float("-inf")), 64)
    assert far.ids_QCN[rows].tolist() == want
    assert bool((two.ids_QCN[:, :, -1] >= 0).all())
    assert wide.ids_QCN[-1, 0, -1] == len(grid) - 1


def test_nothing_waits_for_the_device():
    # A meta tensor has no values: whatever asked for one would raise.
    reach, grid = Reach.documents([0, 9, 9, 40], 20), Grid.documents([0, 9, 9, 40], 4)
    index = Index(*(torch.empty(s, device="meta") for s in [(40, 2, 3, 5), (40, 1, 5), (40, 2, 3)]))
    for blocks in (
        select_tokens(index, reach, 6),
        select_index_blocks(index, reach, grid, 6, initial=1, local=1),
        select_tokens_in_blocks(index, reach, 6, grid, 3),
    ):
        assert blocks.ids_QCN.device.type == "meta" and blocks.ids_QCN.shape == (40, 2, 6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 1, 2, 4), (5, 1, 3)), "wants q"),
        (((5, 2, 2, 4), (5, 3, 4)), "one key head"),
    ],
)
def test_shapes_that_contradict_each_other(shapes, message):
    with pytest.raises(ValueError, match=message):
        Index(*(torch.zeros(shape) for shape in shapes))


def test_counts_that_contradict_each_other():
    index, reach = draw_index(5, 5), Reach.documents([0, 5])
    with pytest.raises(ValueError, match="at least 1"):
        select_tokens(index, reach, 0)
    with pytest.raises(ValueError, match="index queries"):
        select_tokens(index, Reach.documents([0, 6]), 1)
    with pytest.raises(ValueError, match="reach up to"):
        select_tokens(draw_index(6, 5), Reach.documents([0, 6]), 1)
    with pytest.raises(ValueError, match="a grid of"):
        select_index_blocks(index, reach, Grid.documents([0, 6], 2), 1)
    with pytest.raises(ValueError, match="1 initial and 2 local"):
        select_index_blocks(index, reach, Grid.documents([0, 5], 2), 2, initial=1, local=2)
    with pytest.raises(ValueError, match="budget"):
        select_tokens_in_blocks(index, reach, 1, Grid.documents([0, 5], 2), 1)
    with pytest.raises(ValueError, match="weights"):
        Index(index.q_TCJD, index.k_SED, torch.zeros(5, 1, 3))
