"""Entry: the first process of a run's Ray job, which hands the recipe on and becomes the driver.

A working directory would carry the recipe as well, but Ray removes and unpacks it again for each
node that needs it, also where several nodes share a disk and a driver works in it.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from .needs import DRIVER, install, missing

RECIPE = "LONGSPAN_RECIPE"
"""The environment variable that holds the resolved recipe."""


def command(arguments: Sequence[str], recipe: str) -> list[str]:
    """The driver's command line, with the recipe in an open file that has no place on a disk."""
    file = os.memfd_create("recipe", 0)
    with os.fdopen(os.dup(file), "w", encoding="utf-8") as opened:
        opened.write(recipe)
    driver = [sys.executable, "-P", "-m", "longspan.cluster.driver"]
    return [*driver, *arguments, "--recipe", f"/dev/fd/{file}"]


def _without(lacks: Sequence[str]) -> int:
    """Say what this node lacks; the exit code of a user's mistake."""
    print(
        f"error: {socket.gethostname()}, where the job started, lacks {', '.join(lacks)}\n"
        "  a job brings longspan's code only, and every node needs Python and what it imports\n"
        f"  fix: on every node: {install(missing(), {})}",
        file=sys.stderr,
    )
    return 2


def main() -> None:
    """Become the driver; the ranks need not inherit the recipe."""
    if lacks := missing(DRIVER):
        sys.exit(_without(lacks))
    recipe = os.environ.pop(RECIPE)
    words = command(sys.argv[1:], recipe)
    # Where Ray was started is no place of the user's: paths are shown in full from here.
    os.chdir(Path(__file__).parents[2])
    os.execv(words[0], words)


if __name__ == "__main__":
    main()
