"""Obedient: a rank that does what its mode says, a launcher of such ranks, and their recipe."""

from longspan.trainer.settings import RunSettings

WORKER = """
import os, signal, sys, time
from pathlib import Path
from longspan.errors import DataError
from longspan.trainer.devices import usable_cores
from longspan.trainer.failure import die_with_parent, record_failure

def wait():
    while not stop:
        time.sleep(0.01)

def save_and_stop():
    step = run_dir / "checkpoints" / "step-40"
    step.mkdir(exist_ok=True)
    (step / "COMMITTED").touch()
    sys.exit(75)

mode, run_dir = sys.argv[1], Path(sys.argv[2])
if mode != "outlive":
    die_with_parent()
rank, stop = int(os.environ["RANK"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
logs = run_dir / "logs"
(logs / f"pid-{rank}.new").write_text(str(os.getpid()))
(logs / f"pid-{rank}.new").rename(logs / f"pid-{rank}")
print(f"attempt {os.environ['LONGSPAN_ATTEMPT']} "
      f"rank {rank} of {os.environ['WORLD_SIZE']} threads {os.environ['OMP_NUM_THREADS']} "
      f"in {os.getcwd()}", flush=True)
try:
    if mode == "clean":
        sys.exit(0)
    if mode == "wait":
        wait()
        save_and_stop()
    if mode in ("hang", "outlive"):
        while True:
            time.sleep(0.05)
    if mode == "port" and not (run_dir / "tried").exists():
        time.sleep(0.3)
        if rank == 0:
            (run_dir / "tried").touch()
            raise RuntimeError("The server socket has failed: errno: 98 - Address already in use")
        wait()
        sys.exit(75)
    if mode == "save-fails":
        wait()
        if rank == 1:
            raise OSError(28, "No space left on device", "step-40/weights")
        time.sleep(60)
    while not (logs / "pid-0").exists() or not (logs / "pid-1").exists():
        time.sleep(0.01)
    if mode == "user" and rank == 1:
        raise DataError("corpus.txt is empty", "give a file with text")
    if mode == "crash" and rank == 1:
        print("about to divide", flush=True)
        1 / 0
    if mode == "silent" and rank == 1:
        print("last words", flush=True)
        os._exit(9)
    if mode == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "kill":
        while not stop:
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")
    if mode in ("user", "crash", "silent"):
        wait()
        raise RuntimeError("connection closed by peer")
except Exception as error:
    sys.exit(record_failure(run_dir, rank, error))
"""

LAUNCHER = """
import sys
from pathlib import Path
from longspan.trainer import gang, launch
launch.gpu_count = lambda: 0
gang._GRACE_S = 1.0
sys.exit(launch.resume(Path(sys.argv[-1]), sys.argv[1:-1]))
"""


def settings(**changes) -> RunSettings:
    stage = {
        "name": "short",
        "length": 256,
        "tokens": 8192,
        "batch_tokens": 1024,
        "data": {"sources": [{"kind": "python-stdlib"}]},
    }
    raw = {
        "ranks": 2,
        "model": {"hidden": 64, "layers": 2, "heads": 4, "ffn_hidden": 128},
        "tokenizer": {"kind": "train", "vocab": 512},
        "tracking": {"wandb": "off"},
        "stages": [stage],
    }
    return RunSettings.model_validate({**raw, **changes})
