"""Signals to ranks and to their launcher, in real processes: stop, stop at once, save and go on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.settings import RunSettings

RANK = """
import os, sys, time
from pathlib import Path
from longspan.trainer import stopping
from longspan.trainer.failure import die_with_parent

die_with_parent()
stopping._REPEAT_S = 0.5
mode, run_dir = sys.argv[1], Path(sys.argv[2])
rank, saves = int(os.environ.get("RANK", "0")), 0

def tell(what):
    (run_dir / "logs" / f"{what}-{rank}").write_text(str(os.getpid()))

tell("started")
if mode == "slow":
    while not (run_dir / "go").exists():
        time.sleep(0.01)
stop = stopping.StopRequest()
stop.listen()
tell("listens")
while not stop.requested or mode == "stuck":
    if stop.take_save():
        saves += 1
        tell(f"saved{saves}")
    if (run_dir / "end").exists():
        sys.exit(0)
    time.sleep(0.01)
tell("stopping")
time.sleep({"saves": 1.5}.get(mode, 0))
sys.exit(75)
"""

LAUNCHER = """
import sys
from pathlib import Path
from longspan.trainer import launch
launch.gpu_count = lambda: 0
sys.exit(launch.resume(Path(sys.argv[-1]), sys.argv[1:-1]))
"""


def settings(grace: float) -> RunSettings:
    stage = {"name": "short", "length": 256, "tokens": 8192, "batch_tokens": 1024,
             "data": {"sources": [{"kind": "python-stdlib"}]}}  # fmt: skip
    raw = {
        "ranks": 2,
        "model": {"hidden": 64, "layers": 2, "heads": 4, "ffn_hidden": 128},
        "tokenizer": {"kind": "train", "vocab": 512},
        "tracking": {"wandb": "off"},
        "recovery": {"grace": grace},
        "stages": [stage],
    }
    return RunSettings.model_validate(raw)


class Started:
    """A process, what it tells in its run's logs, and what it prints."""

    def __init__(self, path, process):
        self.path, self.process = path, process

    def tells(self, what: str) -> bool:
        return (self.path / "logs" / what).exists()

    def wait_for(self, *told: str) -> None:
        deadline = time.monotonic() + 60
        while not all(map(self.tells, told)):
            assert time.monotonic() < deadline and self.process.poll() is None, told
            time.sleep(0.02)

    def pid(self, rank: int) -> int:
        return int((self.path / "logs" / f"listens-{rank}").read_text())

    def ends(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.fixture
def start(tmp_path):
    """Start a launcher with two ranks, or a rank without one."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "LONGSPAN_LAUNCHER_PID"):
        os.environ.pop(name, None)
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    started = []

    def begin(mode, grace=60.0, launcher=True):
        path = tmp_path / "run"
        create_or_open(path, settings(grace), "tiny")
        command = [sys.executable, str(script), mode]
        if launcher:
            command = [sys.executable, "-c", LAUNCHER, *command]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([*command, str(path)], **out)
        started.append(process)
        return Started(path, process)

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_repeated_sigterms_of_a_scheduler_are_one_request(start):
    run = start("saves", launcher=False)
    run.wait_for("listens-0")
    run.process.terminate()
    run.wait_for("stopping-0")
    run.process.terminate()
    assert run.ends()[0] == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_rank_without_launcher_at_once(start, number):
    run = start("stuck", launcher=False)
    run.wait_for("listens-0")
    run.process.terminate()
    time.sleep(1.0)
    assert run.process.poll() is None
    run.process.send_signal(number)
    assert run.ends()[0] == -number


def test_a_second_ctrl_c_ends_a_rank_without_launcher_at_once(start):
    run = start("stuck", launcher=False)
    run.wait_for("listens-0")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    assert run.ends()[0] == -signal.SIGINT


def test_a_second_sigterm_to_the_launcher_stops_at_once(start):
    run = start("stuck")
    run.wait_for("listens-0", "listens-1")
    run.process.terminate()
    assert "saving, press Ctrl-C again" in "".join(run.process.stdout.readline() for _ in "12")
    run.process.terminate()
    code, output = run.ends()
    assert code == 130 and "not saved within" not in output


def test_what_has_not_saved_within_its_grace_is_killed_and_that_is_said(start):
    run = start("stuck", grace=1.0)
    run.wait_for("listens-0", "listens-1")
    begun = time.monotonic()
    run.process.terminate()
    code, output = run.ends()
    assert code == 130 and time.monotonic() - begun > 1
    assert "not saved within 1 s (recovery.grace): stopped at once" in output
    assert f"longspan resume {run.path}" in output


def test_sigusr1_to_the_launcher_reaches_one_rank_and_all_go_on(start):
    run = start("run")
    run.wait_for("listens-0", "listens-1")
    run.process.send_signal(signal.SIGUSR1)
    run.wait_for("saved1-0")
    os.kill(run.pid(1), signal.SIGUSR1)
    run.wait_for("saved1-1")
    run.process.send_signal(signal.SIGUSR1)
    run.wait_for("saved2-0")
    assert not run.tells("saved2-1") and run.process.poll() is None
    (run.path / "end").touch()
    assert run.ends()[0] == 0


def test_sigusr1_waits_for_ranks_that_still_start(start):
    run = start("slow")
    run.wait_for("started-0", "started-1")
    run.process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    assert run.process.poll() is None and not run.tells("listens-0")
    (run.path / "go").touch()
    run.wait_for("saved1-0")
    (run.path / "end").touch()
    assert run.ends()[0] == 0
