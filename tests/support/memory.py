"""How much memory a piece of a test needs at its peak, whatever ran before it in this process."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Growth:
    """MiB by which the process grew at most."""

    mib = 0.0


@contextmanager
def peak_growth() -> Iterator[Growth]:
    """Measures what is inside. `ru_maxrss` would not do: an earlier peak hides every later one."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        pytest.skip("the peak of a process can only be reset on Linux")

    def mib(field: str) -> float:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024

    # Freed memory that malloc keeps would be used again without growth.
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    growth, before = Growth(), mib("VmRSS")
    yield growth
    growth.mib = mib("VmHWM") - before
