"""Time of a whole training step with a mechanism beside the same step with dense attention.

One model, whose layers have one mechanism and then the other in turn, so that both meet the same
machine and the same weights. Run: python benchmarks/mechanisms.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from longspan.attention.layer import Attention
from longspan.attention.layer_settings import AttentionSettings
from longspan.trainer.data.samples import Sample
from longspan.trainer.engine.engine import Engine
from longspan.trainer.platform import set_up
from longspan.trainer.settings import RunSettings

VOCAB = 4096
SIXTEEN_BLOCKS = {"block": 64, "initial": 1, "local": 4, "count": 11}
MECHANISMS: dict[str, dict[str, Any]] = {
    "infllm_v2": {"kind": "infllm_v2", **SIXTEEN_BLOCKS, "dense_below": 0},
    "moba": {"kind": "moba", "block": 512, "count": 3},
    "window": {"kind": "window", "window": 1024},
    "sharded_heads": {"kind": "sharded_heads", "preset": "phi3_small"},
}
"""Those without parameters: the model is the same one."""


def settings(length: int, recompute: str) -> RunSettings:
    """Hidden 512, 8 layers."""
    return RunSettings.model_validate(
        {
            "precision": "fp32",
            "recompute": recompute,
            "model": {
                "hidden": 512,
                "layers": 8,
                "heads": 8,
                "query_groups": 2,
                "ffn_hidden": 1408,
            },
            "tokenizer": {"kind": "train", "vocab": VOCAB},
            "stages": [
                {
                    "name": "benchmark",
                    "length": length,
                    "tokens": length,
                    "batch_tokens": length,
                    "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
                    "data": {"sources": [{"kind": "python-stdlib"}]},
                }
            ],
        }
    )


def attentions(engine: Engine, mechanism: dict[str, Any]) -> list[Attention]:
    """An attention for each layer in the place of the one that it has."""
    stage = AttentionSettings.model_validate({"mechanism": mechanism})
    layers = engine.model.decoder.layers
    return [
        Attention(stage, stage.mechanism, layer.self_attention.site).to(engine.device)
        for layer in layers
    ]


def step_of(engine: Engine, sample: Sample, mechanism: list[Attention]) -> float:
    """Seconds of a step."""
    for layer, attention in zip(engine.model.decoder.layers, mechanism, strict=True):
        layer.self_attention.attention = attention
    begun = time.perf_counter()
    engine.train_step([sample], 1e-4, False, ("benchmark",)).on_host()
    return time.perf_counter() - begun


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every mechanism beside dense, by turns."""
    run = settings(args.length, args.recompute)
    engine = Engine(run, run.stages[0], VOCAB)
    tokens_T = torch.randint(0, VOCAB, (args.length,), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, args.length], dtype=torch.int32)
    sample = Sample(tokens_T, tokens_T.roll(-1), torch.ones(args.length), bounds)
    dense = attentions(engine, {"kind": "dense"})
    found = []
    for name in args.mechanisms:
        other = attentions(engine, MECHANISMS[name])
        seconds: dict[str, list[float]] = {"dense": [], name: []}
        for number in range(args.steps + 1):
            for side, mechanism in (("dense", dense), (name, other)):
                took = step_of(engine, sample, mechanism)
                if number:  # the first step warms up
                    seconds[side].append(took)
        ratios = [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)]
        row = {
            "mechanism": name,
            "settings": MECHANISMS[name],
            "times_faster_than_dense": statistics.median(ratios),
            "of_each_step": ratios,
        }
        print(f"{name:<14} {row['times_faster_than_dense']:.2f}x the speed of dense", flush=True)
        found.append(row)
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mechanisms", nargs="*", default=list(MECHANISMS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    args = arguments()
    set_up(0, 1)  # as a run does
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result = {
        "rows": measure(args),
        "length": args.length,
        "recompute": args.recompute,
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
