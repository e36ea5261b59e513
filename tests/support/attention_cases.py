"""Random calls of `attend`, and their comparison with the twin."""

import random
from dataclasses import dataclass, field

import torch
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from reference.attention import naive_attend, naive_gradients
from reference.visibility import chosen, visible_in
from support.accuracy import assert_as_good_as, rms
from torch import Tensor

SCALE = 0.3


@dataclass
class Case:
    """One call: what goes in, and what each query may see by definition."""

    q: Tensor
    k: Tensor
    v: Tensor
    reach: Reach
    blocks: Blocks | None
    visible: Tensor
    softcap: float | None = None
    learned: dict[str, Tensor] = field(default_factory=dict)
    dlse: bool = True


def draw_case(seed: int, blocks: bool, dtype=torch.float64, longest: int = 60, **fixed) -> Case:
    """A call in which anything may happen: empty documents, shards, groups of queries, options.

    `fixed` overrides what is drawn: groups, repeat, dims, size (of blocks), count, options.
    """
    pick = random.Random(seed)
    draw = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *(pick.randint(0, longest) for _ in range(pick.randint(1, 4)))]).cumsum(0)
    total = int(cu[-1])
    reach = Reach.documents(cu, pick.choice([None, 1, 7, 20]))
    groups = fixed.get("groups", pick.choice([1, 2]))
    heads = groups * fixed.get("repeat", pick.choice([1, 2, 3, 4]))
    dim, value_dim = fixed.get("dims", (pick.choice([4, 5]), pick.choice([4, 7])))
    kept = (torch.rand(total, generator=draw) < pick.choice([1.0, 0.5])).nonzero()[:, 0]
    local = reach.keys(kept)
    visible = visible_in(local.first_T, local.last_T, len(kept))
    choice = None
    if blocks:
        choice = draw_blocks(pick, draw, cu, groups, heads, fixed).keys(kept)
        group_T = torch.arange(total) if choice.group_T is None else choice.group_T.on(CPU)
        grid = choice.grid.starts_B1
        visible = visible & chosen(choice.ids_QCN, grid, group_T, heads, len(kept))

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    case = Case(
        normal(total, heads, dim),
        normal(len(kept), groups, dim),
        normal(len(kept), groups, value_dim),
        local,
        choice,
        visible,
    )
    if fixed.get("options", True):
        case.softcap = pick.choice([None, None, 2.0])
        if pick.random() < 0.3:
            case.learned["sink_H"] = normal(heads)
            case.learned["sink_H"][0] = pick.choice([0.5, float("-inf")])
        if pick.random() < 0.3:
            bias_SH = case.learned["key_bias_SH"] = normal(len(kept), heads)
            hidden = pick.choice([0.0, 0.0, 0.3, 0.9])
            bias_SH[torch.rand(bias_SH.shape, generator=draw) < hidden] = float("-inf")
        case.dlse = pick.random() < 0.7
    return case


CPU = torch.device("cpu")


def draw_blocks(pick, draw, cu, groups: int, heads: int, fixed) -> Blocks:
    """Choices with duplicates, holes, other documents' blocks and blocks out of reach."""
    total = int(cu[-1])
    grid = Grid.documents(cu, fixed.get("size", pick.choice([1, 3, 8, 16])))
    starts = None if pick.random() < 0.5 else Grid.documents(cu, pick.choice([2, 5])).starts_B1
    queries = total if starts is None else len(starts) - 1
    block_heads = pick.choice([1, groups, heads])
    shape = (queries, block_heads, fixed.get("count", pick.choice([1, 3, 6, 20])))
    ids = torch.randint(-2, max(1, len(grid)), shape, generator=draw)
    if not len(grid):
        ids = torch.full(shape, -1)
    return Blocks.choose(ids, grid, starts, check=True)


def run_case(case: Case, device="cpu", seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """What `attend` and `attend_backward` give, and gradients of output and lse to go in."""
    draw = torch.Generator().manual_seed(seed)
    tensors = [x.to(device) for x in (case.q, case.k, case.v)]
    learned = {name: x.to(device) for name, x in case.learned.items()}
    how = {"scale": SCALE, "softcap": case.softcap, **learned}
    blocks = case.blocks
    if blocks is not None:
        blocks = Blocks(blocks.ids_QCN.to(device), blocks.grid, blocks.query_starts)
    out, lse = attend(*tensors, case.reach, blocks, **how)
    dout = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(case.q.dtype)
    dlse = torch.randn(lse.shape, generator=draw, dtype=torch.float64).to(lse.dtype)
    dlse = dlse if case.dlse else None
    moved = None if dlse is None else dlse.to(device)
    grads = attend_backward(
        dout.to(device), *tensors, out, lse, case.reach, blocks, dlse_TH=moved, **how
    )
    parts = [*grads[:3], *(getattr(grads, "d" + name) for name in case.learned)]
    return [x.cpu() for x in (out, lse, *parts)], [dout, dlse]


def twin_case(case: Case, given: list[Tensor], dtype=torch.float64) -> list[Tensor]:
    """The same by definition, computed in `dtype`."""
    how = {"softcap": case.softcap, **case.learned}
    out, lse = naive_attend(case.q, case.k, case.v, case.visible, SCALE, **how, dtype=dtype)
    dout, dlse = given
    inputs = dout, case.q, case.k, case.v, case.visible, SCALE, dlse
    return [out, lse, *naive_gradients(*inputs, **how, dtype=dtype)]


def assert_close_as_naive(case: Case, got: list[Tensor], given: list[Tensor]) -> None:
    """RMS errors within 1.5 times those of the naive computation in the same dtype, and 2 eps.

    2 eps of the result, or of the terms that it is the difference of: a softmax gradient is
    weight * (dout . v - dout . out), which is nothing but rounding where one key has all weight.
    """
    eps = torch.finfo(case.q.dtype).eps
    wants, naive = twin_case(case, given), twin_case(case, given, case.q.dtype)
    # As the gradient of the lse, this puts -|dout| . |out| in the place of dout . out.
    products = wants[0] * given[0]
    terms = twin_case(case, [given[0], (products + products.abs()).sum(-1)])
    # A score is a sum as well, and the lse of one score has nothing else.
    terms[1] = naive_attend(case.q.abs(), case.k.abs(), case.v, case.visible, SCALE)[1]
    names = ["out", "lse", "dq", "dk", "dv", *case.learned]
    for name, have, want, plain, term in zip(names, got, wants, naive, terms, strict=True):
        sizes = (rms(x[want.isfinite()]) for x in (term, want))
        floor = 2 * eps * max(0.0, next(sizes) - next(sizes))
        assert_as_good_as(plain, have, want, floor, name)
