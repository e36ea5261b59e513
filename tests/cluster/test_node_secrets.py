"""Secrets of a cluster: known to the driver and to ranks, shown by none, whatever their names."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from longspan.cluster import driver
from longspan.cluster.node_secrets import short_secrets, take_secrets
from longspan.errors import CheckpointError, RunError
from longspan.redact import known_credentials, redact, redact_text
from longspan.trainer import worker
from longspan.trainer.heartbeat import Heartbeat
from longspan.trainer.observe import wandb_account
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.stopping import StopRequest
from support.short_run import short_run
from support.tracked import without_set_up

LOGIN = "hunter2-hunter2"
KEY = "0123456789abcdef0123456789abcdef01234567"
PEM = "-----BEGIN KEY-----\nTUlJRXZRSUJBREFO\nQmdrcWhraUc5dzBC\n-----END KEY-----\n"
WRITTEN = {"id": "anybody", "inner": {"client_secret": "GOCSPX-5d0c"}, "pem": PEM}
KEY_FILE = json.dumps(WRITTEN, indent=2)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """No set-up of wandb, and what is put into the environment goes with the test."""
    without_set_up(tmp_path, monkeypatch)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def secret(tmp_path):
    """`secret(text)`: the path of a file with it."""

    def write(text):
        path = tmp_path / f"secret-{len(list(tmp_path.glob('secret-*')))}"
        path.write_text(text)
        return str(path)

    return write


def test_a_secret_under_any_name_is_hidden_here_and_in_children(secret):
    assert redact_text(f"I am {LOGIN}") == f"I am {LOGIN}"
    assert take_secrets({"MY_LOGIN": secret(f"{LOGIN}\n")})["MY_LOGIN"] == LOGIN
    assert redact_text(f"I am {LOGIN}") == "I am ***"
    assert redact({"name": [LOGIN]}) == {"name": ["***"]}
    show = "import sys; from longspan.redact import redact_text as r; print(r(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", show, LOGIN], capture_output=True, text=True)
    assert done.stdout == "***\n", done.stderr


def test_an_ordinary_word_among_the_secrets_stops_no_run(secret, tmp_path):
    """A region or a login is hidden where it is shown, and paths with it work."""
    take_secrets({"MY_REGION": secret("us-east-1"), "STORE_SECRET": secret(LOGIN)})
    for where in ("/data/us-east-1/texts", "s3://texts-us-east-1/a", f"{tmp_path}/us-east-1"):
        assert list(known_credentials({"where": where})) == []
        assert redact_text(where) == where.replace("us-east-1", "***")
    for where in ("us-east-1", "https://us-east-1@host/a", "https://host/a?who=us-east-1"):
        found = list(known_credentials({"where": where}))
        assert found == [("where", "the environment variable MY_REGION")]
    (found,) = known_credentials({"where": f"/data/of-{LOGIN}"})
    assert found == ("where", "the environment variable STORE_SECRET")
    os.environ["HF_TOKEN"] = "us-east-1"  # what a name says counts, whatever the list says
    assert list(known_credentials(["s3://texts-us-east-1/a"]))


def test_short_secrets_are_named_as_they_are_not_hidden(secret):
    paths = {"MY_PIN": secret("1234567"), "MY_LOGIN": secret("12345678"), "EMPTY": secret("")}
    take_secrets(paths)
    assert redact_text("1234567, 12345678") == "1234567, ***"
    said = "warning: MY_PIN of the cluster's secrets is not hidden: under 8 characters"
    assert short_secrets(paths) == said
    assert short_secrets({"MY_LOGIN": paths["MY_LOGIN"]}) == ""


def test_what_was_hidden_before_stays_so(secret, monkeypatch):
    monkeypatch.setenv("MY_LOGIN", LOGIN)
    monkeypatch.setenv("LONGSPAN_HIDDEN", "MY_LOGIN")
    take_secrets({})
    assert redact_text(LOGIN) == "***"
    take_secrets({"OTHER": secret("another-word")})
    assert redact_text(f"{LOGIN}, another-word") == "***, ***"


def test_a_secret_of_several_lines_is_hidden_line_by_line(secret):
    take_secrets({"STORE_ACCOUNT": secret(KEY_FILE), "OTHER": secret("line-one-1\r\nline-two-2")})
    lines = [*KEY_FILE.splitlines(), "line-one-1", "line-two-2"]
    shown = [
        "{",
        "  ***",
        "  ***",
        "    ***",
        "  },",
        r'  ***\n***\n***\n***\n"',
        "}",
        "***",
        "***",
    ]
    assert list(map(redact_text, lines)) == shown
    # As a library shows what it has read: without names, and lines that end.
    for part in ("GOCSPX-5d0c", "TUlJRXZRSUJBREFO", "QmdrcWhraUc5dzBC"):
        assert redact_text(f"refused: {part}") == "refused: ***"
    assert redact_text("anybody may read this") == "anybody may read this"


def test_a_secret_that_is_not_there_is_an_error_where_it_has_to_be(secret, tmp_path):
    paths = {"MY_LOGIN": secret(LOGIN), "WANDB_API_KEY": str(tmp_path / "nothing")}
    with pytest.raises(RunError, match=r"WANDB_API_KEY cannot be read from .*nothing.* No such"):
        take_secrets(paths)
    take_secrets(paths, all_here=False)
    assert os.environ["MY_LOGIN"] == LOGIN and "WANDB_API_KEY" not in os.environ
    with pytest.raises(RunError, match="it is no text"):
        take_secrets({"MY_LOGIN": secret("a\0b")})


@pytest.fixture
def lead(tmp_path, monkeypatch, capfd):
    """`lead(secrets)`: what a driver says of a run that tracks online, up to its folder."""
    recipe = tmp_path / "recipe.yaml"
    run = short_run(tracking={"wandb": "online"}).model_dump(mode="json")
    recipe.write_text(yaml.safe_dump(run))
    monkeypatch.setattr(driver, "connect", lambda: None)

    def fail(*_):
        raise CheckpointError(f"no folder for {os.environ.get('MY_LOGIN')}")

    monkeypatch.setattr(driver, "create_or_open", fail)

    def call(secrets):
        words = ["--run-id", "r", "--run-dir", str(tmp_path / "r"), "--name", "n"]
        words += ["--recipe", str(recipe)]
        words += ["--secrets", *(f"{name}={path}" for name, path in secrets.items())]
        assert driver.main(words) == 2
        return capfd.readouterr().err

    return call


def test_the_driver_has_the_key_that_is_a_secret_of_the_cluster(lead, secret, monkeypatch):
    answers = ["accepted", "rejected"]
    monkeypatch.setattr(wandb_account, "ask", lambda: answers.pop(0))
    secrets = {"WANDB_API_KEY": secret(KEY), "MY_LOGIN": secret(LOGIN)}
    assert "error: no folder for ***" in lead(secrets)
    said = lead(secrets)
    assert "rejects the key that the secret of the cluster WANDB_API_KEY holds" in said
    assert "`secrets` of the cluster in clusters.yaml" in said and not answers
    assert KEY not in said


@pytest.mark.parametrize("lacks", ["a key", "a key of its own", "wandb"])
def test_a_head_need_not_have_what_rank_0_has(lead, secret, tmp_path, monkeypatch, lacks):
    """Nodes may have a netrc file and packages that it lacks, and its own may be stale."""
    monkeypatch.setattr(wandb_account, "ask", lambda: "rejected")
    secrets = {"MY_LOGIN": secret(LOGIN)}
    if lacks == "a key of its own":
        (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    if lacks == "wandb":
        secrets |= {"WANDB_API_KEY": secret(KEY)}
        monkeypatch.setattr(wandb_account.importlib.util, "find_spec", lambda name: None)
    assert "error: no folder for ***" in lead(secrets)


def test_rank_0_insists_on_a_key(secret, tmp_path):
    run = short_run(tracking={"wandb": "online"})
    directory = create_or_open(tmp_path / "run", run, "short")
    take_secrets({"MY_LOGIN": secret(LOGIN)})
    with pytest.raises(RunError, match="no Weights & Biases key is configured") as caught:
        worker._run(directory.path, 0, StopRequest(), Heartbeat())
    assert "as WANDB_API_KEY in `secrets` of the cluster in clusters.yaml" in caught.value.fix
    assert "wandb login" not in caught.value.fix


def test_a_secret_that_only_the_other_nodes_have_stops_no_driver(lead, tmp_path):
    said = lead({"WANDB_API_KEY": str(tmp_path / "elsewhere")})
    assert "error: no folder" in said
    assert f"the secret WANDB_API_KEY is not in {tmp_path}/elsewhere on " in said
