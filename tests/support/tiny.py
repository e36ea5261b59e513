"""A tiny run that every layout can split, and random packed samples for it."""

from typing import Any

import torch
from longspan.trainer.data.samples import Sample
from longspan.trainer.settings import RunSettings, merge

LENGTH = 64
SEQUENCES = 4
VOCAB = 97


def tiny_run(length: int = LENGTH, **changes: Any) -> RunSettings:
    """Settings of a 4-layer model; `changes` are merged over them (dotted keys allowed)."""
    raw: dict[str, Any] = {
        "seed": 5,
        "precision": "fp32",
        "model": {
            "hidden": 32,
            "layers": 4,
            "heads": 4,
            "query_groups": 2,
            "ffn_hidden": 48,
            "qk_norm": True,
        },
        "tokenizer": {"kind": "train", "vocab": 300},
        "stages": [
            {
                "name": "tiny",
                "length": length,
                "tokens": length * SEQUENCES * 4,
                "batch_tokens": length * SEQUENCES,
                "data": {"sources": [{"kind": "python-stdlib"}]},
                # A large eps: Adam turns rounding noise in near-zero gradients into full steps.
                "optimizer": {"lr": 1e-2, "schedule": "constant", "warmup": 0, "eps": 1e-4},
            }
        ],
    }
    for path, value in changes.items():
        if path.startswith("stage__"):
            keys = path.removeprefix("stage__").split("__")
            for key in reversed(keys):
                value = {key: value}
            raw["stages"] = [merge(raw["stages"][0], value)]
        else:
            keys = path.split("__")
            for key in reversed(keys[1:]):
                value = {key: value}
            raw = merge(raw, {keys[0]: value})
    return RunSettings.model_validate(raw)


def random_sample(seed: int, length: int = LENGTH, documents: int = 3) -> Sample:
    """A packed sample of `documents` documents with random bounds and tokens."""
    random = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(length - 1, generator=random)[: documents - 1] + 1
    bounds = torch.tensor([0, *sorted(cuts.tolist()), length], dtype=torch.int32)
    tokens = torch.randint(0, VOCAB, (length,), generator=random)
    labels = torch.randint(0, VOCAB, (length,), generator=random)
    weights = torch.ones(length)
    weights[bounds[1:].long() - 1] = 0
    return Sample(tokens, labels, weights, bounds, seed)
