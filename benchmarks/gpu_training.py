"""Training on a GPU, as a user starts it: speed, memory, agreement with a CPU, kill and resume.

Small runs side by side: each mechanism on the GPU in fp32 and bf16 and on the CPU in fp32, one that
is killed and one that is asked to stop, which then go on. And a larger model that goes through all
mechanisms, a stage each: after them, by itself, but with --quick beside them, so that its figures
are a lower bound. Whatever fails is told, and the rest goes on.
Run: python benchmarks/gpu_training.py --quick (under 2 minutes on an H100)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from longspan.trainer.observe.events import read_events

MECHANISMS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "infllm_v2": {"kind": "infllm_v2", "count": 15, "local": 8, "dense_below": 1024},
    "nsa": {"kind": "nsa"},
    "window": {"kind": "window", "window": 512, "first": 4},
    "moba": {"kind": "moba", "block": 128, "count": 4},
    "ssa": {"kind": "ssa", "block": 64, "count": 16},
    "sharded_heads": {"kind": "sharded_heads", "block": 64, "local": 4, "stride": 4},
}
SMALL = {"hidden": 256, "layers": 2, "heads": 8, "query_groups": 2, "head_dim": 64}
LARGE = {"hidden": 1024, "layers": 8, "heads": 16, "query_groups": 4, "head_dim": 64}
FFN = {256: 512, 1024: 2816}

TOLERANCES = {"fp32": 0.01, "bf16": 0.05, "resumed": 0.005}
"""Nats between two losses of the same step: GPU and CPU in fp32, GPU in bf16 and CPU in fp32, and
a run that went on beside one that was left alone."""

_TAIL = 40
_EVERY = 5
"""Steps between the small runs' checkpoints."""


def recipe(
    model: dict[str, Any], mechanisms: list[str], precision: str, steps: int, length: int
) -> dict[str, Any]:
    """A run with a stage for each mechanism; a step has two sequences."""
    small = model is SMALL
    return {
        "summary": f"{', '.join(mechanisms)} in {precision}",
        "precision": precision,
        "ranks": 1,
        "tokenizer": {"kind": "train", "vocab": 1024},
        "model": {**model, "ffn_hidden": FFN[model["hidden"]]},
        "defaults": {
            "length": length,
            "batch_tokens": 2 * length,
            "tokens": 2 * length * steps,
            "rope": {"base": 1_000_000},
            "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0.2},
            "data": {"sources": [{"kind": "python-stdlib"}], "held_out": 0.1},
        },
        "stages": [
            {"name": name, "attention": {"mechanism": MECHANISMS[name]}} for name in mechanisms
        ],
        "checkpoint": {"every": _EVERY if small else 1000},
        "evaluation": {"sequences": 4, "documents": 4, "visible": length // 4},
        "telemetry": {"every": steps // 2},
        "tracking": {"wandb": "off"},
    }


@dataclass(eq=False)
class Trained:
    """A run: how it is started, and what its events say."""

    name: str
    folder: Path
    on_cpu: bool = False
    threads: int = 4
    codes: list[int] = field(default_factory=list)
    begun: float = 0.0
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.folder / f"{self.name}.log"

    def start(self, settings: dict[str, Any] | None = None) -> Trained:
        """Trains a recipe; without one the run is resumed."""
        run_dir = str(self.folder / self.name)
        words = ["resume", run_dir]
        if settings is not None:
            path = self.folder / f"{self.name}.yaml"
            path.write_text(json.dumps(settings))  # which is YAML, too
            words = ["train", str(path), "--run-dir", run_dir]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.on_cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.begun = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "longspan.cli", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def ended(self) -> bool:
        """Whether it has; then its exit code is known."""
        code = None if self.process is None else self.process.poll()
        if code is not None:
            self.codes.append(code)
            self.process = None
        return code is not None

    def send(self, number: signal.Signals) -> None:
        """Sends its launcher a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Ends it at once; the ranks end with their launcher."""
        if self.process is not None:
            self.process.kill()
            self.codes.append(self.process.wait())

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Those of a kind; half-written lines are left out."""
        path = self.folder / self.name / "events.jsonl"
        return [dict(event) for event in read_events(path) if event.get("event") == kind]

    def steps(self) -> dict[int, dict[str, Any]]:
        """The newest event of each step."""
        return {event["step"]: event for event in self.events("step")}

    def losses(self) -> list[float]:
        """By step."""
        return [event["loss"] for _, event in sorted(self.steps().items())]

    def show(self) -> None:
        """The end of its output, where it failed."""
        lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
        print(f"---- {self.name} ended with {self.codes}; the end of its output:")
        print("\n".join(lines[-_TAIL:]), flush=True)

    def report(self) -> dict[str, Any]:
        """What there is to know of it."""
        steps = list(self.steps().values())
        stages = {}
        for name in dict.fromkeys(event["stage"] for event in steps):
            stages[name] = _of_stage([event for event in steps if event["stage"] == name])
        return {
            "exit_codes": self.codes,
            "stages": stages,
            "seconds_to_first_step": steps[0]["time"] - self.events("launched")[0]["time"]
            if steps and self.events("launched")
            else None,
            "saves": [event.get("stall_s") for event in self.events("saving")],
            "saved": [event.get("seconds") for event in self.events("saved")],
            "restored": [event.get("seconds") for event in self.events("restored")],
            "evaluations": [
                {"name": event["name"], "step": event["step"], "seconds": event["seconds"]}
                | event["values"]
                for event in self.events("evaluated")
            ],
            "attention": [event["layers"] for event in self.events("attention")],
            "remarks": [event for kind in ("alarm", "warning") for event in self.events(kind)],
        }


def _of_stage(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the second half of the steps the medians: the first ones compile and tune kernels."""
    late = steps[len(steps) // 2 :]

    def median(key: str) -> float | None:
        values = [event[key] for event in late if event.get(key) is not None]
        return statistics.median(values) if values else None

    peak = steps[-1].get("peak_bytes")
    return {
        "steps": len(steps),
        "step_s": median("step_s"),
        "first_step_s": steps[0]["step_s"],
        "tokens_per_s": median("tokens_per_s"),
        "tflops_per_s": median("tflops_per_s"),
        "mfu": median("mfu"),
        "peak_gib": None if peak is None else peak / 2**30,
        "losses": [event["loss"] for event in steps],
        "grad_norms": [event["grad_norm"] for event in steps],
    }


class Session:
    """All runs of one call, and the verdicts on them."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.begun = time.monotonic()
        self.until = self.begun + args.seconds
        self.runs: dict[str, Trained] = {}
        self.verdicts: dict[str, Any] = {}

    def new(self, name: str, *, on_cpu: bool = False) -> Trained:
        """A run that is not started."""
        # What the GPU computes needs little of the CPU.
        threads = max(1, (os.cpu_count() or 1) // 8)
        run = self.runs[name] = Trained(name, self.folder, on_cpu, threads)
        return run

    def small(self, name: str, precision: str) -> dict[str, Any]:
        """The recipe of a small run."""
        return recipe(SMALL, [name], precision, self.args.small_steps, self.args.small_length)

    def train(self) -> None:
        """All runs. Where time is short the large one does not wait for the small ones."""
        names, last = self.args.mechanisms, self.args.mechanisms[-1]
        if self.args.quick:
            self._start_large()
        for name in names:
            self.new(f"cpu-fp32-{name}", on_cpu=True).start(self.small(name, "fp32"))
        self.new("killed").start(self.small(last, "fp32"))
        self.new("stopped").start(self.small(names[0], "bf16"))
        for precision in ("bf16", "fp32"):
            for name in names:
                self.new(f"gpu-{precision}-{name}").start(self.small(name, precision))
        half = self.args.small_steps // 2
        signals = {"killed": (signal.SIGKILL, half), "stopped": (signal.SIGTERM, half)}
        after = {"killed": -signal.SIGKILL, "stopped": 75}
        going = dict(self.runs)
        while going and time.monotonic() < self.until:
            for name, run in list(going.items()):
                if name in signals and len(run.steps()) >= signals[name][1]:
                    run.send(signals.pop(name)[0])
                if run.ended():
                    del going[name]
                    self._expect(run, after.pop(name, 0))
                    if name in ("killed", "stopped") and len(run.codes) == 1:
                        going[name] = run.start()
            if not going and "large" not in self.runs:
                self._start_large()
                going["large"] = self.runs["large"]
            time.sleep(0.02)
        for run in going.values():
            run.end()
            self._expect(run, 0)

    def _start_large(self) -> None:
        args, large = self.args, self.new("large")
        large.threads = max(1, (os.cpu_count() or 1) // 2)
        large.start(recipe(LARGE, args.mechanisms, "bf16", args.steps, args.length))

    def judge(self) -> None:
        """Compares the losses of runs that should have the same ones."""
        names, runs = self.args.mechanisms, self.runs
        for name in names:
            for precision in ("fp32", "bf16"):
                pair = runs[f"gpu-{precision}-{name}"], runs[f"cpu-fp32-{name}"]
                self._compare(*pair, TOLERANCES[precision])
        self._compare(runs["killed"], runs[f"gpu-fp32-{names[-1]}"], TOLERANCES["resumed"])
        self._compare(runs["stopped"], runs[f"gpu-bf16-{names[0]}"], TOLERANCES["resumed"])

    def _compare(self, one: Trained, other: Trained, tolerance: float) -> None:
        ours, theirs = one.losses(), other.losses()
        whole = len(ours) == len(theirs) == self.args.small_steps
        apart = max((abs(a - b) for a, b in zip(ours, theirs, strict=False)), default=None)
        found = {"largest_difference": apart, "tolerance": tolerance, "complete": whole}
        found["ok"] = whole and apart is not None and apart <= tolerance
        self.verdicts[f"{one.name} beside {other.name}"] = found

    def _expect(self, run: Trained, expected: int) -> None:
        code = run.codes[-1]
        found = {"exit_code": code, "seconds": time.monotonic() - run.begun, "ok": code == expected}
        self.verdicts[f"{run.name}, start {len(run.codes)}"] = found
        text = f"{run.name} ended with {code} after {found['seconds']:.1f} s"
        print(f"[{time.monotonic() - self.begun:6.1f} s] {text}", flush=True)
        if code != expected:
            run.show()

    def results(self) -> dict[str, Any]:
        """Everything, for the file."""
        return {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "seconds": time.monotonic() - self.begun,
            "arguments": {
                key: str(value)
                for key, value in vars(self.args).items()
                if key not in ("folder", "out")
            },
            "verdicts": self.verdicts,
            "runs": {name: run.report() for name, run in self.runs.items()},
            "versions": {"python": platform.python_version()}
            | {name: _version(name) for name in ("torch", "triton", "megatron-core")},
            "date": datetime.now(UTC).date().isoformat(),
        }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def table(session: Session) -> str:
    """The large run by mechanism, then every verdict."""
    lines = [f"{'large run':<16}{'ms':>8}{'tokens/s':>11}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}  loss"]
    large = session.runs.get("large")
    for name, row in (large.report()["stages"] if large else {}).items():
        losses = row["losses"]
        lines.append(
            f"{name:<16}{1e3 * row['step_s']:>8.1f}{row['tokens_per_s']:>11,.0f}"
            f"{row['tflops_per_s']:>9.1f}{row['mfu'] or 0:>7.1%}{row['peak_gib'] or 0:>7.1f}"
            f"  {losses[0]:.4f} to {losses[-1]:.4f} in {len(losses)} steps"
        )
    for name, found in session.verdicts.items():
        values = ", ".join(f"{key} {value}" for key, value in found.items() if key != "ok")
        lines.append(f"{'ok    ' if found['ok'] else 'FAILED'}  {name}: {values}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mechanisms", nargs="+", choices=list(MECHANISMS))
    parser.add_argument("--steps", type=int, help="of the large run, for each mechanism")
    parser.add_argument("--length", type=int, default=16384, help="of the large run's sequences")
    parser.add_argument("--small-steps", type=int, default=20)
    parser.add_argument("--small-length", type=int, default=2048)
    parser.add_argument("--seconds", type=float, help="after which everything is ended")
    parser.add_argument("--quick", action="store_true", help="fewer steps, 105 seconds")
    parser.add_argument("--folder", type=Path, help="for the runs; kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.mechanisms = args.mechanisms or list(MECHANISMS)[: 3 if args.quick else None]
    args.steps = args.steps or (20 if args.quick else 60)
    args.seconds = args.seconds or (105.0 if args.quick else 600.0)
    return args


def main() -> None:
    """Train, judge, print and write."""
    args = arguments()
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("LONGSPAN_CACHE", str(folder / "cache"))
        session = Session(args, folder)
        for part in (session.train, session.judge):
            try:
                part()
            except Exception as error:  # what the other parts find out is worth having
                session.verdicts[part.__name__] = {"error": repr(error), "ok": False}
        results = session.results()
        print(table(session), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(0 if all(found["ok"] for found in session.verdicts.values()) else 1)


if __name__ == "__main__":
    main()
