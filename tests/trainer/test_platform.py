"""What a process on a CPU does with its memory."""

import subprocess
import sys

import pytest

FREED = """
import psutil, torch
from longspan.trainer.platform import set_up
if {kept}:
    set_up(0, 1)
before = psutil.Process().memory_info().rss
x = torch.ones(64 * 2**20)
del x
print((psutil.Process().memory_info().rss - before) // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of the GNU C library")
@pytest.mark.parametrize("kept", [True, False])
def test_freed_memory_stays_with_a_rank(kept):
    code = FREED.format(kept=kept)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(done.stdout) > 200) is kept
