"""Every backend on a GPU, at sizes that its tiles are made for. Skipped where there is none.

Backends that pass here are entered in `backends.TABLE` as proven.
"""

import pytest
import torch
from longspan.kernels.attend import attend, attend_backward
from longspan.kernels.backends import TABLE, use
from longspan.kernels.blocks import Blocks
from longspan.kernels.grid import Grid
from longspan.kernels.reach import Reach
from longspan.kernels.request import Request
from longspan.kernels.scoring import Scoring

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

SCALE = 0.1
CU = [0, 700, 701, 1500, 1500, 2048]
REACHES = {
    "one": Reach.documents([0, 2048]),
    "packed": Reach.documents(CU),
    "windows": Reach.documents(CU, 300),
    "own shard": Reach.documents([0, 4096])
    .rows(torch.arange(2048, 4096))
    .keys(torch.arange(2048, 4096)),
    "earlier shard": Reach.documents([0, 4096])
    .rows(torch.arange(2048, 4096))
    .keys(torch.arange(2048)),
    "two chunks": Reach.documents([0, 4096])
    .rows(torch.cat([torch.arange(1024), torch.arange(3072, 4096)]))
    .keys(torch.arange(2048)),
}


def choices(reach, heads: int, size: int) -> Blocks:
    grid = Grid.documents([0, 2048], size)
    draw = torch.Generator().manual_seed(2)
    count = 64 if size == 1 else 8
    own = (torch.arange(len(reach)) // size).clamp(max=len(grid) - 1)[:, None, None]
    random = torch.rand(len(reach), heads, count, generator=draw)
    ids = torch.cat([(random * len(grid)).long(), own.expand(-1, heads, 1)], -1)
    return Blocks.choose(ids.cuda(), grid)


def run(name, tensors, dout, reach, blocks):
    with use(name):
        out, lse = attend(*tensors, reach, blocks, scale=SCALE)
        grads = attend_backward(dout, *tensors, out, lse, reach, blocks, scale=SCALE)
    return [x.double() for x in (out, lse, *grads[:3])]


SHAPES = [
    *((name, repeat, (128, 128)) for name in REACHES for repeat in (1, 4, 16)),
    *(("packed", 4, dims) for dims in ((64, 64), (80, 80), (96, 96), (192, 128), (256, 256))),
]


@pytest.mark.parametrize("backend", [b.name for b in TABLE])
@pytest.mark.parametrize("size", [None, 64, 16, 1])
@pytest.mark.parametrize(("reach", "repeat", "dims"), SHAPES)
def test_bf16_is_as_close_to_fp64_as_plain_bf16(backend, reach, size, repeat, dims):
    reach = REACHES[reach]
    draw = torch.Generator("cuda").manual_seed(0)
    shapes = (2048, 2 * repeat, dims[0]), (2048, 2, dims[0]), (2048, 2, dims[1])
    tensors = [torch.randn(s, generator=draw, device="cuda").bfloat16() for s in shapes]
    dout = torch.randn(2048, 2 * repeat, dims[1], generator=draw, device="cuda").bfloat16()
    blocks = None if size is None else choices(reach, 2, size)
    request = Request.of(*tensors, reach, blocks, Scoring(SCALE))
    module = next(b for b in TABLE if b.name == backend)
    if module.refuses(request) is not None:
        pytest.skip(module.refuses(request))
    got = run(backend, tensors, dout, reach, blocks)
    want = run("eager", [x.double() for x in tensors], dout.double(), reach, blocks)
    for name, have, true in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        seen = true.isfinite()
        assert torch.equal(have.isfinite(), seen), name
        error = (have - true)[seen].norm() / true[seen].norm()
        # bf16 keeps 8 bits: weights, outputs and gradients are rounded once or twice on the way.
        assert error < 1.2e-2, (name, float(error))
