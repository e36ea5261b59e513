import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from longspan.kernels.cuda.top import top_ids as cuda_top_ids
from longspan.kernels.top import top_ids

INF, NAN = float("inf"), float("nan")
# Few distinct values, so that ties are the rule.
FEW = [-INF, -3e38, -2.5, -0.0, 0.0, 1e-42, 1e-41, 3.0, INF, NAN, -NAN]


@st.composite
def cases(draw):
    """Scores [R, X] in a larger tensor whose other values must not be looked at, and a count."""
    rows, candidates = draw(st.integers(1, 3)), draw(st.integers(0, 200))
    seed, kind = draw(st.integers(0, 2**31)), draw(st.sampled_from(["few", "normal", "near"]))
    random = torch.Generator().manual_seed(seed)
    if kind == "few":
        choice = torch.randint(draw(st.integers(1, len(FEW))), (rows, candidates), generator=random)
        scores = torch.tensor(FEW)[choice]
    else:
        scores = torch.randn(rows, candidates, generator=random)
    if kind == "near":  # equal in all digits but the last
        scores = 1.0 + scores.abs().floor() * 2**-23
    before, after = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    around = torch.full((rows, before + candidates + after), NAN)
    around[:, before : before + candidates] = scores
    count = draw(st.sampled_from([1, 2, 7, 31, 64, 100, 199, 200, 230]))
    return around[:, before : before + candidates], count


@pytest.mark.parametrize("fits", [32, 4096])
@settings(deadline=None, max_examples=40)
@given(cases(), st.booleans())
@example((torch.tensor([FEW * 9]), 7), False)
@example((torch.zeros(1, 0), 3), False)
@example((torch.tensor([[-INF, -INF, -3e38, -INF] * 20]), 7), False)
def test_equals_the_torch_form(shim, fits, case, backwards):
    scores, count = case
    shim.defines, shim.backwards = {"LIST": fits}, backwards
    got = cuda_top_ids(scores, count)
    assert got.dtype == torch.int32
    assert got.tolist() == top_ids(scores, count).tolist()


@pytest.mark.parametrize("candidates", [1024, 1025, 4097, 66000])
def test_every_launch(shim, candidates):
    shim.defines = {}
    random = torch.Generator().manual_seed(candidates)
    scores = torch.randn(2, candidates, generator=random)
    scores[1] = (scores[1] * 2).round()
    for count in (5, 700):
        assert torch.equal(cuda_top_ids(scores, count), top_ids(scores, count))


def test_other_dtypes_and_strides(shim):
    shim.defines = {}
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cuda_top_ids(scores.T, 4), top_ids(scores.T, 4))
    half = scores.bfloat16()[:, 1:8]
    assert torch.equal(cuda_top_ids(half, 4), top_ids(half, 4))
    assert cuda_top_ids(scores, 0).shape == (50, 0)
    assert cuda_top_ids(scores[:0], 4).shape == (0, 4)
