"""What a rank's process is given, and what the driver's command line understands."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml
from longspan.cluster import connection, stacks
from longspan.cluster import rank as module
from longspan.cluster.driver import Options, _parse, main
from longspan.cluster.limits import Limits
from longspan.cluster.rank import Rank, RankEnded, Task, _only_save_blocked
from longspan.cluster.stacks import NO_RIGHTS, dump
from longspan.cluster.station import Station
from longspan.cluster.watch import Assignment
from longspan.trainer.recovery_settings import HangSettings
from support.short_run import short_run

WORDS = ["--run-id", "r", "--run-dir", "/s/r", "--name", "n", "--recipe", "recipe.yaml"]


@pytest.fixture(autouse=True)
def environment():
    """What a driver sets goes with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_the_command_line_is_what_a_submission_writes():
    more = ["--exactness", "E1", "--interface", "eth0", "--device", "gpu", "--from", "8"]
    more += ["--ranks", "4", "--slots", "8"]
    options, recipe = _parse([*WORDS, "--secrets", "A=/x", "B=/y=z", *more])
    assert str(recipe) == "recipe.yaml"
    assert options.secrets == (("A", "/x"), ("B", "/y=z")) and options.from_step == 8
    assert (options.exactness, options.interface, options.preflight) == ("E1", "eth0", True)
    assert (options.device, options.ranks, options.slots) == ("gpu", 4, 8)
    options, _ = _parse(WORDS)
    assert options == Options("r", options.run_dir, "n")


def test_a_recipe_that_is_none_gets_a_message(tmp_path, capfd):
    bad = tmp_path / "recipe.yaml"
    for content in (None, "model: {hidden: many}", "{"):
        if content is not None:
            bad.write_text(content)
        assert main([*WORDS[:-1], str(bad)]) == 2
        err = capfd.readouterr().err
        assert "holds no resolved recipe" in err and "fix:" in err and "Traceback" not in err


def test_a_cluster_that_is_not_there_gets_a_message(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(connection, "_CONNECT_S", 0.1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(short_run().model_dump(mode="json")))
    assert main([*WORDS[:-1], str(recipe)]) == 2
    err = capfd.readouterr().err
    assert "no Ray cluster answers at 127.0.0.1:1" in err and "fix:" in err


def test_what_asks_a_process_to_save_waits_until_it_listens():
    ask = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    with _only_save_blocked():
        done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert "SIGUSR1" in done.stdout and done.stdout.count("Signals") == 1
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def stack(folder, rank):
    return (folder / f"stack-attempt-2-rank-{rank}.txt").read_text()


def test_stacks_that_cannot_be_had_say_why(tmp_path):
    dump({0: os.getpid(), 3: 2**22 + 1}, tmp_path, tmp_path, 2, 15.0)
    assert "test_rank.py" in stack(tmp_path, 0) or NO_RIGHTS in stack(tmp_path, 0)
    gone = stack(tmp_path, 3)
    assert gone.startswith("no stacks: py-spy says:") and NO_RIGHTS not in gone


PY_SPY = {
    "shows": ('echo "$@"; echo key=hunter2', "dump --nonblocking --pid 7"),
    "may not": ("echo Error: Permission Denied >&2; exit 1", NO_RIGHTS),
    "fails": ("echo no such process >&2; exit 1", "no stacks: py-spy says: no such process\n"),
    "is silent": ("exit 3", "no stacks: py-spy says: exit code 3"),
    "hangs": ("exec sleep 60", "no stacks: "),
}


@pytest.mark.parametrize("how", PY_SPY)
def test_what_py_spy_says_is_what_is_written(how, tmp_path, monkeypatch):
    body, written = PY_SPY[how]
    tool = tmp_path / "py-spy"
    tool.write_text(f"#!/bin/sh\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(stacks.sys, "executable", str(tmp_path / "python"))
    dump({1: 7}, tmp_path, tmp_path, 2, 0.3 if how == "hangs" else 15.0)
    assert written in stack(tmp_path, 1)
    assert (NO_RIGHTS in stack(tmp_path, 1)) == (how == "may not")


def test_without_py_spy_the_file_says_so_and_nobody_writes_one_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(stacks.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    dump({1: 7}, tmp_path, tmp_path, 2, 15.0)
    assert "py-spy is not installed" in stack(tmp_path, 1)
    (tmp_path / "stack-attempt-2-rank-1.txt").write_text("by another rank of the node")
    dump({1: 7, 2: 8}, tmp_path, tmp_path, 2, 15.0)
    assert stack(tmp_path, 1) == "by another rank of the node"
    assert "not installed" in stack(tmp_path, 2)


def test_the_flight_recorder_of_each_rank_is_asked(tmp_path):
    """NCCL's listens to a pipe of its own; a rank without one is not waited for."""
    os.mkfifo(tmp_path / "nccl-4.pipe")
    reader = os.open(tmp_path / "nccl-4.pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        dump({4: 2**22 + 1, 5: 2**22 + 1}, tmp_path, tmp_path, 2, 15.0)
        assert os.read(reader, 10) == b"1\n"
    finally:
        os.close(reader)


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """A rank of a node, without the Ray worker around it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    context = SimpleNamespace(get_node_id=lambda: "node")
    watch = SimpleNamespace(ended=SimpleNamespace(remote=lambda *told: told))
    ray = SimpleNamespace(get_runtime_context=lambda: context, get=lambda told, timeout: None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    task = Task(str(tmp_path / "run"), 2, watch, 0.5, Limits(HangSettings()), 5.0)
    made = Rank(task, 0, 3)
    made._station = Station(tmp_path / "run", 2, "node")
    return made


def test_ranks_on_gpus_keep_what_their_collectives_did_last(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "gpu_count", lambda: 2)
    given = Assignment(0, 1, 1, "127.0.0.1", 4000, "go on", "")
    found = rank._environment(given)
    pipe = f"{rank._station.folder}/nccl-"
    logs = f"{tmp_path}/run/logs/nccl-attempt-2-rank-"
    assert found["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] == pipe  # torch adds the rank and `.pipe`
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == logs and int(found["TORCH_FR_BUFFER_SIZE"]) > 0
    monkeypatch.setattr(module, "gpu_count", lambda: 0)
    assert not [name for name in rank._environment(given) if name.startswith("TORCH_")]


def test_of_ranks_that_hang_only_those_that_live_are_dumped(rank, tmp_path, monkeypatch):
    for number, pid in ((0, os.getpid()), (1, 2**22 + 1)):
        rank._station.started(number, pid)
    rank._report = "asked"
    monkeypatch.setattr(rank._ray, "wait", lambda *_, **__: ([1], []), raising=False)
    monkeypatch.setattr(rank._ray, "get", lambda *_, **__: "dump")
    assert rank._heard() == "dump" and rank._dumped
    found = [path.name for path in (tmp_path / "run" / "logs").glob("stack-*")]
    assert found == ["stack-attempt-2-rank-0.txt"]


@pytest.mark.parametrize(("code", "shown"), [(-9, True), (1, True), (2, False), (75, False)])
def test_a_rank_that_fails_shows_the_others_of_its_node(rank, tmp_path, monkeypatch, code, shown):
    alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    for number, pid in ((0, os.getpid()), (1, alive.pid), (2, 2**22 + 1)):
        rank._station.started(number, pid)
    rank._first, rank._log = True, SimpleNamespace()
    monkeypatch.setattr(rank, "_work", lambda: code)
    try:
        with pytest.raises(RankEnded) if code != 75 else nullcontext():
            rank.run()
    finally:
        alive.communicate(b"")
    found = [path.name for path in (tmp_path / "run" / "logs").glob("stack-*")]
    assert found == ["stack-attempt-2-rank-1.txt"] * shown
    assert not rank._station.folder.exists()
