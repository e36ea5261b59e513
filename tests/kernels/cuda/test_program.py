"""Sources compile for every architecture without a GPU, and are compiled once."""

import contextlib
import logging
import types
from pathlib import Path

import pytest
import torch
from longspan.errors import LongspanError
from longspan.kernels.cuda import invert, program, top
from longspan.kernels.cuda.program import Program, installed

SOURCES = sorted(file.name for file in Path(program.__file__).parent.glob("*.cu"))
TINY = Program("merge.cu")

needs_compiler = pytest.mark.skipif(not installed(), reason="cuda-core is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSPAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled: a list that grows."""
    real, seen = program._compile, []

    def compile_(*args):
        seen.append(args[0])
        return real(*args)

    monkeypatch.setattr(program, "_compile", compile_)
    return seen


def test_there_are_sources():
    assert SOURCES == ["invert.cu", "merge.cu", "top.cu"]


@needs_compiler
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("source", SOURCES)
def test_compiles(source, arch):
    assert Program(source).cubin(arch).startswith(b"\x7fELF")


@needs_compiler
def test_compiles_with_every_size_that_launchers_ask_for():
    asked = [Program("top.cu", (("LIST", s[1]), ("BITS", s[2]))) for s in top._SHAPES]
    asked += [Program("invert.cu", (("SLICE", size),)) for size in invert._SLICES]
    # Too much shared memory for any GPU is an error of the compiler.
    assert len({each.cubin("sm_80") for each in set(asked)}) == len(set(asked)) >= 7
    with pytest.raises(Exception, match="shared"):
        Program("invert.cu", (("SLICE", 2**14),)).cubin("sm_80")


@needs_compiler
def test_compiled_once(cache, compiled):
    first = TINY.cubin("sm_90")
    assert compiled == ["merge.cu"]
    assert TINY.cubin("sm_90") == first
    assert compiled == ["merge.cu"]
    assert len(list((cache / "cubins").iterdir())) == 1


@needs_compiler
def test_what_goes_in_tells_files_apart(cache, compiled, monkeypatch, tmp_path):
    TINY.cubin("sm_90")
    TINY.cubin("sm_80")
    Program("merge.cu", (("OTHER", 1),)).cubin("sm_90")
    monkeypatch.setattr(program, "_compiler_version", lambda: (99, 0))
    TINY.cubin("sm_90")
    text = (program._FOLDER / "merge.cu").read_text()
    (tmp_path / "merge.cu").write_text(text + "\n")
    monkeypatch.setattr(program, "_FOLDER", tmp_path)
    TINY.cubin("sm_90")
    assert len(compiled) == len(list((cache / "cubins").iterdir())) == 5


@needs_compiler
@pytest.mark.parametrize("kept", [0, 10, 32, 2000])
def test_a_file_cut_short_is_compiled_again(cache, compiled, kept):
    whole = TINY.cubin("sm_90")
    (file,) = (cache / "cubins").iterdir()
    file.write_bytes(file.read_bytes()[:kept])
    assert TINY.cubin("sm_90") == whole
    assert TINY.cubin("sm_90") == whole
    assert len(compiled) == 2


@needs_compiler
def test_a_folder_that_cannot_be_written_is_no_error(cache, compiled, caplog):
    cache.write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert TINY.cubin("sm_90") == TINY.cubin("sm_90")
    assert len(compiled) == 2
    assert "will be compiled again" in caplog.text


def test_without_cuda_core(monkeypatch):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    assert not installed()
    with pytest.raises(LongspanError, match=r"cuda-core.*\n.*longspan\[gpu\]"):
        TINY.cubin("sm_90")


@needs_compiler
def test_a_launch(monkeypatch):
    """What reaches cuda-core, with the driver's part of it replaced."""
    from cuda.core import LaunchConfig

    launches = []
    code = types.SimpleNamespace(get_kernel=lambda name: f"kernel {name}")
    core = types.SimpleNamespace(
        LaunchConfig=LaunchConfig,
        Stream=types.SimpleNamespace(from_handle=lambda handle: f"stream {handle}"),
        launch=lambda *args: launches.append(args),
    )
    monkeypatch.setattr(program, "_require", lambda: core)
    monkeypatch.setattr(program, "_load", lambda own, device: code)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    data = torch.zeros(4)
    TINY.launch("merge_fp32", (3, 0), 64, data, 5)
    assert launches == []
    TINY.launch("merge_fp32", (3, 2), 64, 5, data)
    ((on, config, kernel, *values),) = launches
    assert (on, kernel, values) == ("stream 7", "kernel merge_fp32", [5, data.data_ptr()])
    assert (config.grid, config.block) == ((3, 2, 1), (64, 1, 1))
