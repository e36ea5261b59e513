"""Ranks are started, stopped and mourned together; the worker here is a script that obeys."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from longspan.errors import RunError
from longspan.trainer import launch, run_lock, torchrun
from longspan.trainer.devices import usable_cores
from longspan.trainer.failure import LAUNCHER_PID, read_failures, record_failure
from longspan.trainer.run_directory import RunDirectory, create_or_open
from longspan.trainer.settings import RunSettings
from support.short_run import short_run

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
    step = run_dir / "checkpoints" / "step-00000040"
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
print(f"rank {rank} of {os.environ['WORLD_SIZE']} threads {os.environ['OMP_NUM_THREADS']} "
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
    return short_run(**{"ranks": 2} | changes)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine without GPUs and without torchrun, whatever this one has."""
    use_gpus(monkeypatch, 0)
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS", LAUNCHER_PID):
        monkeypatch.delenv(name, raising=False)


def use_gpus(monkeypatch, count):
    monkeypatch.setattr(launch, "gpu_count", lambda: count)


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return lambda mode: (sys.executable, str(script), mode)


@pytest.fixture
def start(tmp_path, worker):
    """Start a launcher in a process of its own and wait until its ranks are at work."""
    started = []

    def begin(mode, until=("pid-0", "pid-1")):
        path = tmp_path / "run"
        create_or_open(path, settings(), "tiny")
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *worker(mode), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        wait_for(lambda: all((path / "logs" / name).exists() for name in until))
        return process, RunDirectory(path)

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(directory):
    pids = [int((directory.logs / f"pid-{rank}").read_text()) for rank in (0, 1)]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and not is_zombie(pid)]


def is_zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_ranks_get_their_environment_and_rank_0_the_terminal(tmp_path, worker, capfd):
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("clean")) == 0
    threads = max(1, usable_cores() // 2)
    out = capfd.readouterr().out
    assert f"rank 0 of 2 threads {threads} in {Path.cwd()}" in out and "rank 1" not in out
    assert "rank 1 of 2" in (tmp_path / "run" / "logs" / "rank-1.log").read_text()


def test_a_users_thread_count_is_kept(tmp_path, worker, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("clean")) == 0
    assert "threads 7" in capfd.readouterr().out


def test_ranks_work_where_the_run_was_created(tmp_path, worker, capfd, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    directory = create_or_open(tmp_path / "run", settings(), "tiny")
    monkeypatch.chdir(tmp_path)
    assert launch.resume(directory.path, worker("clean")) == 0
    assert f"in {tmp_path / 'home'}" in capfd.readouterr().out


def test_a_user_error_is_shown_once_without_a_traceback(tmp_path, worker, capfd):
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("user")) == 2
    err = capfd.readouterr().err
    assert err.count("corpus.txt is empty\n  fix: give a file with text") == 1
    assert "Traceback" not in err and "connection closed" not in err
    assert f"longspan resume {RunDirectory(tmp_path / 'run')}" in err


def test_a_crash_shows_the_first_traceback_and_the_logs(tmp_path, worker, capfd):
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("crash")) == 1
    err = capfd.readouterr().err
    assert err.count("error: ZeroDivisionError: division by zero") == 1
    assert "Traceback" in err and "connection closed" not in err and "/logs" in err


def test_a_killed_rank_is_named_and_takes_the_others_along(tmp_path, worker, capfd):
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("kill")) == 1
    err = capfd.readouterr().err
    assert "rank 1 was killed by SIGKILL (out of memory?)" in err
    assert "connection closed" not in err
    assert alive(RunDirectory(tmp_path / "run")) == []


def test_a_rank_that_leaves_no_message_shows_the_end_of_its_log(tmp_path, worker, capfd):
    (tmp_path / "run").mkdir()
    code = launch.train(settings(), "tiny", tmp_path / "run", worker("silent"))
    err = capfd.readouterr().err
    failures = read_failures(tmp_path / "run")
    assert code == 1 and [failure.rank for failure in failures] == [0]
    assert "rank 1 ended with exit code 9" in err and "last words" in err


def test_a_stolen_port_is_tried_again_once(tmp_path, worker, capfd):
    assert launch.train(settings(), "tiny", tmp_path / "run", worker("port")) == 0
    assert "Address already in use" not in capfd.readouterr().err


def test_ctrl_c_saves_and_names_the_command_that_resumes(start):
    process, directory = start("wait")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "saving, press Ctrl-C again to stop at once" in out
    assert "checkpoint is at step 40" in out and f"longspan resume {directory}" in out
    assert "Traceback" not in out and alive(directory) == []


def test_a_second_ctrl_c_stops_at_once(start):
    process, directory = start("hang")
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "saving" in process.stdout.readline())
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in out
    assert "no checkpoint was written" in out and alive(directory) == []


def test_a_stop_whose_saving_fails_is_an_error(start):
    process, directory = start("save-fails")
    process.terminate()
    out, _ = process.communicate(timeout=40)
    assert process.returncode == 2 and alive(directory) == []
    assert "the disk is full: step-40/weights could not be written" in out


def test_a_killed_launcher_leaves_no_worker(start):
    process, directory = start("hang")
    assert len(alive(directory)) == 2
    process.kill()
    wait_for(lambda: not alive(directory))


def test_ranks_that_outlive_their_launcher_keep_others_off(start, worker, monkeypatch):
    monkeypatch.setattr(run_lock, "_ENDING_S", 0.3)
    process, directory = start("outlive")
    process.kill()
    process.wait()
    try:
        with pytest.raises(RunError, match=f"in use by ranks of process {process.pid} on "):
            launch.train(settings(), "tiny", directory.path, worker("clean"))
    finally:
        for pid in alive(directory):
            os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(run_lock, "_ENDING_S", 30)
    assert launch.train(settings(), "tiny", directory.path, worker("clean")) == 0


def test_two_launches_do_not_share_a_directory(start, worker):
    process, directory = start("wait")
    with pytest.raises(RunError, match=f"in use by process {process.pid} on "):
        launch.train(settings(), "tiny", directory.path, worker("clean"))


def test_a_complete_run_is_left_alone(tmp_path, worker, capfd):
    directory = create_or_open(tmp_path / "run", settings(), "tiny")
    stage = {"name": "short", "length": 256, "steps": 8, "tokens": 8192, "loss": 2.5}
    directory.mark_complete({"tokens": 8192, "stages": [stage]})
    assert launch.train(settings(), "tiny", directory.path, worker("crash")) == 0
    assert launch.resume(directory.path, worker("crash")) == 0
    out = capfd.readouterr().out
    assert out.count("is complete; nothing to do") == 2 and "2.5000" in out
    assert not (directory.logs / "pid-0").exists()


def test_an_incomplete_run_goes_on_and_says_from_where(tmp_path, worker, capfd):
    directory = create_or_open(tmp_path / "run", settings(), "tiny")
    (directory.checkpoints / "step-00000020").mkdir()
    (directory.checkpoints / "step-00000020" / "COMMITTED").touch()
    assert launch.train(settings(), "tiny", directory.path, worker("clean")) == 0
    assert "going on from the checkpoint at step 20" in capfd.readouterr().out


def test_what_cannot_be_resumed_is_a_message(tmp_path, worker):
    with pytest.raises(RunError, match="does not exist"):
        launch.resume(tmp_path / "run", worker("clean"))
    with pytest.raises(RunError, match="holds no run"):
        launch.resume(tmp_path, worker("clean"))


def test_another_recipe_starts_no_rank(tmp_path, worker):
    create_or_open(tmp_path / "run", settings(), "tiny")
    with pytest.raises(RunError, match="seed: 1234 -> 5"):
        launch.train(settings(seed=5), "tiny", tmp_path / "run", worker("clean"))
    assert not (tmp_path / "run" / "logs" / "pid-0").exists()


def test_more_ranks_than_gpus_is_an_error(tmp_path, worker, monkeypatch):
    use_gpus(monkeypatch, 1)
    with pytest.raises(RunError, match="wants 2 ranks and this machine has 1 GPU"):
        launch.train(settings(), "tiny", tmp_path / "run", worker("clean"))
    assert not (tmp_path / "run").exists()
    use_gpus(monkeypatch, 4)
    assert launch.local_ranks(settings(ranks=None)) == 4


def test_a_failure_that_cannot_be_written_goes_to_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(LAUNCHER_PID, "1")
    assert record_failure(tmp_path / "nowhere", 3, OSError(28, "No space left on device")) == 2
    assert "rank 3: the disk is full" in capsys.readouterr().err


@pytest.fixture
def elastic(monkeypatch):
    """Pretend to be a rank of torchrun, with a worker module that only tells its rank."""
    worked = []
    module = types.SimpleNamespace(main=lambda path: worked.append(path) or 75)
    monkeypatch.setitem(sys.modules, "longspan.trainer.worker", module)
    monkeypatch.setattr(torchrun, "_WAIT_S", 0.3)

    def be(rank, world):
        for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("TORCHELASTIC_RUN_ID", "x")):
            monkeypatch.setenv(name, str(value))

    monkeypatch.chdir(Path.cwd())
    return be, worked


def test_under_torchrun_each_process_is_a_rank(tmp_path, elastic):
    be, worked = elastic
    be(1, 2)
    with pytest.raises(RunError, match="rank 0 did not create"):
        launch.train(settings(), "tiny", tmp_path / "run")
    be(0, 2)
    assert launch.train(settings(), "tiny", tmp_path / "run") == 75
    be(1, 2)
    assert launch.train(settings(), "tiny", tmp_path / "run") == 75
    assert worked == [tmp_path / "run"] * 2
    with pytest.raises(RunError, match="seed"):
        launch.train(settings(seed=5), "tiny", tmp_path / "run")


def test_torchrun_must_start_what_the_recipe_says(tmp_path, elastic):
    be, worked = elastic
    be(0, 3)
    with pytest.raises(RunError, match="torchrun started 3 ranks and the recipe says ranks: 2"):
        launch.train(settings(), "tiny", tmp_path / "run")
    stages = settings().model_dump(mode="json")["stages"]
    stages[0]["parallel"]["context"] = 2
    with pytest.raises(RunError, match="a multiple of 2"):
        launch.train(settings(ranks=None, stages=stages), "tiny", tmp_path / "run")
    assert worked == [] and not (tmp_path / "run").exists()


def test_the_recorded_failure_can_be_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCHER_PID, "1")
    (tmp_path / "logs").mkdir()
    assert record_failure(tmp_path, 1, ValueError("bad")) == 1
    (tmp_path / "logs" / "rank-2.failure.json").write_text(json.dumps({"rank": 2})[:5])
    (failure,) = read_failures(tmp_path)
    assert (failure.rank, failure.kind, failure.message) == (1, "internal", "ValueError: bad")
