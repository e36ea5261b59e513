"""Import, engine load and export of a 1B-parameter Llama beside a plain safetensors copy.

Every measurement is a process of its own, whose peak memory is the kernel's count. The plain copy
reads each file with the safetensors library and writes it again, and the two take turns, with and
without waiting for the disk (fsync; the import itself always does). Both meet files that the
machine may still have in memory. Run: python benchmarks/convert.py
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from longspan.attention.settings import RopeSettings
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.convert.convert import export_checkpoint, import_checkpoint
from longspan.trainer.convert.families import FAMILIES
from longspan.trainer.convert.hf_config import HfModel, write_config
from longspan.trainer.convert.names import assemblies
from longspan.trainer.convert.safetensors_folder import write_folder
from longspan.trainer.convert.weights import FolderWeights
from longspan.trainer.parameters import count_parameters
from longspan.trainer.settings import ModelSettings, RunSettings

RESULT = Path(__file__).parent / "results" / "convert-cpu.json"
GIB = 2**30


def model(layers: int) -> HfModel:
    """The shape of Llama 3.2 1B at 16 layers."""
    shape = ModelSettings(
        hidden=2048, layers=layers, heads=32, query_groups=8, head_dim=64, ffn_hidden=8192
    )
    return HfModel(FAMILIES["llama"], shape, RopeSettings(base=5e5), 128_256, 131_072, "bf16")


def write_random(folder: Path, hf: HfModel) -> None:
    """Random weights in bf16, in shards of at most 1 GiB."""
    table = assemblies(hf.model, hf.vocab).values()
    shapes = {name: shape for assembly in table for name, shape in assembly.shapes().items()}
    noise = torch.randn(2**24).to(torch.bfloat16)
    sizes = (math.prod(shape) for shape in shapes.values())
    blocks = (noise[: min(len(noise), n - at)] for n in sizes for at in range(0, n, len(noise)))
    folder.mkdir()
    write_folder(folder, shapes, torch.bfloat16, blocks, shard_bytes=GIB)
    (folder / "config.json").write_text(json.dumps(write_config(hf, "bf16")))


def plain_copy(source: Path, out: Path, sync: bool) -> None:
    """Every file read and written by the safetensors library."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / file.name)
        if sync:
            with (out / file.name).open("rb") as written:
                os.fsync(written.fileno())


def load_engine(source: Path, step: Path) -> None:
    """Fill an engine with its optimizer, and save it, so that it can be exported."""
    import torch.distributed as dist
    from longspan.trainer.engine.checkpoint import save_engine
    from longspan.trainer.engine.engine import Engine

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weights = FolderWeights(source)
    stage = {
        "name": "benchmark",
        "length": 128,
        "tokens": 128,
        "batch_tokens": 128,
        "data": {"sources": [{"kind": "python-stdlib"}]},
    }
    tokenizer = {"kind": "train", "vocab": 300}
    run = RunSettings.model_validate(
        {"model": weights.hf.model.model_dump(), "tokenizer": tokenizer, "stages": [stage]}
    )
    engine = Engine(run, run.stages[0], weights.hf.vocab, weights=weights)
    report_peak()
    save_engine(engine, step)


_pipe: Any = None


def report_peak() -> None:
    """Send this process's peak memory, once; a later call is not read."""
    _pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _child(pipe: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    global _pipe
    _pipe = pipe
    begun = time.perf_counter()
    work(*args)
    seconds = time.perf_counter() - begun
    report_peak()
    pipe.send(seconds)


def measured(work: Callable[..., Any], *args: Any) -> dict[str, float]:
    """Seconds and peak bytes of a call in a new process; imports are not in the seconds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(there, work, args))
    process.start()
    there.close()
    found = []
    while len(found) < 2 or not isinstance(found[-1], float):
        found.append(here.recv())
    process.join()
    return {"s": found[-1], "peak_gib": found[0] / GIB}


def measure(folder: Path, rounds: int, hf: HfModel) -> dict[str, Any]:
    """Copies and imports in turn, then an engine and an export."""
    source, out = folder / "hf", folder / "out"
    measured(write_random, source, hf)
    seen: dict[str, list[dict[str, float]]] = {}

    def run(name: str, work: Callable[..., Any], *args: Any) -> None:
        shutil.rmtree(out, ignore_errors=True)
        seen.setdefault(name, []).append(measured(work, *args))

    for _ in range(rounds):
        run("plain_copy_unsynced", plain_copy, source, out, False)
        run("plain_copy", plain_copy, source, out, True)
        run("import_unsynced", import_unsynced, source, out)
        run("import", import_checkpoint, source, out)
    run("engine", load_engine, source, folder / "step")
    run("export", export_stored, folder / "step", out, hf)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    median = {name: statistics.median(one["s"] for one in all_) for name, all_ in seen.items()}
    return {
        "parameters": count_parameters(hf.model, hf.vocab),
        "weights_gib": size / GIB,
        "peak_gib": {name: max(one["peak_gib"] for one in all_) for name, all_ in seen.items()},
        "gib_per_s": {name: size / GIB / median[name] for name in median if name != "engine"},
        "import_over_plain_copy": median["plain_copy"] / median["import"],
        "import_over_plain_copy_unsynced": median["plain_copy_unsynced"]
        / median["import_unsynced"],
        "seconds_of_each_round": {name: [one["s"] for one in all_] for name, all_ in seen.items()},
    }


def import_unsynced(source: Path, out: Path) -> None:
    """The import without waiting for the disk, as the plain copy does not wait either."""
    os.fsync = lambda _: None
    import_checkpoint(source, out)


def export_stored(step: Path, out: Path, hf: HfModel) -> None:
    """Export with what is known of the model."""
    export_checkpoint(CheckpointFiles.of(step), out, hf=hf)


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the files go for a while; 15 GiB")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(Path(folder), args.rounds, model(args.layers))
    result |= {
        "rounds": args.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
