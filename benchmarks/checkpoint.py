"""What a checkpoint costs: the wait of a step beside a plain copy, and files beside the raw disk.

One rank, fp32 state (weights and two moments) of a model of about the given size. The peer is
megatron-core's own distributed checkpoint of the same model and optimizer. Run alone:
python benchmarks/checkpoint.py --out benchmarks/results/checkpoint-cpu.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from longspan.trainer.checkpoint.cursor import Cursor
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.manifest import damages, read_manifest
from longspan.trainer.checkpoint.saver import Saver, State
from longspan.trainer.checkpoint.settings import CheckpointSettings
from longspan.trainer.checkpoint.stored import StoredState
from longspan.trainer.engine.checkpoint import load_state, model_dtype, state_pieces, state_steps
from longspan.trainer.engine.engine import Engine
from longspan.trainer.settings import RunSettings

GIB = 2**30
_CHUNK = 2**24


def make_engine(parameters: float) -> Engine:
    """An engine of about so many parameters, with moments that are not zero."""
    vocab, layers = 32_000, 12
    hidden = next(h for h in range(128, 8192, 128) if layers * 12 * h * h + vocab * h >= parameters)
    stage = {
        "name": "benchmark",
        "length": 128,
        "tokens": 128,
        "batch_tokens": 128,
        "data": {"sources": [{"kind": "python-stdlib"}]},
    }
    model = {"hidden": hidden, "layers": layers, "heads": hidden // 128}
    model |= {"ffn_hidden": hidden * 8 // 3 // 128 * 128}
    tokenizer = {"kind": "train", "vocab": 300}
    run = RunSettings.model_validate(
        {"precision": "fp32", "model": model, "tokenizer": tokenizer, "stages": [stage]}
    )
    engine = Engine(run, run.stages[0], vocab)
    assert engine.optimizer is not None
    engine.optimizer.create_state()
    for _, _, state, _ in engine.optimizer.shards():
        state["exp_avg"].normal_()
        state["exp_avg_sq"].uniform_()
    return engine


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def plain_copy(engine: Engine, memory: torch.Tensor) -> None:
    """All of the state, tensor by tensor, into one buffer that is there already."""
    assert engine.optimizer is not None
    at = 0
    with torch.no_grad():
        for _, main, state, _ in engine.optimizer.shards():
            for tensor in (main, state["exp_avg"], state["exp_avg_sq"]):
                memory[at : at + tensor.numel()].copy_(tensor.view(-1))
                at += tensor.numel()


def raw_write(path: Path, memory: torch.Tensor) -> None:
    """The bytes of a buffer, and a sync."""
    view = memoryview(memory.numpy()).cast("B")  # type: ignore[arg-type]
    with path.open("wb", buffering=0) as file:
        for first in range(0, len(view), _CHUNK):
            file.write(view[first : first + _CHUNK])
        os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Take files out of the system's memory, so that the next read is one of the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def raw_read(path: Path) -> None:
    """Every byte of a file."""
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass


def ours(engine: Engine, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Copies, saves and loads in turn."""
    saver = Saver(LocalStore(folder / "ours"), CheckpointSettings(keep=1))
    size = sum(p.numel() for p in engine.model.parameters()) * 3
    memory = torch.zeros(size)
    seen: dict[str, list[float]] = {}

    def state() -> State:
        return State(state_pieces(engine), model_dtype(engine), state_steps(engine))

    def note(name: str, seconds: float) -> None:
        seen.setdefault(name, []).append(seconds)

    for step in range(1, rounds + 2):
        copy = timed(lambda: plain_copy(engine, memory))
        begun = time.perf_counter()
        saver.save(state, Cursor(step=step), {}, wait=False)
        blocked = time.perf_counter() - begun
        outcome = saver.wait()
        assert outcome is not None and outcome.name is not None, outcome
        if step == 1:  # the staging memory is made at the first save
            seen["first_save_blocked"] = [blocked]
            continue
        note("plain_copy", copy)
        note("blocked", blocked)
        note("save", outcome.seconds)
        note("raw_write", timed(lambda: raw_write(folder / "raw", memory)))
        files = CheckpointFiles(saver.store, outcome.name)
        forget(folder)
        note("raw_read", timed(lambda: raw_read(folder / "raw")))
        manifest = read_manifest(files)
        note("verify", timed(lambda files=files, known=manifest: damages(files, known)))
        stored = StoredState(files)
        note("load", timed(lambda stored=stored: load_state(engine, stored, optimizer=True)))
        note("sha256", timed(lambda: hashlib.sha256(memoryview(memory.numpy())).digest()))
        (folder / "raw").unlink()
    return seen


def megatron(engine: Engine, folder: Path, rounds: int) -> dict[str, list[float]]:
    """megatron-core's asynchronous save of the same state: what the step waits for."""
    from megatron.core import dist_checkpointing

    assert engine.optimizer is not None
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
    }
    seen: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        target = folder / f"megatron-{number}"
        target.mkdir()
        begun = time.perf_counter()
        model = engine.model.sharded_state_dict(metadata=dict(metadata))
        optimizer = engine.optimizer.megatron.sharded_state_dict(
            model, is_loading=False, metadata=dict(metadata)
        )
        request = dist_checkpointing.save(
            {"model": model, "optimizer": optimizer},
            str(target),
            async_sharded_save=True,
            content_metadata=dict(metadata),
        )
        if request.preload_fn is not None:
            request.preload_fn()
        if number:
            seen.setdefault("blocked", []).append(time.perf_counter() - begun)
        shutil.rmtree(target)
    return seen


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=500e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="megatron-core, in place of ours")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = make_engine(args.parameters)
    count = sum(p.numel() for p in engine.model.parameters())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seen = (megatron if args.peer else ours)(engine, Path(folder), args.rounds)
    median = {name: statistics.median(values) for name, values in seen.items()}
    result: dict[str, Any] = {"parameters": count, "state_gib": count * 12 / GIB, "s": seen}
    if args.peer:
        result["blocked_s"] = median["blocked"]
    else:
        result["blocked_over_plain_copy"] = median["blocked"] / median["plain_copy"]
        result["gib_per_s"] = {
            name: result["state_gib"] / median[name] for name in median if "blocked" not in name
        }
    result |= {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {p: version(p) for p in ("torch", "megatron-core")},
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        old = json.loads(args.out.read_text()) if args.out.exists() else {}
        key = "megatron" if args.peer else "longspan"
        args.out.write_text(json.dumps({**old, key: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
