"""The kernels over chosen blocks compile for GPUs that are not there."""

from support.triton_compile import run

PROGRAM = """
from longspan.kernels.triton import (
    sparse_blocks, sparse_blocks_backward, sparse_keys, sparse_rows, sparse_rows_backward,
)
from longspan.kernels.triton.sparse_shape import Shape
from longspan.kernels.scoring import Scoring
from support.triton_compile import compiled, report

STRIDES = dict.fromkeys(["qt", "qh", "kt", "kh", "vt", "vh", "ot", "oh", "bt", "bh"], "i32")
INDICES = dict.fromkeys(["ids", "starts", "groups", "first", "last", "order", "owners"], "*i32")
WORK = dict.fromkeys(["item_Z", "begin_Z", "end_Z", "slot_Z"], "*i64") | dict(segment_I="*i32")
SUMS = dict.fromkeys(["lse", "delta", "dq", "dk", "dv", "dbias", "sums", "bias"], "*fp32")
TYPES = STRIDES | INDICES | WORK | SUMS | dict(scale="fp32", softcap="fp32")
TYPES |= dict.fromkeys(["q", "k", "v", "out", "dout", "part"], "*bf16")
TYPES |= dict.fromkeys(["dk_part", "dv_part", "dbias_part"], "*fp32")

for capability, block, rows in {cases!r}:
    shape = Shape(4, 4, 16, block, rows, 1, 128, 128, 64, 4096, 2)
    fixed = shape.constants(Scoring(0.1), grouped=False)
    tiles = dict(KT=shape.key_tiles, BK=shape.key_tile)
    merge = dict(C=4, H=shape.heads, N=16, KT=shape.key_tiles, V=128, D=128, VP=128, DP=128,
                 GROUPED=False, ROWS=2, TILE=16)
    jobs = [
        (sparse_blocks._parts, sparse_blocks.options, tiles),
        (sparse_blocks_backward._parts, sparse_blocks_backward.options, tiles),
        (sparse_keys._keys, sparse_keys.options, tiles | dict(HG=rows, HP=16)),
        (sparse_rows._forward, sparse_rows.options, dict()),
        (sparse_rows_backward._queries, sparse_rows_backward.options, dict(ATOMIC=False)),
    ]
    for tuned, options, more in jobs:
        given = fixed | more
        config = options(given)[0]
        how = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        given |= config.kwargs
        report(tuned.kernel, compiled(tuned.kernel, TYPES, given, capability, **how))
    for kernel in (sparse_blocks._merge, sparse_blocks_backward._sum):
        report(kernel, compiled(kernel, TYPES, merge, capability, num_warps=1))
"""

CASES = [(90, 64, 16)]
"""Capability, keys of a block, query heads of a choice."""

NAMES = ["_parts", "_parts", "_keys", "_forward", "_queries", "_merge", "_sum"]


def test_kernels_compile_and_fit():
    found = run(PROGRAM.format(cases=CASES))
    assert [name for name, _, _ in found] == NAMES * len(CASES)
    assert all(size > 0 and shared <= 227 * 1024 for _, size, shared in found)
