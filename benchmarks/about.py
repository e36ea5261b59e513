"""About: the machine, the versions and the day that a benchmark's result says it is from."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """What belongs into every result.

    Args:
        packages: Whose versions matter.
    """
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "date": datetime.now(UTC).date().isoformat(),
    }
