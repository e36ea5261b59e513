"""Product: each device of this node multiplies two matrices, which tells a sick one. Prints JSON.

The product of the identity and a matrix is that matrix, bit for bit.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

_GPU_WIDTH = 8192
_GPU_ROUNDS = 12
_CPU_WIDTH = 768
_CPU_ROUNDS = 4


def measure(index: int | None) -> dict[str, Any]:
    """Multiply on one device.

    Args:
        index: Of a GPU; None for the CPU.

    Returns:
        Name, FLOPs per second, of a CPU also those of one core, whether the product was right, and
        free and all memory in bytes.
    """
    gpu = index is not None
    device = torch.device("cuda", index) if gpu else torch.device("cpu")
    free, total = torch.cuda.mem_get_info(device) if gpu else (0, 0)
    width = _GPU_WIDTH if gpu else _CPU_WIDTH
    kind = torch.bfloat16 if gpu else torch.float32
    generator = torch.Generator(device).manual_seed(index or 0)
    a_NN = torch.randn(width, width, generator=generator, device=device).to(kind)
    right = bool(torch.equal(torch.eye(width, device=device, dtype=kind) @ a_NN, a_NN))
    found = {
        "name": torch.cuda.get_device_name(device) if gpu else "CPU",
        "flops": _flops(a_NN, _GPU_ROUNDS if gpu else _CPU_ROUNDS),
        "right": right,
        "free": free,
        "total": total,
    }
    if not gpu:
        torch.set_num_threads(1)
        found["core_flops"] = _flops(a_NN, _CPU_ROUNDS)
    return found


def _flops(a_NN: torch.Tensor, rounds: int) -> float:
    """FLOPs per second of the quickest of some products of a matrix with itself."""
    best_s = float("inf")
    for _ in range(rounds):
        begin_s = _now(a_NN.device)
        product_NN = a_NN @ a_NN
        best_s = min(best_s, _now(a_NN.device) - begin_s)
        del product_NN
    return 2 * a_NN.shape[0] ** 3 / best_s


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Measure all devices and print what was found."""
    gpus = torch.cuda.device_count()
    found = [measure(index) for index in (range(gpus) if gpus else (None,))]
    print(json.dumps({"gpus": gpus, "devices": found}))


if __name__ == "__main__":
    main()
