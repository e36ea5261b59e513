import pytest
import torch
import triton
from longspan.kernels.triton import tuning
from triton.runtime.errors import OutOfResources

SMALL, LARGE = (triton.Config({"ROWS": rows}, num_warps=4) for rows in (16, 64))


class Kernel:
    """Notes what it is launched with; fits with at most `most` rows."""

    def __init__(self, most=64):
        self.rows, self.most = [], most

    def __getitem__(self, grid):
        def launch(*args, **options):
            rows = options["ROWS"]
            if rows > self.most:
                raise OutOfResources(rows, self.most, "rows")
            self.rows.append(rows)

        return launch


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(tuning, "INTERPRETED", False)


def test_the_interpreter_and_determinism_take_the_first_and_others_search(on_a_gpu, monkeypatch):
    searched = []

    def autotune(configs, key, cache_results):
        assert cache_results and key == ["size"]
        searched.append([config.kwargs["ROWS"] for config in configs])
        return lambda kernel: kernel_of(configs[-1], kernel)

    def kernel_of(config, kernel):
        launch = kernel[None]
        return {None: lambda *args, **options: launch(*args, **config.kwargs, **options)}

    monkeypatch.setattr(triton, "autotune", autotune)
    kernel = Kernel()
    tuned = tuning.autotuned(lambda _: [LARGE, SMALL], ["size"])(kernel)
    tuned[None]()
    assert (kernel.rows, searched) == ([64], [])
    torch.use_deterministic_algorithms(False)
    tuned[None]()
    tuned[None]()
    assert (kernel.rows, searched) == ([64, 16, 16], [[64, 16]])
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    tuned[None]()
    assert kernel.rows[-1] == 64
    torch.use_deterministic_algorithms(True, warn_only=True)


def test_a_device_with_less_memory_takes_the_first_that_fits(on_a_gpu):
    kernel = Kernel(most=16)
    tuning.autotuned(lambda _: [LARGE, SMALL], [])(kernel)[None]()
    assert kernel.rows == [16]
    with pytest.raises(OutOfResources):
        tuning.autotuned(lambda _: [LARGE, LARGE], [])(kernel)[None]()


def test_lengths_within_a_factor_of_four_share_a_class():
    classes = [tuning.size_class(length) for length in (0, 1, 4095, 4096, 16383, 16384)]
    assert classes == sorted(classes) and classes[3] == classes[4] < classes[5]
