"""Cache: the folder that keeps between runs what need not be made twice."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$LONGSPAN_CACHE, else $XDG_CACHE_HOME/longspan, else ~/.cache/longspan."""
    if own := os.environ.get("LONGSPAN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longspan"
