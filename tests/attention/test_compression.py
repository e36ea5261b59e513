from itertools import pairwise

import pytest
import torch
from longspan.attention.compression import Compression
from longspan.attention.mechanism_settings import NsaSettings
from longspan.kernels.windows import Windows
from reference.compression import naive_compress
from support.accuracy import assert_as_good_as
from support.mechanisms import gradients, site
from support.memory import peak_growth

DOCUMENTS = [0, 1, 4, 4, 11, 40, 63]
KINDS = ["mean", "weighted", "linear", "mlp"]


def settings(how, length=6, stride=2):
    size = {"compress_length": length, "compress_stride": stride, "block": stride}
    return NsaSettings(kind="nsa", compress=how, **size)


def random(settings, encode, where, seed=0):
    """A compression with random parameters."""
    compression, draw = Compression(settings, encode, where), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in compression.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) / 3)
    return compression


def windows_of(given, cu=DOCUMENTS):
    """What is compressed."""
    return Windows.documents(cu, given.compress_length, given.compress_stride)


def twin(x, given, own, cu=DOCUMENTS):
    return torch.cat([naive_compress(x[a:b], given, own) for a, b in pairwise(cu)])


@pytest.mark.parametrize("encode", [False, True], ids=["plain", "encoded"])
@pytest.mark.parametrize("size", [(6, 2), (4, 4), (7, 1), (3, 3), (70, 7)], ids=str)
@pytest.mark.parametrize("how", KINDS)
def test_equals_the_twin(how, size, encode):
    given, where = settings(how, *size), site()
    compression = random(given, encode, where)
    own = dict(compression.named_parameters())
    x = torch.randn(63, where.groups, where.dim, dtype=torch.float64, requires_grad=True)
    got, want = compression(x, windows_of(given)), twin(x, given, own)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    leaves, dout = [x, *own.values()], torch.randn_like(want)
    for part, wanted in zip(
        gradients(got, dout, leaves), gradients(want + 0 * x.sum(), dout, leaves), strict=True
    ):
        torch.testing.assert_close(part, wanted, atol=1e-12, rtol=0)


def test_parameters_start_as_a_mean_without_places_and_are_split_by_head():
    shapes = {"mean": [], "weighted": [(2, 6)], "linear": [(2, 48, 8)]}
    shapes["mlp"] = [(2, 48, 16), (2, 16, 8)]
    for how in KINDS:
        plain = list(Compression(settings(how), False, site()).parameters())
        assert [tuple(x.shape) for x in plain] == shapes[how]
        starts = [x.start for x in plain]
        assert starts == ([1 / 6] if how == "weighted" else [None] * len(plain))
        encoded = Compression(settings(how), True, site())
        assert encoded.place.start == 0.0 and tuple(encoded.place.shape) == (2, 6, 8)
        assert all(x.by_head for x in encoded.parameters())


@pytest.mark.parametrize("how", KINDS)
def test_heads_on_two_ranks_are_those_of_one(how):
    whole, half = random(settings(how), True, site()), site(heads=2, groups=1, all_heads=4)
    x, windows = torch.randn(63, 2, 8, dtype=torch.float64), windows_of(settings(how))
    for rank in range(2):
        part = random(settings(how), True, half)
        with torch.no_grad():
            for mine, full in zip(part.parameters(), whole.parameters(), strict=True):
                mine.copy_(full[rank : rank + 1])
        got = part(x[:, rank : rank + 1], windows)
        torch.testing.assert_close(got, whole(x, windows)[:, rank : rank + 1])


@pytest.mark.parametrize("how", KINDS)
def test_float32_is_as_good_as_the_plain_computation(how):
    given = settings(how)
    wide, narrow = random(given, True, site()), random(given, True, site(dtype=torch.float32))
    x = torch.randn(63, 2, 8).double()
    naive = twin(x.float(), given, dict(narrow.named_parameters()))
    got = narrow(x.float(), windows_of(given))
    assert got.dtype == torch.float32
    assert_as_good_as(naive, got, twin(x, given, dict(wide.named_parameters())))


def test_windows_are_not_written_out():
    tokens, given = 64 * 1024, settings("mlp", 256, 16)
    where = site(heads=2, groups=1, dim=64, dtype=torch.float32)
    compression, windows = random(given, True, where), windows_of(given, [0, tokens])
    x = torch.randn(tokens, 1, 64, requires_grad=True)
    compression(x[:256], windows_of(given, [0, 256])).sum().backward()
    with peak_growth() as growth:
        compression(x, windows).sum().backward()
    # The keys are 16 MiB. Windows that hold each token 16 times would be 256, their gradient too.
    assert growth.mib < 256, growth.mib
