"""Histogram: lengths of documents, drawn as they occur in data sets for long contexts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "lengths"
NAMES = ("pile", "prolong64k", "prolong512k")


def draw(name: str, count: int, seed: int, longest: int) -> list[int]:
    """Lengths of documents, uniform within a bin.

    Args:
        name: Of the histogram.
        count: Documents.
        seed: Of the draw.
        longest: Where bins end at the latest: their documents are drawn below it.
    """
    shares = json.loads((FOLDER / f"{name}.json").read_text())
    bounds = np.array([[int(x) for x in re.findall(r"\d+", key)] for key in shares])
    first, last = np.maximum(bounds[:, 0], 1), np.minimum(bounds[:, 1], longest + 1)
    share = np.array(list(shares.values())) * (first < last)
    random = np.random.default_rng(seed)
    bins = random.choice(len(share), count, p=share / share.sum())
    return random.integers(first[bins], last[bins]).tolist()


def packed(name: str, tokens: int, seed: int) -> list[int]:
    """Boundaries of drawn documents that fill a sequence; the last one is cut."""
    ends = np.cumsum(draw(name, tokens // 64, seed, tokens))
    return [0, *ends[ends < tokens].tolist(), tokens]
