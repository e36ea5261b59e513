import torch
from longspan.kernels.transfer import to_device


def test_what_is_on_the_host_already_is_not_copied():
    x = torch.arange(4)
    assert to_device(x, torch.device("cpu")) is x


def test_a_copy_to_a_gpu_comes_from_pinned_memory_and_does_not_wait(monkeypatch):
    told = []

    def pin(x):
        told.append("pinned")
        return x

    def to(x, device, non_blocking=False):
        told.append((device.type, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    to_device(torch.arange(4), torch.device("cuda"))
    assert told == ["pinned", ("cuda", True)]
