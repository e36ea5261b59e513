"""What a rank's process is given, and what the driver's command line understands."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from longspan.cluster import driver
from longspan.cluster.driver import Options, _parse, main
from longspan.cluster.rank import _only_save_blocked
from longspan.cluster.stacks import dump
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
    options, recipe = _parse([*WORDS, "--secrets", "A=/x", "B=/y=z", "--from", "8",
                              "--exactness", "E1", "--interface", "eth0"])  # fmt: skip
    assert str(recipe) == "recipe.yaml"
    assert options.secrets == (("A", "/x"), ("B", "/y=z")) and options.from_step == 8
    assert (options.exactness, options.interface, options.preflight) == ("E1", "eth0", True)
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
    monkeypatch.setattr(driver, "_CONNECT_S", 0.1)
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


def test_stacks_that_cannot_be_had_say_why(tmp_path):
    dump({0: os.getpid(), 3: 2**22 + 1}, tmp_path, tmp_path, 2)
    mine = (tmp_path / "stack-attempt-2-rank-0.txt").read_text()
    assert "test_rank.py" in mine or mine.startswith("no stacks:")
    assert (tmp_path / "stack-attempt-2-rank-3.txt").read_text().startswith("no stacks:")
