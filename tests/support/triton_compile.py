"""Compiling Triton kernels for GPUs that are not there.

As a program: cases as JSON in, one line of JSON per compiled kernel out. (Where the kernels are
interpreted nothing can be compiled, hence another process.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def compiled(kernel, types, constants, capability, **options):
    """The kernel as compiled for a compute capability.

    Arguments without a type in `types` or a value in `constants` are 32-bit integers; pointers and
    strides are multiples of 16, as they are in training. None as a type stands for no tensor.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, fixed, attributes = {}, {}, {}
    for at, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        if name in constants or kind is None:
            signature[name] = "constexpr"
            fixed[(at,)] = constants.get(name)
            continue
        signature[name] = kind
        if kind.startswith("*") or name.endswith(("_row", "_head")):
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(kernel, result):
    """Prints what `run` gives back."""
    size = len(result.asm["cubin"])
    print(json.dumps([kernel.__name__, size, result.metadata.shared]), flush=True)


def run(program):
    """Name, bytes of code and bytes of shared memory of each kernel that `program` reports."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "0"} | path(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def path():
    """Where a program finds the package, which may not be installed, and this one."""
    import longspan

    folders = [str(Path(longspan.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(x for x in folders if x)}
