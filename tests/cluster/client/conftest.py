"""The command line beside a dashboard, a file of clusters and records of its own."""

import os
import sys
from pathlib import Path

import pytest
import yaml
from longspan import cli
from longspan.recipes.loading import load_recipe
from support.dashboard import Dashboard
from support.recorded import leave_run

TOKEN = "right-token-0123456789"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One for all tests: the wheel is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path, cache):
    """A user's home without tokens, clusters and runs; returns its folder."""
    home = tmp_path / "user"
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("RAY_", "XDG_", "WANDB_", "NETRC")) or name.endswith(
            ("_KEY", "_TOKEN")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LONGSPAN_HOME", str(tmp_path / "records"))
    monkeypatch.setenv("LONGSPAN_CLUSTERS", str(tmp_path / "clusters.yaml"))
    monkeypatch.setenv("LONGSPAN_CACHE", str(cache))
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def dashboard():
    """One that answers as Ray's does."""
    served = Dashboard(token=TOKEN)
    served.start()
    yield served
    served.stop()


@pytest.fixture
def storage(tmp_path) -> Path:
    """What the nodes share, visible from here."""
    path = tmp_path / "shared"
    path.mkdir()
    return path


@pytest.fixture
def clusters(tmp_path):
    """Writes the file of clusters."""

    def write(**named) -> Path:
        file = tmp_path / "clusters.yaml"
        file.write_text(yaml.safe_dump({"clusters": named}, sort_keys=False))
        return file

    return write


@pytest.fixture
def lab(clusters, dashboard, storage, tmp_path):
    """A cluster named lab; called with settings it is written anew."""
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")

    def write(**settings) -> None:
        given = {"address": dashboard.address, "storage": str(storage), "token": str(token)}
        given = {key: value for key, value in (given | settings).items() if value is not None}
        clusters(lab=given)

    write()
    return write


@pytest.fixture
def longspan(monkeypatch, capfd):
    """`longspan(*arguments)`: exit code, stdout and stderr of the command line in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return caught.value.code or 0, out, err

    return run


@pytest.fixture
def mine(longspan, lab):
    """A run that was submitted."""
    assert longspan("submit", "smoke", "--run-id", "mine")[0] == 0
    return "mine"


@pytest.fixture
def folder(storage, mine):
    """Leaves the run's folder as an attempt would; visible from here."""

    def leave(steps: int = 3, end: tuple[int, str] | None = (75, "stopped")):
        run = load_recipe("smoke").run()
        return leave_run(storage / "runs" / "mine", steps, end, run, "smoke")

    return leave
