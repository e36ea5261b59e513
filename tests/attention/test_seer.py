import pytest
import torch
from longspan.attention import seer
from longspan.attention.mechanism_settings import SeerSettings
from longspan.errors import LongspanError
from longspan.kernels.grid import Grid
from reference.attention import naive_attend
from reference.seer import naive_gate_choice, naive_gate_loss, naive_logits
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
TOKEN = {"kind": "seer", "block": 4, "dim": 6, "count": 3}
BLOCK = {**TOKEN, "form": "block", "block": 5}
STILL = {"training": False, "learns": False}
WEIGHTS = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)).double()
WEIGHTS[::7] = 0.0


def visible(cu):
    document = torch.bucketize(torch.arange(cu[-1]), torch.tensor(cu), right=True)
    causal = torch.ones(cu[-1], cu[-1], dtype=torch.bool).tril()
    return (document[:, None] == document) & causal


def logits_of(layer, settings, given, cu=CU):
    own = layer.mechanism.query, layer.mechanism.key
    return naive_logits(given.q, given.k, *own, SeerSettings.model_validate(settings), cu, turned)


def twin_ids(layer, settings, given, cu=CU):
    """The choices as one tensor, and the gate's query of each token."""
    kind = SeerSettings.model_validate(settings)
    choice = naive_gate_choice(logits_of(layer, settings, given, cu), kind, cu)
    ids = torch.tensor([[x + [-1] * (kind.count - len(x)) for x in row] for row in choice])
    sizes = Grid.documents(cu, kind.block).starts_B1.diff()
    by_block = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return ids, torch.arange(cu[-1]) if kind.form == "token" else by_block


def naive(layer, settings, given, cu=CU, dense=True):
    """Leaves, output and lse."""
    leaves, positions = given.leaves(), positions_of(cu)
    seen = visible(cu)[None]
    if not dense:
        block = SeerSettings.model_validate(settings).block
        ids, group_T = twin_ids(layer, settings, given, cu)
        starts = Grid.documents(cu, block).starts_B1
        seen = seen & chosen(ids, starts, group_T, given.q.shape[1], cu[-1])
    q, k = (turned(x, positions) for x in leaves[1:3])
    return leaves, q, k, naive_attend(q, k, leaves[3], seen, 8**-0.5)


def learned(layer):
    return [layer.mechanism.query.grad, layer.mechanism.key.grad]


def evaluate(layer, given, cu=CU, **changes):
    with torch.no_grad():
        return layer(given.hidden, given.q, given.k, given.v, context(cu, **STILL, **changes))


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("more", [{}, {"rows": 1.0, "weight": 0.5}, {"rows": 0.3, "block": 3}])
@pytest.mark.parametrize("form", [TOKEN, BLOCK])
def test_dense_outputs_and_what_the_gate_learns_equal_the_twin(form, more, heads, groups):
    settings, where = {**form, **more}, site(heads, groups)
    layer, given = make(settings, where), inputs(TOKENS, where)
    ctx = context(CU, weights_T=WEIGHTS)
    out, grads = run(layer, given, ctx)
    leaves, q, k, (want, lse) = naive(layer, settings, given)
    assert_all_close([out, *grads[:4]], [want.detach(), *gradients(want, given.dout, leaves)])
    assert not any(bool(x.any()) for x in [grads[0], *grads[4:]])
    kind = SeerSettings.model_validate(settings)
    loss, weight = naive_gate_loss(
        q.detach(), k.detach(), lse.detach(), logits_of(layer, settings, given), visible(CU), kind,
        CU, WEIGHTS, 8**-0.5,
    )  # fmt: skip
    parameters = [layer.mechanism.query, layer.mechanism.key]
    assert_all_close(learned(layer), [kind.weight * x for x in gradients(loss, None, parameters)])
    total, rows = (float(x) for x in ctx.notes.sums["gate_loss"])
    assert total == pytest.approx(float(loss.detach())) and rows == pytest.approx(weight)
    assert total > 1 and ctx.notes.parts == {"gate_loss"}


SPARSE = [
    TOKEN,
    {**TOKEN, "count": 1},
    {**TOKEN, "block": 3, "count": 5},
    {**TOKEN, "evaluate": "threshold", "threshold": 0.2, "count": 6},
    {**TOKEN, "evaluate": "threshold", "threshold": 0.12, "count": 3},
    BLOCK,
    {**BLOCK, "block": 3, "evaluate": "threshold", "threshold": 0.1, "count": 6},
]


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("settings", SPARSE)
def test_sparse_evaluations_equal_the_twin(settings, heads, groups, monkeypatch):
    monkeypatch.setattr(seer, "ELEMENTS", 700)  # several chunks
    where = site(heads, groups)
    layer, given = make(settings, where), inputs(TOKENS, where)
    ctx = context(CU, **STILL, kept={})
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, ctx)
    got = [[[b for b in x if b >= 0] for x in row] for row in ctx.kept["gate"].ids_QCN.tolist()]
    kind = SeerSettings.model_validate(settings)
    want_ids = naive_gate_choice(logits_of(layer, settings, given), kind, CU)
    assert got == want_ids
    out, grads = run(layer, given, context(CU, **STILL))
    leaves, _, _, (want, _) = naive(layer, settings, given, dense=False)
    assert_all_close([out, *grads[:4]], [want.detach(), *gradients(want, given.dout, leaves)])
    assert not ctx.notes.sums and learned(layer) == [None, None]


@pytest.mark.parametrize("settings", SPARSE[3:5])
def test_the_threshold_drops_some_of_the_best(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    budget = {**settings, "evaluate": "budget", "threshold": None}
    few, many = (twin_ids(layer, x, given)[0] for x in (settings, budget))
    assert 100 < int((few >= 0).sum()) < int((many >= 0).sum())


@pytest.mark.parametrize("settings", [{**TOKEN, "count": 16}, {**BLOCK, "count": 16},
                                      {**TOKEN, "evaluate": "dense"}])  # fmt: skip
def test_a_budget_for_everything_is_dense(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    got, want = (
        run(x, given, context(CU, **STILL)) for x in (layer, make({"kind": "dense"}, where))
    )
    assert_all_close([got[0], *got[1][:4]], [want[0], *want[1]], atol=1e-12)


@pytest.mark.parametrize("settings", [TOKEN, BLOCK])
def test_while_a_model_trains_attention_is_dense_and_only_learns_when_asked(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    ctx = context(CU, learns=False)
    with torch.no_grad():
        first = layer(given.hidden, given.q, given.k, given.v, ctx)
    assert not ctx.notes.sums and learned(layer) == [None, None]
    with torch.no_grad():
        second = layer(given.hidden, given.q, given.k, given.v, context(CU))
    dense = make({"kind": "dense"}, where)(given.hidden, given.q, given.k, given.v, context(CU))
    assert_all_close([first, second], [dense, dense], atol=0)
    assert all(bool(x.any()) for x in learned(layer))


@pytest.mark.parametrize("settings", [TOKEN, BLOCK])
def test_its_loss_reaches_nothing_but_its_parameters(settings):
    where = site()
    layer, given = make(settings, where, sinks=True), inputs(TOKENS, where)
    leaves = given.leaves()
    layer(*leaves, context(CU, weights_T=WEIGHTS))
    assert all(x is not None and bool(x.any()) for x in learned(layer))
    assert layer.sink_H.grad is None and all(x.grad is None for x in leaves)


THRESHOLD = SPARSE[3]


@pytest.mark.parametrize("settings", [TOKEN, THRESHOLD])
def test_one_token_changes_nothing_before_it_or_in_other_documents(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    before = evaluate(layer, given)
    for token in (0, 3, 9, 14, 31, 32, 56):
        kept = [x[token].clone() for x in (given.q, given.k, given.v)]
        for x in (given.q, given.k, given.v):
            x[token] = -3 * x[token] + 1
        changed = (evaluate(layer, given) != before).flatten(1).any(1)
        assert bool(changed[token])
        assert not bool((changed & ~visible(CU)[:, token]).any()), token
        for x, old in zip((given.q, given.k, given.v), kept, strict=True):
            x[token] = old


@pytest.mark.parametrize("settings", [TOKEN, BLOCK])
def test_what_a_gate_learns_of_a_document_is_its_own(settings):
    where, found = site(), []
    for seed in (1, 2):
        layer, given = make(settings, where), inputs(TOKENS, where)
        other = inputs(TOKENS, where, seed)
        for name in "qkv":
            getattr(given, name)[:20] = getattr(other, name)[:20]
        weights = torch.where(torch.arange(TOKENS) < 20, 0.0, 1.0).double()
        run(layer, given, context(CU, weights_T=weights))
        found.append(learned(layer))
    assert all(bool(x.any()) for x in found[0])
    assert_all_close(*found, atol=1e-12)


@pytest.mark.parametrize("settings", [TOKEN, THRESHOLD, {**BLOCK, "evaluate": "dense"}])
def test_the_last_rows_alone_are_those_of_the_whole(settings):
    where = site()
    layer, given = make(settings, where), inputs(TOKENS, where)
    whole, rows = evaluate(layer, given), torch.arange(50, TOKENS)
    given.q = given.q[rows]
    assert_all_close([evaluate(layer, given, rows=rows)], [whole[rows]], atol=1e-12)


def test_blocks_of_queries_cannot_generate():
    where, rows = site(), torch.arange(50, TOKENS)
    layer, given = make(BLOCK, where), inputs(TOKENS, where)
    assert not layer.mechanism.causal and make(TOKEN, where).mechanism.causal
    given.q = given.q[rows]
    with pytest.raises(LongspanError, match="token"):
        evaluate(layer, given, rows=rows)


@pytest.mark.parametrize("settings", [TOKEN, BLOCK])
def test_two_tensor_ranks_learn_what_one_does(settings):
    whole, given = site(), inputs(TOKENS, site())
    layer, ctx = make(settings, whole), context(CU, weights_T=WEIGHTS)
    want = layer(given.hidden, given.q, given.k, given.v, ctx)
    sparse, outs, evaluated, grads, sums = evaluate(layer, given), [], [], [], []
    for number in range(2):
        part = make(settings, site(2, 1, first_head=2 * number, all_heads=4))
        for mine, full in zip(part.parameters(), layer.parameters(), strict=True):
            assert mine.by_head
            mine.data.copy_(full.chunk(2)[number])
        q, k, v = (x.chunk(2, dim=1)[number] for x in (given.q, given.k, given.v))
        own = context(CU, weights_T=WEIGHTS)
        outs.append(part(given.hidden, q, k, v, own))
        grads.append(learned(part))
        sums.append(own.notes.sums["gate_loss"])
        evaluated.append(part(None, q, k, v, context(CU, **STILL)))
    assert_all_close([torch.cat(outs, 1), torch.cat(evaluated, 1)], [want, sparse])
    assert_all_close([torch.cat(pair) for pair in zip(*grads, strict=True)], learned(layer))
    total, rows = ctx.notes.sums["gate_loss"]
    assert_all_close(
        [sums[0][0] + sums[1][0], sums[0][1], sums[1][1]], [total, rows, rows], atol=1e-6
    )


@pytest.mark.parametrize("settings", [TOKEN, BLOCK])
def test_float32_is_as_good_as_float32_can_be(settings):
    where = site(dtype=torch.float32)
    layer, given = make(settings, where), inputs(TOKENS, where, dtype=torch.float32)
    exact = make(settings, site())
    exact.load_state_dict(layer.state_dict())
    run(layer, given, context(CU, weights_T=WEIGHTS.float()))
    run(exact, inputs(TOKENS, site()), context(CU, weights_T=WEIGHTS))
    for got, want in zip(learned(layer), learned(exact), strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


def test_64k_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, 16, 8, dtype=torch.float32)
    how = {"evaluate": "threshold", "threshold": 1e-3, "block": 64, "count": 3}
    layer = make({"kind": "seer", "dim": 16, **how}, where)
    given = inputs(tokens, where, dtype=torch.float32)
    with peak_growth() as grown:
        out, grads = run(layer, given, context([0, tokens // 4, tokens], **STILL))
    assert grown.mib < 512, grown.mib
    assert all(bool(x.isfinite().all()) for x in [out, *grads])


def test_learning_from_64k_packed_tokens_in_bounded_memory():
    tokens, where = 2**16, site(1, 1, 16, 8, dtype=torch.float32)
    layer = make({"kind": "seer", "dim": 16, "rows": 0.1}, where)
    given = inputs(tokens, where, dtype=torch.float32)
    cu = [*range(0, tokens + 1, 1024)]
    with peak_growth() as grown, torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, context(cu))
    assert grown.mib < 512, grown.mib
    assert all(bool(x.isfinite().all()) and bool(x.any()) for x in learned(layer))
