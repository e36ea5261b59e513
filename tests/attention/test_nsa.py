from itertools import pairwise

import pytest
import torch
from longspan.attention.mechanism_settings import NsaSettings
from reference.nsa import naive_nsa
from support.accuracy import assert_as_good_as
from support.mechanisms import context, gradients, inputs, make, run, site, turned
from support.memory import peak_growth

DOCUMENTS = [0, 1, 4, 9, 9, 32, 107]
SMALL = {
    "kind": "nsa", "block": 8, "count": 4, "initial": 1, "local": 2, "window": 9,
    "compress_length": 4, "compress_stride": 2,
}  # fmt: skip
ALL = {"count": 99, "window": 999}
SETTINGS = {
    "mlp": {},
    "mean of turned keys": {"compress": "mean", "compress_after_rope": True, "local": 1},
    "weighted, one gate": {"compress": "weighted", "gate": "token", "initial": 0},
    "linear, own keys": {"compress": "linear", "branch_kv": "independent", "count": 3},
    "own turned keys": {"branch_kv": "independent", "compress_after_rope": True},
    "values encoded": {"encode_position": "keys_and_values", "compress": "weighted"},
    "nothing encoded": {"encode_position": "none", "compress": "linear", "window": 1},
    "windows as blocks": {"compress_length": 8, "compress_stride": 8, "compress": "mean"},
    "windows beyond blocks": {"block": 2, "compress_length": 6, "count": 7, "compress": "weighted"},
    "everything": ALL,
}


@pytest.fixture(autouse=True)
def one_thread():
    """One head gives threads nothing to share; on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(layer):
    return {name.removeprefix("nsa."): x for name, x in layer.named_parameters()}


def twin(layer, settings, leaves, cu=DOCUMENTS, turns=True, scale=8**-0.5):
    """Output of all documents, and what was chosen by (query, key-value head)."""
    own, outs, chosen = parameters(layer), [], {}
    how = {"scale": scale, "dtype": leaves[0].dtype}
    for a, b in pairwise(cu):
        part, ids = naive_nsa(
            *(x[a:b] for x in leaves), NsaSettings(**settings), own,
            lambda x, at: turned(x, at, turns), how, own.get("sink_H"),
        )  # fmt: skip
        outs.append(part)
        chosen |= {(a + t, g): blocks for (t, g), blocks in ids.items()}
    return torch.cat(outs), chosen


def choices(layer, given, ctx):
    """What was chosen by (query, key-value head), counted within documents."""
    with torch.no_grad():
        layer(given.hidden, given.q, given.k, given.v, ctx)
    blocks, cu = ctx.kept["nsa"], torch.tensor(ctx.documents.cu_seqlens)
    starts, found = blocks.grid.starts_B1, {}
    for t, heads in enumerate(blocks.ids_QCN.tolist()):
        first = cu[cu <= t].max()
        size = int(starts.diff().max())
        for g, ids in enumerate(heads):
            found[t, g] = [int(starts[b] - first) // size for b in ids if b >= 0]
    return found


def assert_twin(settings, where, turns=True, **options):
    layer, given = make(settings, where, **options), inputs(DOCUMENTS[-1], where)
    out, grads = run(layer, given, context(DOCUMENTS, turns=turns))
    leaves = given.leaves()
    scale = options.get("scale", where.dim**-0.5)
    want, chosen = twin(layer, settings, leaves, turns=turns, scale=scale)
    torch.testing.assert_close(out, want, atol=1e-11, rtol=0)
    wanted = gradients(want, given.dout, [*leaves, *layer.parameters()])
    names = ["hidden", "q", "k", "v", *parameters(layer)]
    for name, grad, wants in zip(names, grads, wanted, strict=True):
        assert bool(wants.any()), name
        torch.testing.assert_close(grad, wants, atol=1e-10, rtol=0, msg=lambda m, n=name: n + m)
    assert choices(layer, given, context(DOCUMENTS, turns=turns, kept={})) == chosen


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_equals_the_twin(changes):
    assert_twin(SMALL | changes, site())


@pytest.mark.parametrize("groups", [4, 1])
def test_any_number_of_heads_shares_keys(groups):
    assert_twin(SMALL | {"branch_kv": "independent"}, site(groups=groups))


def test_sixteen_heads_share_keys():
    assert_twin(SMALL | {"compress": "mean", "encode_position": "none"}, site(16, 1))


def test_scale_sinks_and_no_rope():
    assert_twin(SMALL, site(), turns=False, sinks=True, scale=0.7)


def test_the_fla_preset():
    given = NsaSettings(kind="nsa", preset="fla", block=128)
    assert (given.initial, given.local, given.compress_after_rope, given.block) == (1, 2, True, 128)
    small = {"block": 8, "compress_length": 8, "compress_stride": 8, "count": 3, "window": 9}
    assert_twin({"kind": "nsa", "preset": "fla"} | small, site())


def test_parameters_are_those_that_the_settings_ask_for():
    def shapes(**changes):
        layer = make(SMALL | {"compress": "mean"} | changes, site())
        return {name: tuple(x.shape) for name, x in parameters(layer).items()}

    gate, place = {"gate": (4, 3, 12)}, (2, 4, 8)
    assert shapes(encode_position="none") == gate
    assert shapes() == gate | {"keys.place": place}
    both = {"keys.place": place, "values.place": place}
    assert shapes(encode_position="keys_and_values") == gate | both
    assert shapes(encode_position="none", gate="token") == {"gate": (3, 12)}
    own = shapes(encode_position="none", branch_kv="independent")
    assert own == gate | {"branch_kv": (2, 2, 2, 8, 12)}


@pytest.mark.parametrize("compress", ["mean", "weighted", "linear", "mlp"])
def test_documents_without_a_window(compress):
    settings, where, cu = SMALL | {"compress": compress}, site(), [0, 1, 4, 5]
    layer, given = make(settings, where), inputs(5, where)
    out, grads = run(layer, given, context(cu))
    leaves = given.leaves()
    want, _ = twin(layer, settings, leaves, cu)
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    for grad, wants in zip(
        grads, gradients(want, given.dout, [*leaves, *layer.parameters()]), strict=True
    ):
        torch.testing.assert_close(grad, wants, atol=1e-12, rtol=0)


def test_overlaps_weigh_1_2_2_2_1():
    # One place is left beside the own block; block 10 has a window of its own, block 5 another.
    settings = {"kind": "nsa", "count": 2, "initial": 0, "local": 1}
    where = site(heads=1, groups=1, dim=2)
    mechanism = make(settings, where).mechanism
    ctx = context([0, 1024], rows=torch.tensor([1023]), scale=1.0)
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)

    def choice(masses):
        k = torch.full((63, 1, 2), -40.0, dtype=torch.float64)
        for window, mass in masses.items():
            k[window, 0, 0] = torch.tensor(mass).log()
        lse = k[:, 0, 0].logsumexp(0).view(1, 1)
        return mechanism._choose(q, k, lse, ctx).ids_QCN[0, 0].tolist()

    for window, weight in zip(range(19, 24), [1, 2, 2, 2, 1], strict=True):
        # A little more for block 5, as the outer windows belong to a neighbour as well.
        def masses(share, window=window, weight=weight):
            rest = {21: 0.01} if window != 21 else {22: 0.01}
            return rest | {41: 1.0, window: share * (2 - 0.02) / weight}

        assert choice(masses(1.01)) == [5, 15]
        assert choice(masses(0.99)) == [10, 15]
    assert choice({18: 100.0, 41: 1.0}) == [4, 15] and choice({24: 100.0, 41: 1.0}) == [6, 15]


def test_branches_that_see_everything_are_dense():
    where = site()
    one = {"compress": "mean", "encode_position": "none", "compress_length": 1}
    layer = make(SMALL | ALL | one | {"compress_stride": 1}, where)
    with torch.no_grad():
        layer.mechanism.gate.zero_()
    given, ctx = inputs(DOCUMENTS[-1], where), context(DOCUMENTS)
    out, grads = run(layer, given, ctx)
    want, wanted = run(make({"kind": "dense"}, where), given, ctx)
    torch.testing.assert_close(out, 1.5 * want, atol=1e-12, rtol=0)
    for grad, wants in zip(grads[1:4], wanted[1:4], strict=True):
        torch.testing.assert_close(grad, 1.5 * wants, atol=1e-12, rtol=0)


def closed_but(layer, given, branch):
    """Gates that let one branch pass."""
    with torch.no_grad():
        layer.mechanism.gate.fill_(-1e3)
        layer.mechanism.gate[:, branch] = 1e3
    given.hidden.fill_(1.0)


def test_only_chosen_blocks_have_a_gradient():
    where = site()
    layer, given = make(SMALL, where), inputs(200, where)
    closed_but(layer, given, 1)
    given.dout[:-1] = 0.0
    _, grads = run(layer, given, context([0, 200]))
    chosen = choices(layer, given, context([0, 200], kept={}))
    names = dict(zip(["hidden", "q", "k", "v", *parameters(layer)], grads, strict=True))
    for group in range(2):
        picked = chosen[199, group]
        assert len(picked) == 4 and {0, 23, 24} <= set(picked)
        mine = torch.isin(torch.arange(200) // 8, torch.tensor(picked))
        for x in (names["k"], names["v"]):
            assert torch.equal(x[:, group].ne(0).any(-1), mine)
    for name, grad in names.items():
        assert name.startswith(("keys.", "values.")) <= (not bool(grad.any())), name


def test_compression_learns_from_its_own_branch():
    where = site()
    layer, given = make(SMALL | {"encode_position": "keys_and_values"}, where), inputs(60, where)
    closed_but(layer, given, 0)
    _, grads = run(layer, given, context([0, 60]))
    names = dict(zip(["hidden", "q", "k", "v", *parameters(layer)], grads, strict=True))
    assert all(bool(grad.any()) for name, grad in names.items() if name not in ("hidden", "gate"))


@pytest.mark.parametrize("changes", [{}, {"branch_kv": "independent"}], ids=str)
@pytest.mark.parametrize("name", ["hidden", "q", "k", "v"])
def test_no_token_reaches_earlier_ones_or_other_documents(name, changes):
    where = site()
    layer, given = make(SMALL | changes, where), inputs(DOCUMENTS[-1], where)
    before = run(layer, given, context(DOCUMENTS))[0]
    for token in (3, 8, 10, 20, 47, 48, 90):
        moved = inputs(DOCUMENTS[-1], where)
        getattr(moved, name)[token] += 3.0
        after = run(layer, moved, context(DOCUMENTS))[0]
        end = min(stop for stop in DOCUMENTS if stop > token)
        same = (before == after).flatten(1).all(1)
        assert bool(same[:token].all()) and bool(same[end:].all())
        assert not bool(same[token])


@pytest.mark.parametrize("gate", ["head", "token"])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_last_rows_alone(count, gate):
    where, cu = site(), [0, 5, 70]
    layer = make(SMALL | {"branch_kv": "independent", "gate": gate}, where)
    given, rows = inputs(70, where), torch.arange(70 - count, 70)
    want = run(layer, given, context(cu))[0][rows]
    got = layer(given.hidden, given.q[rows], given.k, given.v, context(cu, rows=rows))
    torch.testing.assert_close(got.detach(), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("gate", ["head", "token"])
@pytest.mark.parametrize("branch_kv", ["shared", "independent"])
def test_heads_on_two_ranks_are_those_of_one(gate, branch_kv):
    settings, whole = SMALL | {"gate": gate, "branch_kv": branch_kv}, site()
    layer, given = make(settings, whole), inputs(DOCUMENTS[-1], whole)
    out, (dhidden, *wanted) = run(layer, given, context(DOCUMENTS))
    total, replicated = torch.zeros_like(dhidden), torch.zeros(())
    for rank in range(2):
        blocked = {"shared": lambda x: x.detach()}
        for how in ({}, blocked) if gate == "token" else ({},):
            where = site(heads=2, groups=1, first_head=2 * rank, all_heads=4, **how)
            part, mine = make(settings, where), inputs(DOCUMENTS[-1], whole)
            with torch.no_grad():
                for own, full in zip(part.parameters(), layer.parameters(), strict=True):
                    own.copy_(full.chunk(2)[rank] if own.by_head else full)
            for name in ("q", "k", "v", "dout"):
                setattr(mine, name, getattr(mine, name).chunk(2, 1)[rank])
            got, (dx, *grads) = run(part, mine, context(DOCUMENTS))
            torch.testing.assert_close(got, out.chunk(2, 1)[rank], atol=1e-12, rtol=0)
            for index, (grad, full) in enumerate(zip(grads, wanted, strict=True)):
                parameter = [None] * 3 + list(part.parameters())
                if parameter[index] is not None and not parameter[index].by_head:
                    # What is replicated has its gradient through `shared` and in no other way.
                    replicated = replicated + grad
                    assert how == {} or not bool(grad.any())
                    continue
                split = full.chunk(2, 1 if index < 3 else 0)[rank]
                torch.testing.assert_close(grad, split, atol=1e-12, rtol=0)
            # The layer adds the hidden states' gradients up: none may have been before.
            total = total + dx / (2 if gate == "token" else 1)
    torch.testing.assert_close(total, dhidden, atol=1e-12, rtol=0)
    if gate == "token":
        index = [x.by_head for x in layer.parameters()].index(False)
        torch.testing.assert_close(replicated, wanted[3 + index], atol=1e-12, rtol=0)


def test_the_second_pass_of_a_layer_sees_the_choice_of_the_first():
    where, given = site(), inputs(DOCUMENTS[-1], site())
    layer, ctx = make(SMALL, where), context(DOCUMENTS, kept={})
    first = choices(layer, given, ctx)
    moved = inputs(DOCUMENTS[-1], where, seed=5)
    kept = ctx.kept["nsa"]
    leaves = moved.leaves()
    out = layer(*leaves, ctx)
    assert not ctx.kept and first
    fresh = layer(*leaves, context(DOCUMENTS))
    again = layer(*leaves, context(DOCUMENTS, kept={"nsa": kept}))
    assert torch.equal(out, again) and not torch.equal(out, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_the_plain_computation(dtype):
    settings, cu = SMALL | ALL, DOCUMENTS
    narrow, wide = make(settings, site(dtype=dtype)), make(settings, site())
    given = inputs(cu[-1], site(), dtype=dtype)
    with torch.no_grad():
        for exact, rounded in zip(wide.parameters(), narrow.parameters(), strict=True):
            exact.copy_(rounded)
    out, grads = run(narrow, given, context(cu))
    results = []
    for layer in (narrow, wide):
        like = next(layer.parameters()).dtype
        leaves = [x.detach().to(like).requires_grad_() for x in given.leaves()]
        made, _ = twin(layer, settings, leaves)
        of = [*leaves, *layer.parameters()]
        results.append([made, *gradients(made, given.dout.to(like), of)])
    for naive, got, want in zip(results[0], [out, *grads], results[1], strict=True):
        assert got.dtype == dtype
        assert_as_good_as(naive, got, want)


def test_64k_tokens():
    settings = {"kind": "nsa", "count": 16, "window": 512}
    where = site(heads=1, groups=1, dim=16, dtype=torch.float32)
    layer = make(settings, where)
    run(layer, inputs(300, where, dtype=torch.float32), context([0, 300]))
    given = inputs(64 * 1024, where, dtype=torch.float32)
    with peak_growth() as growth:
        out, grads = run(layer, given, context([0, 64 * 1024]))
    assert growth.mib < 512, growth.mib
    assert all(bool(x.isfinite().all()) for x in [out, *grads])
