"""How far a result may be from the specification in float64."""

import torch


def assert_as_good_as(naive, got, want, floor=0.0, what="result"):
    """RMS error at most 1.5 times that of a naive computation, plus 2 eps of its dtype.

    Infinities must be the same in `got` and `want`; NaN is never right. `floor` is allowed in any
    case: what is left where terms cancel that the naive computation never writes down.
    """
    eps = torch.finfo(naive.dtype).eps
    naive, got, want = (x.detach().cpu().double() for x in (naive, got, want))
    assert got.shape == want.shape, (got.shape, want.shape)
    finite = want.isfinite()
    assert not bool(got.isnan().any()) and torch.equal(got[~finite], want[~finite])
    if bool(finite.any()):
        error, allowed = rms((got - want)[finite]), rms((naive - want)[finite])
        limit = 1.5 * allowed + 2 * eps * rms(want[finite]) + floor
        assert error <= limit, f"{what}: RMS error {error:.3g}, at most {limit:.3g}"


def rms(x):
    """Root mean square."""
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
