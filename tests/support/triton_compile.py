"""Compiling a Triton kernel for a GPU that is not there."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def compiled(kernel, types, constants, capability, **options):
    """The kernel as compiled for a compute capability.

    Arguments without a type in `types` or a value in `constants` are 32-bit integers; pointers and
    strides are multiples of 16, as they are in training. None as a type stands for no tensor.
    """
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
