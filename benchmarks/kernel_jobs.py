"""Jobs: dense attention of others, ours, and attention over chosen blocks with their selection."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench import Bench, Job
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.backends import TABLE, choose
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.pool import pool
from longspan.kernels.reach import Reach
from longspan.kernels.request import Request
from longspan.kernels.scoring import Scoring
from longspan.kernels.selection import select_blocks
from longspan.kernels.selection_rule import SelectionRule
from longspan.kernels.windows import Windows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BLOCK, CHOSEN = 64, 16


def peers(bench: Bench) -> Iterator[Job]:
    """Dense causal attention of others: every backend of SDPA, and flash-attn if it is there."""
    pairs = bench.length * (bench.length + 1) // 2
    kinds = [SDPBackend.FLASH_ATTENTION]
    if bench.device.type == "cuda":
        kinds += [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    q, k, v = (x.transpose(0, 1)[None].detach() for x in (bench.q, bench.k, bench.v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dout = bench.dout.transpose(0, 1)[None]

    def back(given: Tensor) -> Any:
        return torch.autograd.grad(given, (q, k, v), dout, retain_graph=True)

    def sdpa() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for kind in kinds:
        name = f"SDPA {kind.name.split('_')[0].lower()}"
        yield Job(name, pairs, sdpa, back, partial(sdpa_kernel, kind))
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            flash_attn_func = __import__(name).flash_attn_func
        except (ImportError, AttributeError):
            continue
        rows = [x.detach()[None].requires_grad_() for x in (bench.q, bench.k, bench.v)]

        def forward(call: Any = flash_attn_func, rows: Any = rows) -> Any:
            out = call(*rows, causal=True)
            return out[0] if isinstance(out, tuple) else out

        def backward(given: Any, rows: Any = rows) -> Any:
            return torch.autograd.grad(given, rows, bench.dout[None], retain_graph=True)

        yield Job(name, pairs, forward, backward)


def backends(bench: Bench, reach: Reach, blocks: Blocks | None) -> list[str]:
    """The table's choice, and every other backend made for the device that can serve the call."""
    if bench.device.type != "cuda":
        return ["longspan"]
    request = Request.of(bench.q, bench.k, bench.v, reach, blocks, Scoring(bench.scale))
    made = [b for b in TABLE if b.name != "eager" and b.refuses(request) is None]
    chosen = choose(request)
    names = [f"longspan {b.name}" for b in made if b.load() is not chosen]
    return names if len(names) == len(made) else ["longspan", *names]


def dense(bench: Bench) -> Iterator[Job]:
    """One causal document; a window of 4,096; eight packed documents of unequal length."""
    n = bench.length
    shares = [0.05, 0.3, 0.02, 0.2, 0.13, 0.1, 0.15]
    cu = [0, *(int(sum(shares[: i + 1]) * n) for i in range(len(shares))), n]
    reaches = {"": Reach.documents([0, n]), "packed ": Reach.documents(cu)}
    if n > 4096:
        reaches["window "] = Reach.documents([0, n], 4096)
    for kind, reach in reaches.items():
        for name in backends(bench, reach, None):
            yield bench.ours(kind, name, reach, None, reach.area())


def random_blocks(bench: Bench) -> tuple[Reach, Blocks]:
    """Per token and key-value head the first block, its own and 14 at random of those between.

    One from each of 14 runs of blocks, so that none is drawn twice.
    """
    n, groups, drawn = bench.length, bench.k.shape[1], CHOSEN - 2
    own_T11 = (torch.arange(n) // BLOCK)[:, None, None]
    edges_T1N = torch.arange(drawn + 1) * (own_T11 - 1).clamp(min=0) // drawn
    sizes_T1N = edges_T1N.diff()
    draw = torch.Generator().manual_seed(1)
    ids = (
        1 + edges_T1N[..., :-1] + (torch.rand(n, groups, drawn, generator=draw) * sizes_T1N).long()
    )
    ids = ids.masked_fill(sizes_T1N == 0, -1)
    fixed = torch.cat([torch.zeros_like(own_T11), own_T11], -1).expand(n, groups, 2)
    blocks = Blocks.choose(torch.cat([ids, fixed], -1), Grid.documents([0, n], BLOCK))
    return Reach.documents([0, n]), Blocks(blocks.ids_QCN.to(bench.device), blocks.grid)


def pairs_of(blocks: Blocks) -> int:
    """Visible pairs of a head in one causal document."""
    ids_TCN = blocks.ids_QCN
    at_T = torch.arange(len(ids_TCN), device=ids_TCN.device)
    own_T11 = (at_T // BLOCK)[:, None, None]
    whole = int(((ids_TCN >= 0) & (ids_TCN < own_T11)).sum()) * BLOCK
    seen_T11 = (at_T % BLOCK + 1)[:, None, None]
    return (whole + int(((ids_TCN == own_T11) * seen_T11).sum())) // ids_TCN.shape[1]


def sparse(bench: Bench) -> Iterator[Job]:
    """Attention over 16 chosen blocks of 64, choosing them with 32/16 pooling, and both."""
    reach, blocks = random_blocks(bench)
    pairs = pairs_of(blocks)
    for name in backends(bench, reach, blocks):
        yield bench.ours("selected ", name, reach, blocks, pairs)
    windows = Windows.documents([0, bench.length], 32, 16)
    rule = SelectionRule(CHOSEN, initial=1, local=2)

    def select() -> Blocks:
        pooled = pool(bench.k, windows, "mean")
        how = {"scale": bench.scale}
        return select_blocks(bench.q, pooled, windows, blocks.grid, reach, rule, **how)

    yield Job("selection longspan", 0, select)

    def forward() -> tuple[Blocks, tuple[Tensor, Tensor]]:
        chosen = select()
        return chosen, attend(bench.q, bench.k, bench.v, reach, chosen, scale=bench.scale)

    def backward(given: tuple[Blocks, tuple[Tensor, Tensor]]) -> Any:
        inputs = bench.dout, bench.q, bench.k, bench.v, *given[1], reach, given[0]
        return attend_backward(*inputs, scale=bench.scale)

    chosen = pairs_of(select())
    yield Job("selection and attention longspan", chosen, forward, backward)
