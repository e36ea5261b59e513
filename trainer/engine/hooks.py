"""Import hooks that let megatron-core run without CUDA, and mends for its own mistakes.

The engine package puts the hooks in place before it imports megatron, in every process.
"""

from __future__ import annotations

import builtins
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cpu_torch import TorchView

_PACKAGE = "megatron.core"
_CONSTANTS = {
    f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")
}
# Modules whose `tensor.cuda()` is reached on a CPU: there the attribute is compiled as `cpu`.
CUDA_METHOD_MODULES = (
    "megatron.core.models.common.language_module.language_module",
    "megatron.core.optimizer.distrib_optimizer",
)
# Modules that compare `tensor.type()` with the name of a CUDA type.
CUDA_TYPE_MODULES = (
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.optimizer",
)


def rewrite(code: types.CodeType, *, method: bool) -> types.CodeType:
    """`code` with CUDA type names and, if `method`, the attribute `cuda` replaced, recursively."""

    def constant(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return rewrite(value, method=method)
        if isinstance(value, tuple | frozenset):
            return type(value)(map(constant, value))
        return _CONSTANTS.get(value, value) if isinstance(value, str) else value

    names = tuple("cpu" if method and name == "cuda" else name for name in code.co_names)
    return code.replace(co_consts=tuple(map(constant, code.co_consts)), co_names=names)


def _view_importer(view: TorchView) -> Callable[..., Any]:
    """`__import__` that hands out the view wherever `torch` itself is asked for."""

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        module = builtins.__import__(name, *args, **kwargs)
        return view if module is torch else module

    return import_


class _CpuLoader(importlib.machinery.SourceFileLoader):
    """Loads a megatron module against the view. The byte code on disk stays the original."""

    view: TorchView | None = None

    def get_code(self, fullname: str) -> types.CodeType | None:
        code = super().get_code(fullname)
        if code is None or fullname not in {*CUDA_METHOD_MODULES, *CUDA_TYPE_MODULES}:
            return code
        return rewrite(code, method=fullname in CUDA_METHOD_MODULES)

    def exec_module(self, module: types.ModuleType) -> None:
        if _CpuLoader.view is None:
            _CpuLoader.view = TorchView()
        seen = {**builtins.__dict__, "__import__": _view_importer(_CpuLoader.view)}
        module.__dict__["__builtins__"] = seen
        super().exec_module(module)
        patch = CPU_PATCHES.get(module.__name__)
        if patch is not None:
            patch(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds megatron.core modules as usual and hands them to the CPU loader."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _PACKAGE and not fullname.startswith(f"{_PACKAGE}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _CpuLoader(spec.loader.name, spec.loader.path)
        return spec


def _patch_random(module: types.ModuleType) -> None:
    """The CUDA generator's state is the CPU generator's; forking it is no mistake to warn of."""

    def get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    require(module, "_get_cuda_rng_state", "_set_cuda_rng_state")
    vars(module).update(_get_cuda_rng_state=get_state, _set_cuda_rng_state=set_state)
    logging.getLogger(module.__name__).setLevel(logging.ERROR)


def _patch_jit(module: types.ModuleType) -> None:
    """torch.compile on a CPU costs 18 s at the first step and wants a C++ compiler."""
    require(module, "disable_jit_fuser", "jit_fuser")
    module.disable_jit_fuser()


def _patch_moe_utils(module: types.ModuleType) -> None:
    """The split sizes become numpy only when they leave a GPU; all_to_all wants plain integers."""
    require(module, "maybe_move_tensor_to_cpu")

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    module.__dict__["maybe_move_tensor_to_cpu"] = to_host


def require(module: Any, *names: str) -> None:
    """Fail loudly when a newer megatron-core has moved what is patched here."""
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ImportError(
            f"{module.__name__} no longer has {', '.join(missing)}, which longspan patches; "
            "install a megatron-core that longspan supports (>=0.16.1,<0.20)"
        )


CPU_PATCHES: dict[str, Callable[[types.ModuleType], None]] = {
    "megatron.core.jit": _patch_jit,
    "megatron.core.tensor_parallel.random": _patch_random,
    "megatron.core.transformer.moe.moe_utils": _patch_moe_utils,
}


def install() -> None:
    """Prepare this process for megatron-core; without a GPU, route its import through here."""
    # Megatron warns of every optional package that is not there; `longspan doctor` tells it once.
    for origin in ("megatron", "transformer_engine", "modelopt"):
        warnings.filterwarnings("ignore", module=rf"{origin}(\.|$)")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # Of names and argument orders that newer torch releases give to what megatron calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed(\.|$)")
    warnings.filterwarnings(
        "ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint(\.|$)"
    )
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        _install_cpu()


def _install_cpu() -> None:
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if _PACKAGE in sys.modules:
        raise ImportError("megatron.core was imported before longspan's CPU layer was installed")
    sys.meta_path.insert(0, _Finder())


def mend_router() -> None:
    """Mend the gate without TransformerEngine and the load-balancing loss over several ranks.

    Without TransformerEngine the gate names a function that was never imported. And megatron
    multiplies a rank's part of the load-balancing loss by that rank's tokens, to undo the division
    by all tokens, where the part is already a mean over the tokens of the whole tensor-context
    group: with N such ranks the loss counts N times too little. (The gradient norm shows it.)
    """
    utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "te_general_gemm"):
        utils.__dict__["te_general_gemm"] = None
    module = importlib.import_module("megatron.core.transformer.moe.router")
    _mend_token_count(module)
    router = module.TopKRouter
    require(router, "attach_and_log_load_balancing_loss")
    original = router.attach_and_log_load_balancing_loss
    # 0.19 has mended it the same way.
    if "tp_cp_group" in original.__code__.co_names or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def attach(self: Any, activation: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        bound = inspect.signature(original).bind(self, activation, *args, **kwargs)
        tokens = bound.arguments.get("valid_token_count")
        tokens = activation.shape[0] if tokens is None else tokens
        bound.arguments["valid_token_count"] = tokens * bound.arguments["reduce_group"].size()
        return original(*bound.args, **bound.kwargs)

    router.attach_and_log_load_balancing_loss = attach


def _mend_token_count(module: types.ModuleType) -> None:
    """Where rows are spare, give every rank the tokens of the group's mean rank.

    A rank's part of the load-balancing loss is multiplied by them and by the ranks of the group.
    megatron takes a sum over the group for the rank's own tokens, as it sums in place; and with
    its own ones, a part would count by how many tokens the rank has.
    """
    name = "get_tokens_per_expert_and_token_count"
    require(module, name)
    original = getattr(module, name)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def count(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any, Any]:
        of_experts, _, tokens = original(*args, **kwargs)
        group = inspect.signature(original).bind(*args, **kwargs).arguments["reduce_group"]
        return of_experts, tokens / group.size(), tokens

    module.__dict__[name] = count


def mend_optimizer() -> None:
    """One AdamW for every machine: torch's fused one.

    TransformerEngine's and Apex's Adam cannot skip a step on the device, so they are not used even
    where they are installed.
    """
    package = importlib.import_module("megatron.core.optimizer")
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    require(package, "USING_PYTORCH_OPTIMIZER")
    require(module, "HAVE_APEX_OR_TE")
    vars(package).update(USING_PYTORCH_OPTIMIZER=True)
    vars(module).update(HAVE_APEX_OR_TE=False)
