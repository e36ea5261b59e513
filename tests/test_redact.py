"""No credential reaches a file, a screen or another service, however it got into the values."""

import json
import time

import pytest
import yaml
from longspan import cli
from longspan.errors import Problem, RecipeError, RunError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.redact import (
    credentials,
    is_secret_name,
    known_credentials,
    redact,
    redact_text,
)
from longspan.trainer import launch
from longspan.trainer.devices import Machine
from longspan.trainer.failure import read_failures, record_failure
from longspan.trainer.observe.events import EventLog, read_events
from longspan.trainer.observe.observer import Observer
from longspan.trainer.observe.sink import Sink
from longspan.trainer.observe.terminal import Terminal
from longspan.trainer.observe.tracking_process import _one_line
from longspan.trainer.run_directory import RunDirectory, create_or_open, describe_environment
from typer.testing import CliRunner

SECRET = "hunter2-hunter2"


NAMES = """api_key hfToken HF_TOKEN WANDB_API_KEY AWS_SECRET_ACCESS_KEY aws.secret accessKeyId
password DB_PASSWORD X-Amz-Signature X-Amz-Security-Token accesskey authtoken MYKEY2 client_secret
key token secrets credentials"""
OTHERS = "tokens batch_tokens tokenizer keep_keys tokens_per_s monkey turkey keys steps"


@pytest.mark.parametrize("name", NAMES.split())
def test_names_that_say_so(name):
    assert is_secret_name(name)
    assert redact({name: SECRET, "other": SECRET}) == {name: "***", "other": SECRET}
    assert redact([{name: ["a", {"b": SECRET}]}]) == [{name: ["***", {"b": SECRET}]}]


@pytest.mark.parametrize("name", OTHERS.split())
def test_names_that_only_look_like_it(name):
    assert not is_secret_name(name)
    assert redact({name: SECRET}) == {name: SECRET}


def test_numbers_are_hidden_only_where_they_can_be_a_credential():
    given = {"password": 1234, "token": 5, "key": 0.5, "secret": True, "tokens": 3, "api_key": None}
    assert redact(given) == {**given, "password": "***"}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"https://me:{SECRET}@host:9000/a?b=1", "https://***@host:9000/a?b=1"),
        (f"s3+https://{SECRET}@host", "s3+https://***@host"),
        (f"no file https:/me:{SECRET}@host/x", "no file https:/***@host/x"),
        (f"https://h/a?X-Amz-Date=1&X-Amz-Signature={SECRET}&x=2",
         "https://h/a?X-Amz-Date=1&X-Amz-Signature=***&x=2"),
        (f"cannot read 'https://h/a?token={SECRET}'", "cannot read 'https://h/a?token=***'"),
        (f"https://blob/x?sv=1&sig={SECRET}", "https://blob/x?sv=1&sig=***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"S3FileSystem(key='{SECRET}', secret=\"{SECRET}\")",
         "S3FileSystem(key='***', secret=\"***\")"),
        (f"{{'api_key': '{SECRET}', 'a': 'b'}}", "{'api_key': '***', 'a': 'b'}"),
        (f"HF_TOKEN={SECRET} python", "HF_TOKEN=*** python"),
        (f"token={SECRET}", "token=***"),
        (f"password: {SECRET}", "password: ***"),
        (f"error: tokens: PASSWORD={SECRET}", "error: tokens: PASSWORD=***"),
        (f"api_key = {SECRET}==", "api_key = ***"),
        (f"token=secret={SECRET}", "token=***"),
    ],
)  # fmt: skip
def test_text_loses_its_credentials_and_nothing_else(text, clean):
    assert redact_text(text) == clean
    assert redact({"text": text}) == {"text": clean}
    assert redact_text(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'loss'",
        "TokenError: EOF in multi-line statement",
        "newest = max(complete, key=_step)",
        "tokens=3072 tokens/s=500 batch_tokens: 4096",
        "https://host/path@v1?step=3&tokens=5",
        "stages.0.parallel.keep_keys: got true; expected false",
        "me@example.org wrote to git@host:repository",
        "unknown key: stages.0.lenght",
        "C:/me@home and file:/somebody@here",
        "if token == other or key != last: return",
    ],
)
def test_text_without_any_stays(text):
    assert redact_text(text) == text


def test_values_of_the_environment_are_hidden_wherever_they_stand(monkeypatch, tmp_path):
    monkeypatch.setenv("STORE_SECRET", SECRET)
    monkeypatch.setenv("STORE_TOKEN_FILE", str(tmp_path))
    monkeypatch.setenv("SOME_KEY", "true")
    text = f"refused {SECRET}x: see {tmp_path}, which is true"
    assert redact_text(text) == f"refused ***x: see {tmp_path}, which is true"
    assert redact({"a": [f"-{SECRET}-"]}) == {"a": ["-***-"]}
    monkeypatch.delenv("STORE_SECRET")
    assert redact_text(SECRET) == SECRET


def test_credentials_in_the_files_of_the_home_directory_are_hidden(monkeypatch, tmp_path):
    names = ["netrc", "wandb", "aws", "hugging", "ray", "file"]
    keys = {name: f"{name}-hunter2-hunter2" for name in names}
    for folder in (".config/wandb", ".aws", ".cache/huggingface", ".ray"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".netrc").write_text(f"machine host login me password {keys['netrc']}\n")
    (tmp_path / ".config/wandb/settings").write_text(f"[default]\napi_key = {keys['wandb']}\n")
    aws = f"[work]\naws_access_key_id = x\naws_secret_access_key = {keys['aws']}\n"
    (tmp_path / ".aws/credentials").write_text(aws)
    (tmp_path / ".cache/huggingface/token").write_text(keys["hugging"])
    (tmp_path / ".ray/auth_token").write_text(keys["ray"] + "\n")
    (tmp_path / "key").write_text(keys["file"] + "\n")
    monkeypatch.setenv("STORE_SECRET_PATH", str(tmp_path / "key"))
    for name in ("NETRC", "WANDB_CONFIG_DIR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    text = f"refused: {' '.join(keys.values())}"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert redact_text(text) == "refused: *** *** *** *** *** ***"
    (tmp_path / "elsewhere").write_text("[default]\naws_secret_access_key = of-elsewhere-12\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "elsewhere"))
    assert redact_text("[default] of-elsewhere-12") == "[default] ***"
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE")
    monkeypatch.setenv("NETRC", "~/other")
    (tmp_path / ".netrc").rename(tmp_path / "other")
    assert redact_text(keys["netrc"]) == "***"
    found = dict(known_credentials({"a": [keys["aws"], {"b": f"x{keys['file']}"}], "c": "clean"}))
    assert found == {"a.0": f"{tmp_path}/.aws/credentials", "a.1.b": str(tmp_path / "key")}


def test_files_of_the_home_directory_that_cannot_be_read_are_none(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine\n")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_bytes(b"\xff\xfe no\n = section")
    (tmp_path / ".cache/huggingface/token").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert redact_text("machine no section") == "machine no section"


def test_a_recipe_with_a_credential_of_this_machine_makes_no_run(monkeypatch, tmp_path):
    monkeypatch.setenv("STORE_SECRET", SECRET)
    recipe = load_recipe("smoke", [f"tracking.project=of-{SECRET}"])
    with pytest.raises(RunError) as caught:
        create_or_open(tmp_path / "run", recipe.run(), "smoke")
    assert SECRET not in str(caught.value) and not (tmp_path / "run").exists()
    assert "tracking.project holds a credential" in str(caught.value)
    assert "the environment variable STORE_SECRET" in str(caught.value)


def test_the_time_grows_with_the_text_only():
    begun = time.process_time()
    for part in ("a.b-c_d", "https://", "key=", "token='", "a" * 7, "'k': '", "?a=b", "x://a@"):
        redact_text(part * 20_000)
    assert time.process_time() - begun < 5


def refused(*overrides):
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe("smoke", overrides), Machine(gpus=0, cores=4))
    assert SECRET not in str(caught.value)
    return {problem.path: problem for problem in caught.value.problems}


def test_check_refuses_a_recipe_with_a_credential_and_says_where_it_belongs():
    url = f"https://me:{SECRET}@host/model"
    (found,) = refused(f"tracking.project=x?token={SECRET}").values()
    assert found.path == "tracking.project" and found.value == "x?token=***"
    assert "environment" in found.fix
    found = refused(f"tokenizer={{kind: hf, path: '{url}'}}")["tokenizer.path"]
    assert found.value == "https://***@host/model (no tokenizer at https:/***@host/model)"
    assert list(credentials(load_recipe("smoke").model_dump(mode="json"))) == []


def test_a_credential_under_a_setting_that_does_not_exist_is_not_repeated():
    problems = refused(f"checkpoint.api_key={SECRET}")
    assert problems and all(SECRET not in str(problem) for problem in problems.values())
    error = RecipeError("mine", [Problem("store.password", SECRET, "no such setting")])
    assert SECRET not in str(error) and "store.password: got ***" in str(error)


def test_the_command_line_prints_none(monkeypatch, capsys):
    def fail(*_, **__):
        raise RunError(f"cannot reach https://me:{SECRET}@host", f"set TOKEN={SECRET}")

    monkeypatch.setattr("sys.argv", ["longspan", "resume", "./run"])
    monkeypatch.setattr(launch, "resume", fail)
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert SECRET not in out + err and "https://***@host" in err


def test_events_hold_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    log = EventLog(tmp_path / "events.jsonl")
    log.write("message", text=f"read https://me:x@host and {SECRET}", path=tmp_path / SECRET)
    log.write("stage_started", data={"storage": {"key": "AKIA", "tokens": 5}}, tokens=5)
    assert SECRET not in log.path.read_text()
    message, stage = read_events(log.path)
    assert message["text"] == "read https://***@host and ***"
    assert stage["data"] == {"storage": {"key": "***", "tokens": 5}} and stage["tokens"] == 5


def test_the_terminal_and_warnings_of_listeners_show_none(capsys):
    class Broken(Sink):
        def message(self, text):
            raise ValueError(f"no route to https://me:{SECRET}@host")

    observer = Observer([Broken(), Terminal()])
    observer.message(f"hello https://me:{SECRET}@host")
    observer.warning(f"PASSWORD={SECRET}")
    out, err = capsys.readouterr()
    assert SECRET not in out + err
    assert "hello https://***@host" in out and "is off: ValueError" in err


def test_failures_hold_none_in_message_and_traceback(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    password = SECRET
    try:
        raise ConnectionError(f"https://me:{password}@host refused") from KeyError("loss")
    except ConnectionError as error:
        record_failure(tmp_path, 0, error)
        record_failure(tmp_path / "nowhere", 1, error)
    (failure,) = read_failures(tmp_path)
    text = "ConnectionError: https://***@host refused"
    assert failure.message == text and text in failure.traceback
    assert "KeyError: 'loss'" in failure.traceback
    assert all(SECRET not in file.read_text() for file in (tmp_path / "logs").iterdir())
    assert SECRET not in "".join(capsys.readouterr())


def test_what_weights_and_biases_says_is_cleaned():
    shown = _one_line(ValueError(f"401 for https://me:{SECRET}@host\nat once"))
    assert shown == "ValueError: 401 for https://***@host at once"


def test_the_run_directory_holds_none(tmp_path, monkeypatch):
    recipe = load_recipe("smoke", [f"tracking.project=x?token={SECRET}"])
    where = {"working_directory": f"/mnt/https://me:{SECRET}@host"}
    described = {**describe_environment("smoke"), **where}
    monkeypatch.setattr(
        "longspan.trainer.run_directory.describe_environment", lambda name: described
    )
    directory = create_or_open(tmp_path / "run", load_recipe("smoke").run(), "smoke")
    directory.mark_complete({"checkpoint": f"s3://me:{SECRET}@host/step-1"})
    for file in directory.path.rglob("*"):
        assert not file.is_file() or SECRET not in file.read_text()
    assert json.loads(directory.complete.read_text())["checkpoint"] == "s3://***@host/step-1"
    assert yaml.safe_load(directory.recipe.read_text())["model"]
    with pytest.raises(RunError, match=r"tracking.project: .* -> .x\?token=.*") as caught:
        create_or_open(RunDirectory(tmp_path / "run").path, recipe.run(), "smoke")
    assert SECRET not in str(caught.value)


def test_check_on_the_command_line_prints_none():
    done = CliRunner().invoke(
        cli.app, ["check", "smoke", "--set", f"tracking.project=?key={SECRET}"]
    )
    assert done.exit_code and SECRET not in done.output + str(done.exception)
