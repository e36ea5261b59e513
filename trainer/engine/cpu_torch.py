"""A view of torch for megatron-core on a machine without CUDA.

megatron-core asks for the device "cuda" by name. Each of its modules is given a view of torch in
which the tensor factories put such tensors on the CPU and `torch.cuda` is this file's namespace,
whose streams and events do nothing. The real torch stays untouched for everybody else.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "eye", "linspace", "logspace", "randperm", "tensor", "as_tensor"),
    *("empty", "empty_like", "empty_strided", "full", "full_like", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like"),
    *("zeros", "zeros_like"),
)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


class _Stream:
    """Stands for a CUDA stream or event: everything it is told to wait for has happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def record_event(self, event: Any = None) -> _Stream:
        """An event that has happened."""
        return _Stream()

    def query(self) -> bool:
        """Done."""
        return True


def _device(*args: Any, **kwargs: Any) -> Any:
    """torch.device, except that "cuda" is the CPU."""
    device = torch.device(*args, **kwargs)
    return _CPU if device.type == "cuda" else device


def _cuda_namespace() -> types.ModuleType:
    """`torch.cuda` as megatron-core uses it, on the CPU and its random generator."""
    fake = types.ModuleType("torch.cuda")

    @contextlib.contextmanager
    def stream(*args: Any, **kwargs: Any) -> Any:
        yield

    def set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    rng = {
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "manual_seed_all": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": set_rng_state,
    }
    names: dict[str, Any] = {
        **rng,
        "random": types.SimpleNamespace(**rng),
        "is_available": lambda: False,
        "is_initialized": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: _CPU,
        "device_count": lambda: 0,
        "Stream": _Stream,
        "Event": _Stream,
        "ExternalStream": _Stream,
        "current_stream": _Stream,
        "default_stream": _Stream,
        "stream": stream,
        "device": stream,
        "nvtx": types.SimpleNamespace(range_push=nothing, range_pop=nothing, range=stream),
        "memory_allocated": lambda *args: 0,
        "memory_reserved": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "memory_stats": lambda *args: {},
        "FloatTensor": torch.FloatTensor,
        "HalfTensor": torch.HalfTensor,
        "BFloat16Tensor": torch.BFloat16Tensor,
        "CUDAGraph": _Stream,
        "OutOfMemoryError": torch.cuda.OutOfMemoryError,
        "amp": torch.cuda.amp,
    }
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "init"):
        names[name] = nothing
    fake.__dict__.update(names)
    return fake


class TorchView(types.ModuleType):
    """torch, with CPU factories and a stand-in for `torch.cuda`."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))
        # `tensor.cuda()` is compiled to `tensor.cpu()` where megatron needs it (hooks.py);
        # the same rewrite turns `torch.cuda` into `torch.cpu`, hence one namespace, two names.
        self.cuda = self.cpu = _cuda_namespace()
        self.device = _device

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
