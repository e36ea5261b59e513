"""Runs the CUDA sources on the CPU: g++ compiles them behind shim.h, ctypes calls them."""

import ctypes
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from longspan.kernels.cuda import program
from longspan.kernels.cuda.program import Program
from torch import Tensor

SOURCES = Path(program.__file__).parent
HEADER = Path(__file__).with_name("shim.h")
MOST_ARGUMENTS = 10


class Shim:
    """Launches on CPU tensors; what `defines` names replaces what launchers ask for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.defines: dict[str, int] = {}
        self.backwards = False
        self.launches: list[str] = []
        self.library = lru_cache(maxsize=None)(self._library)

    def launch(self, source, defines, kernel, grid, threads, *args) -> None:
        library = self.library(source, tuple(sorted({**dict(defines), **self.defines}.items())))
        values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
        values += [0] * (MOST_ARGUMENTS - len(values))
        stuck = library.shim_run(
            ctypes.cast(library[kernel], ctypes.c_void_p),
            (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            ctypes.c_uint(threads),
            (ctypes.c_longlong * MOST_ARGUMENTS)(*values),
            int(self.backwards),
        )
        assert not stuck, f"{kernel}: some threads wait for others that never come"
        self.launches.append(kernel)

    def _library(self, source, defines) -> ctypes.CDLL:
        target = self.folder / f"{source}{len(list(self.folder.iterdir()))}.so"
        macros = [f"-D{name}={value}" for name, value in defines]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", *macros]
        # A load that is not aligned, or one outside an array, ends the process.
        flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
        command = ["g++", *flags, "-include", HEADER, "-x", "c++", SOURCES / source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """Launches of a file's tests go to the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to run CUDA sources on the CPU with")
    shim = Shim(tmp_path_factory.mktemp("shim"))

    def launch(self, kernel, grid, threads, *args):
        shim.launch(self.source, self.defines, kernel, grid, threads, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "launch", launch)
        yield shim
