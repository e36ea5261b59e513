"""The kernels compile for GPUs that are not there: the interpreter lets much pass."""

import pytest
from support.grid import sample
from support.triton_compile import run

PROGRAM = """
from longspan.kernels.triton import dense_backward, dense_forward
from support.triton_compile import compiled, report

for capability, dim, value_dim, dtype, scored in {cases!r}:
    blocks = [max(16, 1 << (x - 1).bit_length()) for x in (dim, value_dim)]
    constants = dict(GROUP=4, DIM=dim, BLOCK_D=blocks[0], VALUE_DIM=value_dim, BLOCK_V=blocks[1],
                     BYTES=4 if dtype == "fp32" else 2, CAP=scored, BIAS=scored, PLAIN=not scored)
    types = dict.fromkeys(["q", "k", "v", "out", "dout"], "*" + dtype)
    types |= dict.fromkeys(["lse", "dlse", "level", "delta", "dq", "dk", "dv"], "*fp32")
    types |= dict.fromkeys(["first", "last", "plan"], "*i32")
    types |= dict.fromkeys(["scale", "softcap"], "fp32")
    types |= dict.fromkeys(["bias", "dbias"], "*fp32" if scored else None)
    for tuned, options, more in (
        (dense_forward._forward_kernel, dense_forward._options, dict()),
        (dense_backward._query_kernel, dense_backward._query_options, dict()),
        (dense_backward._key_kernel, dense_backward._key_options, dict(PLAN=32)),
    ):
        config = options(constants)[0]
        given = constants | more | config.kwargs
        how = dict(num_warps=config.num_warps, num_stages=config.num_stages)
        report(tuned.kernel, compiled(tuned.kernel, types, given, capability, **how))
    kernel = dense_backward._row_kernel
    given = dict(VALUE_DIM=value_dim, BLOCK_V=blocks[1], DLSE=True, ROWS=64)
    report(kernel, compiled(kernel, types, given, capability))
"""

CASES = [
    (90, 128, 128, "bf16", False),
    *sample("dense kernels compile", [
        (80, 64, 64, "bf16", False),
        (100, 64, 64, "bf16", False),
        (90, 40, 80, "fp16", True),
        (90, 16, 16, "fp32", False),
    ], 1),
]  # fmt: skip
"""Capability, dims, dtype, and whether scores have a cap and biases."""

NAMES = ["_forward_kernel", "_query_kernel", "_key_kernel", "_row_kernel"]

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have."""


@pytest.fixture(scope="module")
def kernels():
    return run(PROGRAM.format(cases=CASES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compile_and_fit(kernels, case):
    at = CASES.index(case) * len(NAMES)
    for name, (compiled, size, shared) in zip(NAMES, kernels[at:], strict=False):
        assert name == compiled and size > 0 and shared <= SHARED[case[0]]
