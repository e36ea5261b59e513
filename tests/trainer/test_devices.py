"""Counting GPUs and cores without torch."""

import importlib.util
import subprocess
import sys

import pytest
from longspan.trainer import devices


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(devices, "torch_cuda", lambda: "13.0")
    monkeypatch.setattr(devices, "_driver_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("0,1", 2),
        ("3", 1),
        ("", 0),
        ("-1", 0),
        ("0,9,1", 1),
        ("GPU-12, GPU-34", 2),
        ("MIG-1,MIG-2,MIG-3,MIG-4,MIG-5", 5),
    ],
)
def test_visible_gpus(four_gpus, monkeypatch, visible, count):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpu_count() == count


def test_a_torch_for_cpus_sees_no_gpu(four_gpus, monkeypatch):
    monkeypatch.setattr(devices, "torch_cuda", lambda: None)
    assert devices.gpu_count() == 0


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("cuda: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '12.8'\n", "12.8"),
        ('debug = False\ncuda = "13.0"\nhip = None\n', "13.0"),
    ],
)
def test_cuda_of_torch_is_read_from_its_files(tmp_path, monkeypatch, text, cuda):
    (tmp_path / "version.py").write_text(text)
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert devices.torch_cuda.__wrapped__() == cuda


def test_counts_agree_with_torch():
    program = (
        "import sys; from longspan.trainer.devices import gpu_count; n = gpu_count();"
        "assert 'torch' not in sys.modules; import torch;"
        "assert n == torch.cuda.device_count(), n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_torchrun_tells_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert devices.this_machine().world is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    machine = devices.this_machine()
    assert (machine.world, machine.local) == (8, 4)
    assert machine.cores >= 1
