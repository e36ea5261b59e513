"""The same verbs for runs of this machine: recorded when they start, stopped by their id."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from longspan.cluster import output, stop
from longspan.cluster.local import recorded
from longspan.cluster.registry import Record, Registry
from longspan.trainer import launch
from longspan.trainer.observe.events import EventLog
from longspan.trainer.run_directory import RunDirectory
from support.recorded import leave_run, step_event

IO = Path("/proc/self/io")
WORKER = """
import os, signal, sys, time
from pathlib import Path
from longspan.trainer.failure import die_with_parent

die_with_parent()
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
run_dir = Path(sys.argv[1])
(run_dir / "started").touch()
while not stop:
    time.sleep(0.01)
if (run_dir / "stubborn").exists():
    time.sleep(60)
sys.exit(75)
"""
LAUNCHER = """
import sys
from pathlib import Path
from longspan.trainer import launch
launch.gpu_count = lambda: 0
sys.exit(launch.resume(Path(sys.argv[-1]), sys.argv[1:-1]))
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stop, "_POLL_S", 0.02)
    monkeypatch.setattr(output, "_POLL_S", 0.02)


@pytest.fixture
def at_work(tmp_path):
    """A run with a launcher and a rank, both real; its folder and the launcher."""
    (tmp_path / "worker.py").write_text(WORKER)
    directory = leave_run(tmp_path / "mine", 0, (75, "stopped"))
    command = [sys.executable, "-c", LAUNCHER, sys.executable, str(tmp_path / "worker.py")]
    launcher = subprocess.Popen([*command, str(directory)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (directory.path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield directory, launcher
    launcher.kill()
    launcher.wait()


def known(directory: RunDirectory, name: str = "mine-1") -> Record:
    record = Record(name, "short", time.time(), str(directory.path))
    Registry().write(record)
    return record


def test_training_is_recorded_and_a_run_that_never_began_is_not(longspan, monkeypatch, user):
    def train(run, name, directory):
        seen.extend(Registry().records())
        leave_run(directory, 1, (75, "stopped"), run, name)
        return 75

    seen: list[Record] = []
    monkeypatch.setattr(launch, "train", lambda *_: 2)
    assert longspan("train", "smoke")[0] == 2 and Registry().records() == []
    monkeypatch.setattr(launch, "train", train)
    assert longspan("train", "smoke", "--run-dir", "mine")[0] == 75
    (record,) = Registry().records()
    assert seen == [record] and record.cluster is None
    assert (record.recipe, record.run_dir) == ("smoke", str(user / "mine"))
    assert longspan("train", "smoke", "--run-dir", "./mine/")[0] == 75
    assert Registry().records() == [record]
    assert f"{record.id}  here" in longspan("runs")[1]
    assert longspan("status", record.id)[1].startswith("mine: stopped, and saved\n")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_the_ranks_of_torchrun_one_records(monkeypatch, tmp_path, rank):
    monkeypatch.setenv("RANK", rank)
    with recorded("smoke", tmp_path / "run"):
        assert len(Registry().records()) == (rank == "0")


def test_records_that_cannot_be_kept_stop_no_training(longspan, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPAN_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(launch, "train", lambda *_: 0)
    assert longspan("train", "smoke") == (0, "", "")


def test_resume_by_id_goes_on_here(longspan, monkeypatch, tmp_path):
    record = known(leave_run(tmp_path / "mine"))
    calls = []
    monkeypatch.setattr(launch, "resume", lambda path, **how: calls.append((path, how)) or 0)
    assert longspan("resume", "mine", "--from", "3")[0] == 0
    assert calls == [(Path(record.run_dir), {"exactness": None, "from_step": 3})]
    code, _, err = longspan("resume", "mine", "--insecure")
    assert code == 2 and "--insecure is for runs on clusters" in err


def test_stop_asks_the_launcher_and_waits(longspan, at_work):
    directory, launcher = at_work
    known(directory)
    code, out, err = longspan("stop", "mine")
    assert (code, err) == (0, "")
    assert out.startswith("asked mine-1 to save and stop") and "\nmine-1 has stopped\n" in out
    assert launcher.wait(10) == 75
    code, _, err = longspan("stop", "mine-1")
    assert code == 2 and "mine-1 is not running: it is stopped" in err


def test_a_launcher_that_is_killed_meanwhile(longspan, at_work, monkeypatch):
    directory, launcher = at_work
    (directory.path / "stubborn").touch()

    def kill(_):
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()

    monkeypatch.setattr(stop.time, "sleep", kill)
    code, out, _ = longspan("stop", str(directory))
    assert code == 1 and "has ended and is lost: no checkpoint was written" in out


def test_a_run_of_another_machine_or_of_none(longspan, at_work, monkeypatch, tmp_path):
    directory, _ = at_work
    with monkeypatch.context() as patched:
        patched.setattr(stop.socket, "gethostname", lambda: "laptop")
        code, _, err = longspan("stop", str(directory))
        assert code == 2 and ", and this is laptop" in err and "there: longspan stop /" in err
    assert "does not exist" in longspan("stop", "./nothing")[2]
    leave_run(tmp_path / "done", 8, (0, "complete"))
    assert "it is complete" in longspan("stop", str(tmp_path / "done"))[2]


def test_logs_are_the_events_as_a_terminal_shows_them(longspan, tmp_path):
    directory = leave_run(tmp_path / "mine", 8, None)
    log = EventLog(directory.events, 1)
    log.write("saving", step=8, stall_s=0.5)
    log.write("saved", step=8, path="step-8", seconds=2.0)
    log.write("warning", text="something HF_TOKEN=hunter2-hunter2")
    log.write("step", step="torn")
    log.write("ended", code=1, how="failed", reason="it broke")
    log.write("launched", ranks=2)
    log.write("step", **step_event(2))
    log.write("step", **step_event(3))
    log.write("ended", code=0, how="complete")
    log.close()
    with directory.events.open("a") as file:
        file.write("{torn")
    (directory.logs / "rank-1.log").write_text("hello\nworld")
    code, out, err = longspan("logs", str(directory))
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("attempt 1, 20") and lines[0].endswith("ranks: 1")
    assert lines[1] == "stage 1/1 short: length=256 steps=8"
    assert [line.split()[1] for line in lines if "loss=" in line] == [
        "step=1/8", "step=8/8", "step=3/8"
    ]  # fmt: skip
    assert "saved step 8 in 2.0 s, training waited 0.5 s" in lines
    assert "warning: something HF_TOKEN=***" in lines
    assert "attempt 1 ended: failed: it broke" in lines and "torn" not in out
    assert "logs has rank-1.log; --rank N shows one" in err
    assert longspan("logs", str(directory), "--rank", "1")[:2] == (0, "hello\nworld\n")


def test_steps_are_ten_seconds_apart(longspan, tmp_path, monkeypatch):
    directory = leave_run(tmp_path / "mine", 0, None)
    log = EventLog(directory.events, 1)
    for step in range(1, 41):
        monkeypatch.setattr("time.time", lambda step=step: 1000.0 + 3 * step)
        log.write("step", **step_event(step, 50))
    _, out, _ = longspan("logs", str(directory))
    shown = [int(line.split("step=")[1].split("/")[0]) for line in out.splitlines()[2:]]
    assert shown == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40]


def test_following_ends_with_the_run_and_its_exit_code(longspan, at_work):
    directory, launcher = at_work
    EventLog(directory.events, 2).write("message", text="hello from the run")
    script = (
        "import os, signal, sys, time; time.sleep(0.5); os.kill(int(sys.argv[1]), signal.SIGTERM)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(launcher.pid)]):
        code, out, _ = longspan("logs", "-f", str(directory))
    assert code == 75
    assert "hello from the run" in out and "attempt 2 ended: stopped" in out
    (directory.logs / "rank-1.log").write_text("of rank 1\n")
    assert longspan("logs", "-f", "--rank", "1", str(directory))[:2] == (75, "of rank 1\n")
    EventLog(directory.events, 3).write("launched", ranks=2)  # and killed without a word
    assert longspan("logs", "-f", str(directory))[0] == 1


def test_head_may_close_the_pipe(tmp_path):
    directory = leave_run(tmp_path / "mine", 0)
    log = EventLog(directory.events, 1)
    for _ in range(1_000):  # more than a pipe holds
        log.write("message", text="line " * 50)
    log.close()
    command = f"{sys.executable} -m longspan.cli logs {directory} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("attempt 1") and done.stderr == ""


def test_runs_whose_folder_is_gone_are_counted(longspan, tmp_path):
    known(leave_run(tmp_path / "mine"))
    known(RunDirectory(tmp_path / "nothing"), "old-1")
    _, out, _ = longspan("runs")
    assert "old-1" not in out and "1 more without a folder; --all shows them" in out
    assert "old-1   here   gone" in longspan("runs", "--all")[1]
    assert "does not exist" in longspan("status", "old-1")[2]


def test_a_list_needs_neither_torch_nor_ray(tmp_path):
    for number in range(3):
        known(leave_run(tmp_path / f"run-{number}"), f"run-{number}")
    program = (
        "import sys\nfrom longspan import cli\n"
        "for verb in (['status'], ['status', 'run-1'], ['runs'], ['logs', 'run-1'],"
        " ['submit', '-h']):\n"
        "    sys.argv = ['longspan', *verb]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code\n"
        "heavy = {'torch', 'ray', 'aiohttp', 'megatron', 'pyarrow', 'numpy', 'wandb'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "heavy: []"
    assert sum(line.startswith("run-") and " stopped " in line for line in lines) == 6


@pytest.mark.skipif(not IO.exists(), reason="the system does not say what a process has read")
def test_a_list_reads_the_ends_of_long_events_only(longspan, tmp_path):
    runs, size = 20, 4 * 2**20
    for number in range(runs):
        directory = leave_run(tmp_path / f"run-{number}", 0, None)
        os.truncate(directory.events, size)  # grows by a hole
        log = EventLog(directory.events, 1)
        log.write("step", **step_event(number, 50))
        log.write("ended", code=75, how="stopped")
        log.close()
        known(directory, f"run-{number}")
    longspan("runs")  # what it imports is read as well
    before = read_bytes()
    code, out, _ = longspan("runs")
    read = read_bytes() - before
    assert code == 0 and all(f"{number}/50" in out for number in range(1, runs))
    assert runs * 2**10 < read < runs * size / 10


def read_bytes() -> int:
    """What this process has read up to now."""
    return int(IO.read_text().split("rchar: ")[1].split()[0])
