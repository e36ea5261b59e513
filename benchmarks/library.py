"""The shipped recipe of each mechanism: written from one template, trained, and compared.

`python benchmarks/library.py --write` makes the recipes anew. Without it they are trained one after
another, and a table shows each beside dense attention after equally many tokens.
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

LIBRARY = Path(__file__).parents[1] / "recipes" / "library"
PREFIX = "attention-"

TEMPLATE = """\
# Written by benchmarks/library.py: change the template there.
base: {base}
summary: {summary}

stages:
  - name: base
    length: 1K
    tokens: 600K
    batch_tokens: 4K
    rope: {{base: 1000000}}
    optimizer: {{lr: 3e-3, schedule: constant, warmup: 0.05}}
{stages}"""

STAGE = """\
  - name: {name}
    length: 4K
    tokens: {tokens}
    batch_tokens: 8K
    rope: {{base: 10000000}}
    optimizer: {{lr: {lr}, schedule: linear, warmup: 0}}
{attention}"""

DENSE: dict[str, Any] = {"kind": "dense"}
INDEXER: dict[str, Any] = {
    "kind": "indexer",
    "block": 32,
    "count": 16,
    "local": 1,
    "heads": 2,
    "dim": 16,
}
MECHANISMS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "window": {"kind": "window", "window": 512, "first": 4},
    "nsa": {
        "kind": "nsa",
        "block": 32,
        "count": 8,
        "window": 256,
        "compress": "mean",
        "encode_position": "none",
    },
    "infllm-v2": {
        "kind": "infllm_v2",
        "block": 32,
        "count": 7,
        "local": 8,
        "coarse": 0,
        "dense_below": 512,
    },
    "ssa": {"kind": "ssa", "block": 16, "count": 32},
    "moba": {"kind": "moba", "block": 128, "count": 4},
    "sharded-heads": {"kind": "sharded_heads", "block": 32, "local": 4, "stride": 4},
    "seer": {"kind": "seer", "block": 32, "dim": 16, "count": 16},
    "indexer": INDEXER,
}
"""What follows the same dense start; a query sees about 512 of 4,096 tokens."""


def stage(name: str, mechanism: dict[str, Any], tokens: str, trainable: str = "all") -> str:
    """A stage of 4K tokens."""
    lines = []
    if mechanism != DENSE:
        inner = ", ".join(f"{key}: {value}" for key, value in mechanism.items())
        lines.append(f"    attention: {{mechanism: {{{inner}}}}}")
    if trainable != "all":
        lines.append(f"    trainable: {trainable}")
    attention = "".join(f"{line}\n" for line in lines)
    # Selections learn from scratch, and nothing else does in their stages.
    lr = "3e-3" if trainable == "all" else "1e-2"
    return STAGE.format(name=name, tokens=tokens, lr=lr, attention=attention)


def recipe(name: str) -> str:
    """The recipe of a mechanism."""
    mechanism = MECHANISMS[name]
    summary = "Dense attention at 4K tokens, to compare the other attention- recipes with"
    stages = [stage("stretch", mechanism, "400K")]
    if name != "dense":
        summary = f"From dense attention at 1K tokens to {mechanism['kind']} at 4K"
    if name == "seer":
        summary = "Dense attention at 4K tokens, then a gate that learns which blocks it looks at"
        stages = [stage("stretch", DENSE, "400K"), stage("gate", mechanism, "200K", "selection")]
    if name == "indexer":
        warm = {**mechanism, "attend": "dense"}
        stages = [stage("warm_up", warm, "80K", "selection"), *stages]
    return TEMPLATE.format(base="attention", summary=summary, stages="".join(stages))


def files() -> dict[Path, str]:
    """Every recipe's file and text."""
    return {LIBRARY / f"{PREFIX}{name}.yaml": recipe(name) for name in MECHANISMS}


def trained(name: str, folder: Path) -> dict[str, Any]:
    """What a run of the recipe ends with."""
    run_dir = folder / name
    command = [sys.executable, "-m", "longspan.cli", "train", f"{PREFIX}{name}"]
    subprocess.run([*command, "--run-dir", run_dir], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((run_dir / "complete.json").read_text())
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    looks = [event["layers"] for event in events if event["event"] == "attention"]
    gain = summary["evaluations"][0]["gain"]
    return {
        "recipe": f"{PREFIX}{name}",
        "held_out_loss": summary["stages"][-1]["held_out_loss"],
        "gain_of_context": gain["gain"],
        "standard_error": gain["standard_error"],
        "seconds": summary["wall_s"],
        "last_telemetry": looks[-1] if looks else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows beside the first one, which is dense."""
    dense = rows[0]["held_out_loss"]
    lines = [f"{'recipe':<25}{'held-out loss':>15}{'to dense':>10}{'gain of context':>22}{'s':>6}"]
    for row in rows:
        gain = f"{row['gain_of_context']:+.4f} +- {row['standard_error']:.4f}"
        apart = f"{row['held_out_loss'] / dense - 1:+.2%}"
        loss, seconds = f"{row['held_out_loss']:.4f}", f"{row['seconds']:.0f}"
        lines.append(f"{row['recipe']:<25}{loss:>15}{apart:>10}{gain:>22}{seconds:>6}")
    return "\n".join(lines)


def main() -> None:
    """Write the recipes, or train them and show the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(MECHANISMS))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.write:
        for path, text in files().items():
            path.write_text(text)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [trained(name, Path(folder)) for name in dict.fromkeys(["dense", *args.names])]
    print(table(rows))
    result = {
        "rows": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
