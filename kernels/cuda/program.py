"""Program: a CUDA C++ source of this folder, compiled at first use and kept on disk."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...cache import default_cache
from ...errors import LongspanError

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size


def installed() -> bool:
    """Whether cuda-core, which compiles and launches, is there."""
    # find_spec raises where the namespace package `cuda` is missing.
    return find_spec("cuda") is not None and find_spec("cuda.core") is not None


@dataclass(frozen=True)
class Program:
    """A source and the constants that it is compiled with.

    Attributes:
        source: File name in this folder.
        defines: Names and values of its macros.
    """

    source: str
    defines: tuple[tuple[str, int], ...] = ()

    def cubin(self, arch: str) -> bytes:
        """Machine code for `arch`, as in `sm_90`; from the cache if it is there and whole.

        The file's name says what went in: source, macros, architecture and compiler. Its first
        bytes are the digest of the rest, so that a file cut short is compiled again.

        Raises:
            LongspanError: cuda-core is missing.
        """
        _require()
        text = (_FOLDER / self.source).read_text("utf-8")
        made_of = repr((text, self.defines, arch, _compiler_version()))
        name = f"{Path(self.source).stem}-{arch}-{hashlib.sha256(made_of.encode()).hexdigest()}"
        file = default_cache() / "cubins" / name
        code = _read(file)
        if code is None:
            code = _compile(self.source, text, self.defines, arch)
            _write(file, code)
        return code

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, *args: Tensor | int) -> None:
        """Puts a kernel on the current stream of the device of the first tensor.

        Args:
            kernel: Name of an `extern "C"` kernel.
            grid: Number of thread blocks in up to three dimensions; nothing happens if it is 0.
            threads: Threads of each thread block.
            args: The parameters: pointers, for which tensors stand here, and `long long`.

        Raises:
            LongspanError: cuda-core is missing.
        """
        if 0 in grid:
            return
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        core = _require()
        with torch.cuda.device(device):
            config = core.LaunchConfig(grid=grid, block=threads)
            stream = core.Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
            values = (arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
            core.launch(stream, config, _load(self, device).get_kernel(kernel), *values)


@lru_cache(maxsize=64)
def _load(program: Program, device: torch.device) -> Any:
    major, minor = torch.cuda.get_device_capability(device)
    code = program.cubin(f"sm_{major}{minor}")
    return _require().ObjectCode.from_cubin(code, name=program.source)


def _require() -> Any:
    if not installed():
        what = "CUDA kernels were asked for, but cuda-core, which compiles them, is not installed"
        raise LongspanError(what, "pip install 'longspan[gpu]'")
    return import_module("cuda.core")


@lru_cache(maxsize=1)
def _compiler_version() -> tuple[int, ...]:
    _, major, minor = import_module("cuda.bindings.nvrtc").nvrtcVersion()
    return major, minor


def _compile(name: str, text: str, defines: tuple[tuple[str, int], ...], arch: str) -> bytes:
    core = _require()
    macros = [(key, str(value)) for key, value in defines]
    options = core.ProgramOptions(arch=arch, name=name, std="c++17", define_macro=macros or None)
    log.info("compiling %s for %s", name, arch)
    return bytes(core.Program(text, "c++", options).compile("cubin").code)


def _read(file: Path) -> bytes | None:
    try:
        kept = file.read_bytes()
    except OSError:
        return None
    digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(file: Path, code: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            part = Path(scratch) / file.name
            part.write_bytes(hashlib.sha256(code).digest() + code)
            part.replace(file)
    except OSError as error:
        log.warning("%s is not kept, so it will be compiled again: %s", file.name, error)
