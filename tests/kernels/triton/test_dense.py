import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.merge import merge
from longspan.kernels.reach import Reach
from longspan.kernels.triton import backend
from reference.attention import naive_attend, naive_gradients
from reference.visibility import visible_in
from support.accuracy import assert_as_good_as

SCALE = 0.3


def draw(device, reach, keys, heads=(2, 1), dims=(5, 5), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (len(reach), heads[0], dims[0]), (keys, heads[1], dims[0]), (keys, heads[1], dims[1])
    return [torch.randn(x, generator=generator).to(device, dtype) for x in shapes]


def assert_close_to_twin(
    device, reach, keys, *, scale=SCALE, softcap=None, with_bias=False, **shape
):
    """Output, lse and all gradients against the twin; the naive one has the inputs' dtype."""
    q, k, v = draw(device, reach, keys, **shape)
    learned, generator = {}, torch.Generator().manual_seed(1)
    if with_bias:
        learned["key_bias_SH"] = torch.randn(keys, q.shape[1], generator=generator).to(device)
    options = {"scale": scale, "softcap": softcap, **learned}
    out, lse = attend(q, k, v, reach, **options)
    assert out.is_contiguous() and out.dtype == q.dtype and lse.dtype == torch.float32
    dout = torch.randn(out.shape, generator=generator).to(out)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    grads = attend_backward(dout, q, k, v, out, lse, reach, dlse_TH=dlse, **options)
    got = [out, lse, *(x for x in grads if x is not None)]
    assert all(x.dtype == torch.float32 for x in got[1:])
    visible = visible_in(reach.first_T, reach.last_T, keys)
    on_host = {name: x.cpu() for name, x in learned.items()}
    inputs = [x.cpu() for x in (q, k, v)]
    both = []
    for dtype in (torch.float64, q.dtype):
        ends = naive_attend(*inputs, visible, scale, softcap, **on_host, dtype=dtype)
        slopes = naive_gradients(
            dout.cpu(), *inputs, visible, scale, dlse.cpu(), softcap, **on_host, dtype=dtype
        )
        both.append([*ends, *slopes])
    # dq, dk and the bias's have dout . v - dout . out, which is 0 for a row with one key; those of
    # a key add it up over rows.
    left = 2 * torch.finfo(torch.float32).eps * v.shape[2] ** 0.5
    added = left * max(1, q.shape[0] * q.shape[1] // k.shape[1]) ** 0.5
    floors = (0.0, 0.0, abs(scale) * left, abs(scale) * added, 0.0, added)
    assert len(got) == len(both[0])
    for floor, mine, want, naive in zip(floors, got, *both, strict=False):
        assert_as_good_as(naive, mine, want, floor)


@settings(
    max_examples=20,
    deadline=None,
    # Shrinking a failure would take the interpreter minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_any_rows_over_any_keys(device, data):
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu[-1])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    keep = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    keys = (torch.rand(total, generator=generator) < keep).nonzero()[:, 0]
    rows = torch.randperm(total, generator=generator)[: data.draw(st.integers(0, total))]
    if data.draw(st.booleans()):
        rows = rows.sort().values
    reach = Reach.documents(cu, data.draw(st.none() | st.integers(1, 60)))
    groups = data.draw(st.integers(1, 2))
    assert_close_to_twin(
        device,
        reach.rows(rows).keys(keys),
        len(keys),
        heads=(groups * data.draw(st.integers(1, 3)), groups),
        dims=(data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))),
        scale=data.draw(st.sampled_from([SCALE, -SCALE])),
        softcap=data.draw(st.none() | st.just(1.5)),
        with_bias=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(device, dtype, window):
    assert_close_to_twin(
        device, Reach.documents([0, 80, 81, 110], window), 110, dtype=dtype, dims=(16, 16)
    )


@pytest.mark.parametrize("window", [None, 130])
def test_a_chunk_of_rows_whose_intervals_end_just_before_a_tile_does(device, window):
    # Row 126 sees keys 0 to 126: one less than fills tiles of any size. The last tile of rows has
    # two, so that with a window just one key comes before those that both see.
    assert_close_to_twin(
        device, Reach.documents([0, 160], window).rows(torch.arange(126, 160)), 160
    )


@pytest.mark.parametrize(
    "dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (64, 256)], ids=str
)
def test_head_dims(device, dims):
    assert_close_to_twin(
        device, Reach.documents([0, 50]), 50, dtype=torch.bfloat16, dims=dims, scale=0.1
    )


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (8, 1)], ids=str)
def test_query_heads_share_key_value_heads(device, heads):
    assert_close_to_twin(device, Reach.documents([0, 40]), 40, heads=heads)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores(device, softcap, with_bias):
    reach = Reach.documents([0, 20, 90], 60)
    shape = {"dtype": torch.bfloat16, "heads": (2, 2)}
    assert_close_to_twin(device, reach, 90, softcap=softcap, with_bias=with_bias, **shape)


@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_flat_and_steep_scores(device, scale):
    # Not in fp32: an lse of 200 is rounded to 1.5e-5, and with it the backward's weights.
    assert_close_to_twin(device, Reach.documents([0, 60]), 60, scale=scale, dtype=torch.float16)


def test_a_bias_of_minus_infinity_hides_a_key(device):
    reach = Reach.documents([0, 40])
    q, k, v = draw(device, reach, 40)
    bias = torch.zeros(40, 2, device=device)
    bias[:20] = float("-inf")
    out, lse = attend(q, k, v, reach, scale=SCALE, key_bias_SH=bias)
    assert not bool(out[:20].any()) and bool((lse[:20] == float("-inf")).all())
    late = reach.keys(torch.arange(20, 40))
    want, want_lse = attend(q, k[20:], v[20:], late, scale=SCALE)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    dout = torch.ones_like(out)
    grads = attend_backward(dout, q, k, v, out, lse, reach, scale=SCALE, key_bias_SH=bias)
    wants = attend_backward(dout, q, k[20:], v[20:], out, lse, late, scale=SCALE)
    torch.testing.assert_close(grads.dq_THD, wants.dq_THD)
    for whole, part in ((grads.dk_SGD, wants.dk_SGD), (grads.dv_SGV, wants.dv_SGV)):
        assert not bool(whole[:20].any())
        torch.testing.assert_close(whole[20:], part)


@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 40), slice(0, 80)], ids=str)
def test_rows_that_see_nothing(device, rows):
    index = torch.arange(80)[rows]
    reach = Reach.documents([0, 40, 80]).rows(index).keys(torch.arange(50, 80))
    q, k, v = draw(device, reach, 30)
    out, lse = attend(q, k, v, reach, scale=SCALE)
    blind = (reach.first_T >= reach.last_T).to(device)
    assert not bool(out[blind].any()) and bool((lse[blind] == float("-inf")).all())
    assert_close_to_twin(device, reach, 30, dtype=torch.bfloat16)


def test_no_keys_and_no_rows(device):
    for reach, keys in ((Reach.documents([0, 8]).keys(torch.arange(0)), 0),
                        (Reach.documents([0]), 0), (Reach.documents([0]), 7)):  # fmt: skip
        assert_close_to_twin(device, reach, keys, with_bias=True)


def test_keys_that_nobody_sees_are_not_read(device):
    reach = Reach.documents([0, 70]).rows(torch.arange(60, 66))
    q, k, v = draw(device, reach, 200)
    k[66:], v[66:] = float("nan"), float("nan")
    out, lse = attend(q, k, v, reach, scale=SCALE)
    grads = attend_backward(out, q, k, v, out, lse, reach, scale=SCALE)
    want, _ = attend(q, k[:66], v[:66], reach, scale=SCALE)
    assert torch.equal(out, want)
    assert all(bool(x.isfinite().all()) for x in grads[:3])
    assert not bool(grads.dk_SGD[66:].any()) and not bool(grads.dv_SGV[66:].any())


def refuse_to_copy(x):
    assert x.is_contiguous(), f"a copy of {list(x.shape)}"
    return x


def test_strided_inputs_without_copies(device, monkeypatch):
    reach = Reach.documents([0, 33, 70])
    fused = torch.randn(70, 3, 2, 8, device=device)
    q, k, v = fused.unbind(1)
    v = v.transpose(0, 1).contiguous().transpose(0, 1)
    bias = torch.randn(2, 70, device=device).T
    dout = torch.randn(2, 70, 8, device=device).transpose(0, 1)
    options = {"scale": SCALE, "key_bias_SH": bias}
    want = attend(*(x.contiguous() for x in (q, k, v)), reach, **options)
    whole = [x.contiguous() for x in (dout, q, k, v)]
    wants = attend_backward(*whole, *want, reach, **options)
    monkeypatch.setattr(torch.Tensor, "contiguous", refuse_to_copy)
    got = attend(q, k, v, reach, **options)
    grads = attend_backward(dout, q, k, v, *got, reach, **options)
    for a, b in zip((*got, *grads), (*want, *wants), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_an_expanded_gradient_and_a_wide_one(device):
    reach = Reach.documents([0, 50])
    q, k, v = draw(device, reach, 50, dtype=torch.bfloat16)
    out, lse = attend(q, k, v, reach, scale=SCALE, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    ones = torch.ones(1, 1, 1, device=device).expand_as(out)
    got = attend_backward(ones, q, k, v, out, lse, reach, scale=SCALE)
    want = attend_backward(torch.ones_like(out), q, k, v, out, lse, reach, scale=SCALE)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True))


def by_lot():
    index = torch.randperm(90, generator=torch.Generator().manual_seed(5))
    return Reach.documents([0, 30, 31, 90]), [index[:30].sort().values, index[30:].sort().values]


def by_document():
    # Every other row sees all of the later shard's first tiles, the rows between nothing of it.
    rows = torch.stack([torch.arange(20), torch.arange(180, 200)], dim=1).flatten()
    return Reach.documents([0, 40, 200]).rows(rows), list(torch.arange(200).split([40, 160]))


@pytest.mark.parametrize("cut", [by_lot, by_document])
def test_two_shards_merge_to_the_whole_and_their_backwards_add_up(device, cut):
    reach, shards = cut()
    q, k, v = draw(device, reach, sum(map(len, shards)), dims=(8, 8))
    parts = [(reach.keys(shard), shard.to(device)) for shard in shards]
    results = [attend(q, k[at], v[at], local, scale=SCALE) for local, at in parts]
    out, lse = merge(*results[0], *results[1])
    want_out, want_lse = attend(q, k, v, reach, scale=SCALE)
    torch.testing.assert_close(out, want_out)
    torch.testing.assert_close(lse, want_lse)
    dout = torch.randn_like(out)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for local, at in parts:
        grads = attend_backward(dout, q, k[at], v[at], out, lse, local, scale=SCALE)
        dq += grads[0]
        dk[at], dv[at] = grads[1], grads[2]
    wants = attend_backward(dout, q, k, v, want_out, want_lse, reach, scale=SCALE)
    for grad, want in zip((dq, dk, dv), wants[:3], strict=True):
        torch.testing.assert_close(grad, want, atol=2e-5, rtol=2e-5)


def test_sinks(device):
    reach = Reach.documents([0, 10, 60])
    q, k, v = draw(device, reach, 60)
    sink = torch.tensor([0.5, -1.0], device=device)
    out, lse = attend(q, k, v, reach, scale=SCALE, sink_H=sink)
    visible = visible_in(reach.first_T, reach.last_T, 60)
    inputs = [x.cpu() for x in (q, k, v)]
    want, want_lse = naive_attend(*inputs, visible, SCALE, sink_H=sink.cpu())
    torch.testing.assert_close(out.cpu().double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-5, rtol=1e-5)
    grads = attend_backward(out, q, k, v, out, lse, reach, scale=SCALE, sink_H=sink)
    wants = naive_gradients(out.cpu(), *inputs, visible, SCALE, sink_H=sink.cpu())
    for grad, want in zip(grads[:4], wants, strict=True):
        torch.testing.assert_close(grad.cpu().double(), want, atol=1e-5, rtol=1e-5)


def test_it_says_what_it_cannot_do(device, monkeypatch):
    reach = Reach.documents([0, 4])
    with pytest.raises(ValueError, match="float64"):
        attend(*draw(device, reach, 4, dtype=torch.float64), reach, scale=SCALE)
    with pytest.raises(ValueError, match="up to 256, not 257"):
        attend(*draw(device, reach, 4, dims=(8, 257)), reach, scale=SCALE)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        attend(*draw("cpu", reach, 4), reach, scale=SCALE)
