"""Kernels on a GPU, at sizes that their tiles are made for. Skipped where there is none.

What passes here is entered as proven: in `backends.TABLE`, in `cuda.standing`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.backends import TABLE, use
from longspan.kernels.blocks import Blocks, Inverse
from longspan.kernels.cuda import standing
from longspan.kernels.grid import Grid
from longspan.kernels.merge import merge_parts
from longspan.kernels.pool import pool
from longspan.kernels.reach import Reach
from longspan.kernels.request import Request
from longspan.kernels.scoring import Scoring
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.top import top_ids
from longspan.kernels.triton.tuning import Tuned
from longspan.kernels.windows import Windows
from reference.visibility import chosen, visible_in
from support.attention_cases import CPU, SCALE, Case, assert_close_as_naive, run_case
from support.poison import poisoned

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

SIZE = 1000
CU = [0, 350, 351, 720, 720, SIZE]
REACHES = {
    "one": Reach.documents([0, SIZE]),
    "packed": Reach.documents(CU),
    "windows": Reach.documents(CU, 150),
    "own shard": Reach.documents([0, 2 * SIZE])
    .rows(torch.arange(SIZE, 2 * SIZE))
    .keys(torch.arange(SIZE, 2 * SIZE)),
    "earlier shard": Reach.documents([0, 2 * SIZE])
    .rows(torch.arange(SIZE, 2 * SIZE))
    .keys(torch.arange(SIZE)),
    "two chunks": Reach.documents([0, 2 * SIZE])
    .rows(torch.cat([torch.arange(500), torch.arange(1500, 2000)]))
    .keys(torch.arange(SIZE)),
}


@dataclass(frozen=True)
class Shape:
    """A call. `size` of blocks (None for all keys), `span` tokens of a query group."""

    reach: str = "packed"
    groups: int = 2
    repeat: int = 4
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    options: bool = False
    size: int | None = None
    count: int = 8
    choosers: int = 2
    span: int = 1

    def __str__(self) -> str:
        new = Shape()
        changed = (n for n in self.__dataclass_fields__ if getattr(self, n) != getattr(new, n))
        return " ".join(f"{n}={getattr(self, n)}" for n in changed) or "plain"


DIMS = [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)]
DTYPES = [torch.float16, torch.float32]
BLOCKS = Shape(size=64)
LARGE = Shape("one", 4, 16, size=64, count=16, choosers=4)
DENSE = [
    *(Shape(name) for name in REACHES),
    *(Shape(repeat=repeat) for repeat in (1, 7, 16)),
    *(Shape(dims=dims) for dims in DIMS),
    *(Shape(dtype=dtype) for dtype in DTYPES),
    Shape(options=True),
]
SPARSE = [
    LARGE,
    *(replace(BLOCKS, reach=name) for name in REACHES),
    *(replace(BLOCKS, repeat=repeat) for repeat in (1, 2, 16, 32)),
    *(replace(BLOCKS, dims=dims, repeat=repeat) for dims in DIMS for repeat in (2, 16)),
    *(replace(BLOCKS, dtype=dtype) for dtype in DTYPES),
    *(replace(BLOCKS, options=True, repeat=repeat) for repeat in (4, 16)),
    *(replace(BLOCKS, size=size, count=max(8, 64 // size)) for size in (1, 16, 32, 128)),
    *(replace(BLOCKS, choosers=choosers) for choosers in (1, 8)),
    replace(BLOCKS, count=40, size=16),
    *(replace(BLOCKS, dims=dims, size=16) for dims in ((256, 16), (16, 256), (256, 256))),
    *(replace(BLOCKS, span=span) for span in (8, 64, 128)),
]


def case_of(shape: Shape) -> Case:
    draw = torch.Generator().manual_seed(0)
    reach = REACHES[shape.reach]
    heads = shape.groups * shape.repeat

    def normal(*sizes, dtype=shape.dtype):
        return torch.randn(*sizes, generator=draw).to("cuda", dtype)

    q = normal(SIZE, heads, shape.dims[0]) * (shape.dims[0] ** -0.5 / SCALE)  # scores of about 1
    k, v = (normal(SIZE, shape.groups, dim) for dim in shape.dims)
    visible = visible_in(reach.first_T, reach.last_T, SIZE)
    blocks = None
    if shape.size is not None:
        blocks = blocks_of(shape, draw)
        rows = torch.arange(SIZE) if blocks.group_T is None else blocks.group_T.on(CPU)
        visible = visible & chosen(blocks.ids_QCN, blocks.grid.starts_B1, rows, heads, SIZE)
    case = Case(q, k, v, reach, blocks, visible.cuda())
    if shape.options:
        case.softcap = 5.0
        case.learned["sink_H"] = normal(heads, dtype=torch.float32)
        case.learned["key_bias_SH"] = normal(SIZE, heads, dtype=torch.float32)
    # Libraries know no gradient of the lse.
    case.dlse = shape.options
    return case


def blocks_of(shape: Shape, draw) -> Blocks:
    """Some blocks at random, the one where the row is and twice the same."""
    grid = Grid.documents(CU if shape.reach == "packed" else [0, SIZE], shape.size)
    starts = None if shape.span == 1 else Grid.documents(CU, shape.span).starts_B1
    token_Q = torch.arange(SIZE) if starts is None else starts[:-1].clamp(max=SIZE - 1)
    own_Q = torch.searchsorted(grid.starts_B1, token_Q, right=True) - 1
    random = torch.rand(len(own_Q), shape.choosers, shape.count - 1, generator=draw)
    ids = (random * (own_Q[:, None, None] + 1)).long()
    own_QC1 = own_Q[:, None, None].expand(-1, shape.choosers, 1)
    return Blocks.choose(torch.cat([ids, own_QC1], -1), grid, starts, check=True)


@dataclass(frozen=True)
class Launcher:
    """A kernel with one of its launch options."""

    kernel: Any
    config: Any

    def __getitem__(self, grid):
        return partial(self.kernel[grid], **self.config.all_kwargs())


@pytest.fixture
def launch_option(monkeypatch):
    """Triton's kernels run with the numbered one of their launch options, without a search."""

    def choose(number: int) -> None:
        def tuner(self, configs):
            return Launcher(self.kernel, configs[number % len(configs)])

        monkeypatch.setattr(Tuned, "_tuner", tuner)

    return choose


CALLS = [
    *((backend, shape, n) for n, shape in enumerate(DENSE + SPARSE)
      for backend in ("triton", "flash", "cudnn")),
    *(("triton", shape, n) for shape in (Shape(), BLOCKS, LARGE) for n in range(4)),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "shape", "option"), CALLS, ids=str)
def test_errors_are_those_of_the_dtype(backend, shape, option, launch_option):
    launch_option(option)
    case = case_of(shape)
    tensors = case.q, case.k, case.v
    scoring = Scoring(SCALE, case.softcap, case.learned.get("key_bias_SH"))
    blocks = case.blocks and Blocks(
        case.blocks.ids_QCN.cuda(), case.blocks.grid, case.blocks.query_starts
    )
    request = Request.of(*tensors, case.reach, blocks, scoring, dlse=case.dlse)
    reason = next(b for b in TABLE if b.name == backend).refuses(request)
    if reason is not None:
        pytest.skip(reason)
    with use(backend), poisoned():
        got, ways = run_case(case, "cuda")
    assert_close_as_naive(case, got, [None if x is None else x.cuda() for x in ways])


@pytest.mark.parametrize("shape", [replace(BLOCKS, size=1, count=64), BLOCKS, LARGE], ids=str)
def test_deterministic(shape, launch_option):
    launch_option(1)
    case = case_of(shape)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with use("triton"):
            first, ways = run_case(case, "cuda")
            second, _ = run_case(case, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close_as_naive(case, first, [None if x is None else x.cuda() for x in ways])


@pytest.mark.parametrize("chosen_blocks", [False, True])
def test_offsets_beyond_32_bits(chosen_blocks):
    """The last document of so many tokens that element numbers pass 2^31, and it alone."""
    rows, heads, dim, tail = 2**20 + 2**10, 34, 64, 300
    assert rows * heads * dim > 2**31
    q, k, v, dout = (torch.empty(rows, heads, dim, device="cuda", dtype=torch.bfloat16).normal_()
                     for _ in range(4))  # fmt: skip
    found = []
    with use("triton"):
        for cu in ([0, rows - tail, rows], [0, tail]):
            first = cu[-1] - tail
            here = [x[len(x) - cu[-1] :] for x in (q, k, v, dout)]
            reach, blocks = Reach.documents(cu, 64), None
            if chosen_blocks:
                grid = Grid.documents(cu, 64)
                own_T = torch.searchsorted(grid.starts_B1, torch.arange(cu[-1]), right=True) - 1
                before_T = torch.where(reach.first_T < grid.starts_B1[own_T], own_T - 1, own_T)
                ids = torch.stack([before_T, own_T], -1)[:, None].cuda()
                blocks = Blocks.choose(ids, grid)
            out, lse = attend(*here[:3], reach, blocks, scale=0.1)
            grads = attend_backward(here[3], *here[:3], out, lse, reach, blocks, scale=0.1)
            found.append([x[first:].clone() for x in (out, lse, *grads[:3])])
            del out, lse, grads
    for long, alone in zip(*found, strict=True):
        torch.testing.assert_close(long, alone, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("count", [1, 16, 2048])
@pytest.mark.parametrize("candidates", [5, 1000, 4000, 20000, 70000])
def test_cuda_top(candidates, count):
    draw = torch.Generator("cuda").manual_seed(candidates)
    scores = torch.randn(300, candidates, generator=draw, device="cuda")
    scores[100:200].mul_(3).round_()  # ties
    scores[torch.rand(scores.shape, generator=draw, device="cuda") < 0.1] = float("-inf")
    scores[::7, ::3] = float("inf")
    scores[5, 2] = float("nan")
    with standing.use():
        want = top_ids(scores, count)
    with standing.use("top"):
        assert torch.equal(top_ids(scores, count), want)


@pytest.mark.parametrize("blocks", [1, 700, 5000, 30000])
@pytest.mark.parametrize(("heads", "as_one"), [(1, 1), (4, 4), (4, 2)])
def test_cuda_invert(blocks, heads, as_one):
    draw = torch.Generator("cuda").manual_seed(blocks)
    ids = torch.randint(-1, blocks, (3000, heads, 16), generator=draw, device="cuda")
    picked = Blocks.choose(ids, Grid.documents([0, 4 * blocks], 4))
    with standing.use():
        want = Inverse.of(picked, as_one)
    with standing.use("invert"):
        got = Inverse.of(picked, as_one)
    assert torch.equal(got.starts_CB1, want.starts_CB1)
    end = int(want.starts_CB1[-1])
    assert torch.equal(got.order_P[:end], want.order_P[:end])
    assert torch.equal(got.groups_P[:end], want.groups_P[:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_merge(dtype):
    draw = torch.Generator("cuda").manual_seed(0)
    parts = torch.randn(1001, 19, 128, generator=draw, device="cuda").to(dtype)
    lse = 3 * torch.randn(1001, 19, generator=draw, device="cuda")
    lse[lse < -2] = float("-inf")
    lse[:100] = float("-inf")
    parts[lse == float("-inf")] = float("nan")
    with standing.use():
        want = merge_parts(parts, lse)
    with standing.use("merge"):
        got = merge_parts(parts, lse)
    eps = torch.finfo(dtype).eps
    for have, true in zip(got, want, strict=True):
        torch.testing.assert_close(have, true, atol=eps, rtol=2 * eps)


RULES = [
    SelectionRule(16, initial=1, local=2),
    SelectionRule(16, statistic="logit", heads="none", mapping="overlap_max"),
    SelectionRule(16, heads="max", mapping="overlap_max"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.statistic} {rule.heads}")
@pytest.mark.parametrize("repeat", [1, 16])
def test_triton_selection(rule, repeat):
    """Choices by Triton's scores and CUDA's top-k are eager's, but for near ties."""
    draw = torch.Generator("cuda").manual_seed(0)
    cu = [0, 3000, 3001, 8192]
    q, keys = (torch.randn(8192, n, 128, generator=draw, device="cuda").bfloat16()
               for n in (2 * repeat, 2))  # fmt: skip
    windows, grid = Windows.documents(cu, 32, 16), Grid.documents(cu, 64)
    inputs = q, pool(keys, windows, "mean"), windows, grid, Reach.documents(cu), rule
    with use("eager"), standing.use():
        want = select_blocks(*inputs, scale=0.1).ids_QCN
    with use("triton"), standing.use("top"):
        got = select_blocks(*inputs, scale=0.1).ids_QCN
    assert got.shape == want.shape
    assert ((got >= 0).sum(-1) == (want >= 0).sum(-1)).all()
    # bf16 products are exact in fp32, sums are not: about one choice in a thousand is a near tie.
    assert (got != want).any(-1).float().mean() < 0.02
