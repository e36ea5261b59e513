from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from longspan.attention.mechanism_settings import IndexerSettings
from longspan.kernels.grid import Grid
from reference.index_layer import naive_ids, naive_indexer, naive_scores, pad
from reference.indexer import naive_block_scores, naive_choice, naive_index_scores
from reference.visibility import chosen
from support.mechanisms import (
    assert_all_close,
    context,
    gradients,
    inputs,
    make,
    positions_of,
    run,
    site,
    turned,
)
from support.memory import peak_growth

CU = [0, 1, 4, 9, 20, 57]
TOKENS = CU[-1]
DSA = {"kind": "indexer", "count": 6, "heads": 3, "dim": 8}
MSA = {"kind": "indexer", "block": 4, "count": 3, "local": 1, "share": "kv_head", "heads": 1,
       "dim": 8, "relu": False}  # fmt: skip
CASES = [
    DSA,
    {**DSA, "attend": "dense", "weight": 0.5},
    {**DSA, "heads": 1, "rotary_share": 1.0, "local": 2},
    {**DSA, "share": "kv_head", "relu": False},
    {**DSA, "block": 5, "count": 2},
    MSA,
    {**MSA, "attend": "dense", "heads": 2, "relu": True, "weight": 2.0},
    {**MSA, "share": "all_heads", "block": 3, "count": 4, "local": 2, "rotary_share": 0.25},
]
WEIGHTS = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)).double()
WEIGHTS[::7] = 0.0


def visible(cu):
    document = torch.bucketize(torch.arange(cu[-1]), torch.tensor(cu), right=True)
    causal = torch.ones(cu[-1], cu[-1], dtype=torch.bool).tril()
    return (document[:, None] == document) & causal


def turn_by(cu):
    return lambda x, share: turned(x, positions_of(cu), share=share)


def own(layer):
    return dict(layer.mechanism.named_parameters())


def twin(layer, settings, given, cu=CU, weights=WEIGHTS):
    """Output, its gradients of hidden, q, k and v, and the loss with its gradients and weight."""
    settings, starts = IndexerSettings.model_validate(settings), None
    starts, seen, parameters = Grid.documents(cu, settings.block).starts_B1, visible(cu), own(layer)
    scores = naive_scores(given.hidden, parameters, settings, turn_by(cu))
    ids = naive_ids(scores, seen, starts, settings) if settings.attend == "chosen" else None
    leaves = given.leaves()
    out, loss, weight = naive_indexer(
        leaves, parameters, settings, seen, starts, ids, weights, turn_by(cu), 8**-0.5
    )
    grads = gradients(out, given.dout, leaves)
    return out.detach(), grads, loss.detach(), gradients(loss, None, [*parameters.values()]), weight


def learned(layer):
    return [x.grad for x in own(layer).values()]


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("settings", CASES)
def test_outputs_loss_and_all_gradients_equal_the_twin(settings, heads, groups):
    where = site(heads, groups)
    layer, given = make(settings, where), inputs(TOKENS, where)
    want, want_grads, loss, want_learned, weight = twin(layer, settings, given)
    ctx = context(CU, weights_T=WEIGHTS)
    out, grads = run(layer, given, ctx)
    assert_all_close([out, *grads[:4]], [want, *want_grads])
    # Neither loss reaches what the other is for.
    assert not any(bool(x.any()) for x in [grads[0], *grads[4:]])
    scale = IndexerSettings.model_validate(settings).weight
    assert_all_close(learned(layer), [scale * x for x in want_learned])
    assert all(bool(x.any()) for x in want_learned)
    total, rows = ctx.notes.sums["index_loss"]
    assert float(total) == pytest.approx(float(loss)) and float(rows) == pytest.approx(weight)
    assert ctx.notes.parts == ({"index_loss"} if layer.mechanism.by_head else set())


@pytest.mark.parametrize("settings", [c for c in CASES if "attend" not in c])
def test_choices_equal_those_of_the_twin(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    ctx = context(CU, kept={}, learns=False)
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, ctx)
    kind = IndexerSettings.model_validate(settings)
    scores = naive_scores(given.hidden, own(layer), kind, turn_by(CU))
    want = naive_ids(scores, visible(CU), Grid.documents(CU, kind.block).starts_B1, kind)
    got = ctx.kept["index"].ids_QCN
    assert torch.equal(pad([[[b for b in x if b >= 0] for x in row] for row in got.tolist()],
                           kind.count), want)  # fmt: skip


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_hisa_searches_the_blocks_with_the_best_pooled_keys(pool):
    hisa = {"block": 4, "budget": 3, "pool": pool}
    settings, where, cu = {**DSA, "hisa": hisa}, site(), [0, 3, 64]
    layer, given = make(settings, where), inputs(64, where)
    ctx = context(cu, kept={}, learns=False)
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, ctx)
    index = layer.mechanism._index(given.hidden, ctx)
    starts, seen = Grid.documents(cu, 4).starts_B1, visible(cu)
    parts = index.k_SED.split(starts.diff().tolist())
    pooled = torch.stack([x.mean(0) if pool == "mean" else x.amax(0) for x in parts])
    weights = index.weight_TCJ, index.scale, True
    coarse = naive_index_scores(index.q_TCJD, pooled, *weights)
    inside = naive_block_scores(seen.double()[None], seen, starts)[0] > 0
    whole = torch.stack([x.all(1) for x in seen.split(starts.diff().tolist(), dim=1)], dim=1)
    coarse = coarse.masked_fill(~whole, float("inf")).masked_fill(~inside, float("-inf"))
    blocks = pad(naive_choice(coarse, 3), 3)
    searched = chosen(blocks, starts, torch.arange(64), 1, 64) & seen
    fine = naive_index_scores(index.q_TCJD, index.k_SED, *weights)
    want = naive_choice(fine.masked_fill(~searched, float("-inf")), 6)
    got = [[[b for b in x if b >= 0] for x in row] for row in ctx.kept["index"].ids_QCN.tolist()]
    assert got == want


def test_hisa_with_a_budget_for_everything_is_the_plain_choice():
    where = site()
    given, found = inputs(TOKENS, where), []
    for hisa in (None, {"block": 4, "budget": 10}):
        layer = make({**DSA, "hisa": hisa}, where)
        ctx = context(CU, kept={}, weights_T=WEIGHTS)
        out, grads = run(layer, given, ctx)
        found.append([out, *grads, *learned(layer)])
    assert_all_close(*found, atol=1e-12)


@pytest.mark.parametrize("settings", [{**DSA, "count": 64}, {**MSA, "count": 16}])
def test_choices_of_everything_are_dense_attention(settings):
    where = site()
    given, found = inputs(TOKENS, where), []
    for attend_to in ("chosen", "dense"):
        layer = make({**settings, "attend": attend_to}, where)
        ctx = context(CU, weights_T=WEIGHTS)
        out, grads = run(layer, given, ctx)
        found.append([out, *grads, *learned(layer), ctx.notes.sums["index_loss"]])
    assert_all_close(*found, atol=1e-10)
    dense = run(make({"kind": "dense"}, where), given, context(CU))
    assert_all_close(found[1][:5], [dense[0], *dense[1]], atol=1e-10)


@pytest.mark.parametrize("settings", [DSA, MSA])
def test_keys_that_a_row_did_not_choose_have_no_gradient(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    ctx = context(CU, kept={}, learns=False)
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, ctx)
    blocks = ctx.kept["index"]
    picked = chosen(blocks.ids_QCN, blocks.grid.starts_B1, torch.arange(TOKENS), 2, TOKENS)
    given.dout[:50] = given.dout[51:] = 0
    grads = run(layer, given, context(CU))[1]
    touched = grads[3].ne(0).any(-1)
    assert torch.equal(touched.T, (picked & visible(CU))[:, 50]) and int(touched.sum()) < 2 * 30


def test_it_learns_beside_a_frozen_model_that_runs_without_gradients():
    where = site()
    given = inputs(TOKENS, where)
    layers = [make(MSA, where) for _ in range(2)]
    run(layers[0], given, context(CU, weights_T=WEIGHTS))
    with torch.no_grad():
        layers[1](given.hidden, given.q, given.k, given.v, context(CU, weights_T=WEIGHTS))
    assert_all_close(learned(layers[0]), learned(layers[1]), atol=0)


def test_nothing_is_learned_or_noted_in_the_first_of_two_passes():
    where = site()
    layer, given, kept = make(DSA, where), inputs(TOKENS, where), {}
    want, want_grads = run(layer, given, context(CU, weights_T=WEIGHTS))
    once = learned(layer)
    layer.zero_grad()
    ctx = context(CU, weights_T=WEIGHTS, kept=kept, learns=False)
    with torch.no_grad():
        first = layer(given.hidden, given.q, given.k, given.v, ctx)
    assert not ctx.notes.sums and all(x is None for x in learned(layer)) and set(kept) == {"index"}
    out, grads = run(layer, given, context(CU, weights_T=WEIGHTS, kept=kept))
    assert_all_close(
        [first, out, *grads, *learned(layer)], [want, want, *want_grads, *once], atol=0
    )
    assert not kept


@pytest.mark.parametrize("settings", [DSA, MSA, CASES[1]])
def test_its_loss_reaches_nothing_but_its_parameters(settings):
    where = site()
    layer, given = make(settings, where, sinks=True), inputs(TOKENS, where)
    leaves = given.leaves()
    layer(*leaves, context(CU, weights_T=WEIGHTS))
    assert all(x is not None and bool(x.any()) for x in learned(layer))
    assert layer.sink_H.grad is None and all(x.grad is None for x in leaves)


def test_a_frozen_indexer_learns_nothing():
    where = site()
    layer, given = make(DSA, where), inputs(TOKENS, where)
    layer.requires_grad_(False)
    leaves = given.leaves()
    layer(*leaves, context(CU)).backward(given.dout)
    assert all(x is None for x in learned(layer)) and leaves[1].grad is not None


@pytest.mark.parametrize("settings", [DSA, MSA, {**DSA, "hisa": {"block": 4, "budget": 3}}])
def test_one_token_changes_nothing_before_it_or_in_other_documents(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)

    def out():
        with torch.no_grad():
            ctx = context(CU, training=False, learns=False)
            return layer(given.hidden, given.q, given.k, given.v, ctx)

    before = out()
    for token in (0, 3, 9, 14, 31, 56):
        kept = [x[token].clone() for x in (given.hidden, given.q, given.k, given.v)]
        for x in (given.hidden, given.q, given.k, given.v):
            x[token] = -3 * x[token] + 1
        changed = (out() != before).flatten(1).any(1)
        assert bool(changed[token])
        changed &= ~visible(CU)[:, token]
        assert not bool(changed.any()), token
        for x, old in zip((given.hidden, given.q, given.k, given.v), kept, strict=True):
            x[token] = old


@pytest.mark.parametrize(
    "settings", [CASES[1], DSA, MSA, {**DSA, "hisa": {"block": 4, "budget": 3}}]
)
def test_the_last_rows_alone_are_those_of_the_whole(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    still = {"training": False, "learns": False}
    with torch.no_grad():
        whole = layer(given.hidden, given.q, given.k, given.v, context(CU, **still))
        rows = torch.arange(50, TOKENS)
        ctx = context(CU, rows=rows, **still)
        last = layer(given.hidden, given.q[rows], given.k, given.v, ctx)
    assert_all_close([last], [whole[rows]], atol=1e-12)


class Meeting:
    """An all-reduce between threads, in place like the real one."""

    def __init__(self, ranks):
        self.barrier, self.given = Barrier(ranks, timeout=60), [torch.zeros(0)] * ranks

    def total(self, rank):
        def reduce(x):
            self.given[rank] = x.clone()
            self.barrier.wait()
            x.copy_(sum(self.given))
            self.barrier.wait()
            return x

        return reduce


@pytest.mark.parametrize("settings", CASES)
def test_two_tensor_ranks_learn_what_one_does(settings):
    whole, given = site(), inputs(TOKENS, site())
    layer = make(settings, whole)
    ctx = context(CU, weights_T=WEIGHTS)
    want = layer(given.hidden, given.q, given.k, given.v, ctx)
    meeting, names = Meeting(2), list(own(layer))

    def rank(number):
        where = site(2, 1, first_head=2 * number, all_heads=4, total=meeting.total(number))
        part = make(settings, where)
        for mine, full in zip(own(part).values(), own(layer).values(), strict=True):
            mine.data.copy_(full.chunk(2)[number] if mine.by_head else full)
        q, k, v = (x.chunk(2, dim=1)[number] for x in (given.q, given.k, given.v))
        notes = context(CU, weights_T=WEIGHTS)
        return part, part(given.hidden, q, k, v, notes).detach(), notes.notes

    with ThreadPoolExecutor(2) as pool:
        (one, left, notes), (other, right, more) = pool.map(rank, range(2))
    assert_all_close([torch.cat([left, right], 1)], [want])
    for name, full, a, b in zip(names, learned(layer), learned(one), learned(other), strict=True):
        if own(one)[name].by_head:
            assert_all_close([torch.cat([a, b])], [full])
        else:
            assert_all_close([a, b], [full, full])
    (total, rows), pairs = (
        ctx.notes.sums["index_loss"],
        [x.sums["index_loss"] for x in (notes, more)],
    )
    assert [float(x[1]) for x in pairs] == pytest.approx([float(rows)] * 2)
    parts = sum(float(x[0]) for x in pairs) / (1 if "index_loss" in notes.parts else 2)
    assert parts == pytest.approx(float(total))


@pytest.mark.parametrize("settings", [CASES[1], CASES[6]])
def test_float32_is_as_good_as_float32_can_be(settings):
    where = site(dtype=torch.float32)
    layer, given = make(settings, where), inputs(TOKENS, where, dtype=torch.float32)
    run(layer, given, context(CU, weights_T=WEIGHTS.float()))
    wide = site()
    exact, scale = make(settings, wide), IndexerSettings.model_validate(settings).weight
    for mine, full in zip(own(exact).values(), own(layer).values(), strict=True):
        mine.data.copy_(full)
    for got, want in zip(
        learned(layer), twin(exact, settings, inputs(TOKENS, wide))[3], strict=True
    ):
        torch.testing.assert_close(got.double(), scale * want, atol=2e-5, rtol=2e-5)


def test_64k_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, 16, 8, dtype=torch.float32)
    hisa = {"block": 32, "budget": 4}
    layer = make({**DSA, "count": 16, "heads": 1, "dim": 16, "hisa": hisa}, where)
    given = inputs(tokens, where, dtype=torch.float32)
    with peak_growth() as grown:
        out, _ = run(layer, given, context([0, tokens]))
    assert grown.mib < 512, grown.mib
    assert bool(out.isfinite().all()) and all(bool(x.isfinite().all()) for x in learned(layer))
