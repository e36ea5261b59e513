"""A dense model continued at a longer length with dense and with sparse attention.

One base per seed is trained at 1K tokens and exported; every variant starts from its weights and
trains as many tokens at 4K. Then SSA and its sparse stream alone are evaluated with full attention
and at several budgets. Run: python benchmarks/continued.py --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from library import MECHANISMS
from longspan.attention.layer_settings import AttentionSettings
from longspan.cache import default_cache
from longspan.parallel.settings import ParallelSettings
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.stored import StoredState
from longspan.trainer.checkpoint.survey import committed_at
from longspan.trainer.data.corpus import prepare_corpus
from longspan.trainer.data.samples import HeldOutSamples
from longspan.trainer.engine.checkpoint import load_state
from longspan.trainer.engine.engine import Engine
from longspan.trainer.evaluation import held_out_loss
from longspan.trainer.run_directory import RunDirectory

BASE = """\
base: attention
seed: {seed}
stages:
  - name: base
    length: 1K
    tokens: {tokens}
    batch_tokens: 4K
    rope: {{base: 1000000}}
    optimizer: {{lr: 3e-3, schedule: linear, min_lr: 1e-3, warmup: 0.05}}
evaluation: {{documents: 0}}
"""
CONTINUED = """\
base: attention
seed: {seed}
tokenizer: {{kind: hf, path: {start}}}
model: {{from: "hf:{start}"}}
stages:
  - name: continued
    length: 4K
    tokens: {tokens}
    batch_tokens: 8K
    rope: {{base: 10000000}}
    optimizer: {{lr: 1e-3, schedule: linear, warmup: 0.1}}
    attention: {attention}
"""
SSA = {"kind": "ssa", "block": 16, "count": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "infllm_v2": MECHANISMS["infllm-v2"],
    "nsa": MECHANISMS["nsa"],
    "ssa": SSA,
    "sparse_only": {**SSA, "align": 0, "sparse_share": 1.0},
}
BUDGETS = (4, 8, 16, 32)
"""Blocks of 16 tokens per query, in evaluations of the sparse stream."""


def longspan(folder: Path, *words: str) -> None:
    """A command in a folder."""
    command = [sys.executable, "-m", "longspan.cli", *words]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def start(folder: Path, seed: int, tokens: str) -> Path:
    """The weights that all variants of a seed start from."""
    (folder / f"base-{seed}.yaml").write_text(BASE.format(seed=seed, tokens=tokens))
    longspan(folder, "train", f"base-{seed}.yaml", "--run-dir", f"base-{seed}")
    longspan(folder, "export", f"base-{seed}", f"start-{seed}")
    return folder / f"start-{seed}"


def continued(folder: Path, variant: str, seed: int, weights: Path, tokens: str) -> dict[str, Any]:
    """A variant's curve and what it ends with."""
    name, attention = f"{variant}-{seed}", json.dumps({"mechanism": VARIANTS[variant]})
    text = CONTINUED.format(seed=seed, start=weights, tokens=tokens, attention=attention)
    (folder / f"{name}.yaml").write_text(text)
    longspan(folder, "train", f"{name}.yaml", "--run-dir", name)
    summary = json.loads((folder / name / "complete.json").read_text())
    lines = (folder / name / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    looks = [event for event in events if event["event"] == "attention"]
    row = {
        "variant": variant,
        "seed": seed,
        "recipe": text.replace(str(folder), "."),
        "curve": [round(event["loss"], 4) for event in events if event["event"] == "step"],
        "held_out_loss": summary["stages"][-1]["held_out_loss"],
        "gain_of_context": summary["evaluations"][0]["gain"],
        "telemetry": [{"step": look["step"], "layers": look["layers"]} for look in looks],
    }
    if VARIANTS[variant]["kind"] == "ssa":
        row["evaluations"] = evaluations(folder / name, VARIANTS[variant])
    return row


def evaluations(run_dir: Path, mechanism: dict[str, Any]) -> dict[str, float]:
    """Held-out loss of the last checkpoint with full attention, and at several budgets."""
    ways = {"full": {"evaluate": "full"}}
    ways |= {f"sparse_{count}": {"evaluate_count": count} for count in BUDGETS}
    return {name: evaluated(run_dir, {**mechanism, **way}) for name, way in ways.items()}


def evaluated(run_dir: Path, mechanism: dict[str, Any]) -> float:
    """Held-out loss of the last checkpoint under another mechanism with its parameters."""
    directory = RunDirectory(run_dir)
    run = directory.load_settings()
    attention = AttentionSettings.model_validate({"mechanism": mechanism})
    alone = {"attention": attention, "parallel": ParallelSettings()}
    stage = run.stages[-1].model_copy(update=alone)
    corpus = prepare_corpus(
        stage.data,
        run.tokenizer,
        tokenizer_data=tuple(other.data for other in run.stages),
        cache=default_cache(),
        progress=False,
    )
    engine = Engine(run, stage, run.model.vocab or corpus.vocab)
    newest = committed_at(LocalStore(directory.checkpoints), None)
    load_state(engine, StoredState(newest), optimizer=False)
    held_out = HeldOutSamples(corpus.held_out, stage.length)
    return held_out_loss(engine, [held_out[number] for number in range(run.evaluation.sequences)])


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out losses beside dense of the same seed."""
    dense = {row["seed"]: row["held_out_loss"] for row in rows if row["variant"] == "dense"}
    lines = [
        f"{'variant':<14}{'seed':>5}{'held-out loss':>15}{'to dense':>10}{'full attention':>16}"
    ]
    for row in rows:
        loss, full = row["held_out_loss"], row.get("evaluations", {}).get("full")
        apart = f"{loss / dense[row['seed']] - 1:+.2%}"
        shown = "" if full is None else f"{full:.4f}"
        lines.append(f"{row['variant']:<14}{row['seed']:>5}{loss:>15.4f}{apart:>10}{shown:>16}")
    return "\n".join(lines)


def main() -> None:
    """Train everything, show the table and keep the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--base-tokens", default="1.5M")
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    about = {
        "tokens": {"base": args.base_tokens, "continued": args.tokens},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }
    with tempfile.TemporaryDirectory() as home:
        for seed in args.seeds:
            weights = start(Path(home), seed, args.base_tokens)
            for variant in args.variants:
                rows.append(continued(Path(home), variant, seed, weights, args.tokens))
                if args.out:  # an hour is long: what there is stays
                    args.out.write_text(json.dumps({"rows": rows, **about}) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
