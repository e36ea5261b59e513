"""The command line: what it prints, its exit codes, and what it does not import."""

import json
import os
import subprocess
import sys

import pytest
from longspan import __version__, cli
from longspan.errors import RunError
from longspan.recipes.loading import shipped_recipes
from longspan.trainer import launch
from longspan.trainer.settings import RunSettings
from typer.testing import CliRunner

WORDS = "train resume status check recipes mechanisms schema doctor submit runs logs stop"
VERBS = tuple(WORDS.split())


def run(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `longspan ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    return caught.value.code or 0, out, err


@pytest.fixture
def longspan(monkeypatch, capfd):
    return lambda *arguments: run(monkeypatch, capfd, *arguments)


@pytest.fixture
def started(monkeypatch):
    """The calls that would have started a run."""
    calls = []
    monkeypatch.setattr(launch, "train", lambda *given: calls.append(given) or 75)
    monkeypatch.setattr(launch, "resume", lambda path, **how: calls.append((path, how)) or 0)
    return calls


def test_version_and_help(longspan):
    assert longspan("--version") == (0, f"longspan {__version__}\n", "")
    code, out, _ = longspan("--help")
    assert code == 0 and "longspan train quickstart" in out
    for verb in VERBS:
        assert f"  {verb} " in out


def test_what_is_unknown_is_named(longspan):
    code, _, err = longspan("trian", "quickstart")
    assert code == 2 and "trian" in err
    code, _, err = longspan("check", "quickstart", "--sett", "a=b")
    assert code == 2 and "--sett" in err


def test_check_prints_the_plan(longspan):
    code, out, err = longspan("check", "smoke", "--set", "stages.0.length=64")
    assert (code, err) == (0, "")
    assert "stretch" in out and "64 " in out


def test_mistakes_are_messages_with_exit_code_2(longspan):
    code, out, err = longspan("check", "smoke", "--set", "model.hidden=65", "--set", "ranks=3")
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe smoke has ")
    assert "model.hidden: got 65" in err and "stages.1.parallel: got" in err


def test_train_starts_what_was_checked(longspan, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert longspan("train", "smoke", "--set", "seed=9")[:2] == (75, "")
    assert longspan("train", "smoke", "--run-dir", "here")[0] == 75
    (settings, name, directory), (_, _, other) = started
    assert type(settings) is RunSettings and settings.seed == 9
    assert (name, str(directory), str(other)) == ("smoke", "runs/smoke", "here")


def test_train_does_not_start_what_cannot_run(longspan, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = longspan("train", "smoke", "--set", "stages.0.batch_tokens=1000")
    assert code == 2 and "stages.0.batch_tokens" in err
    assert not started and not list(tmp_path.iterdir())


def test_only_rank_0_warns(longspan, started, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert longspan("train", "smoke", "--set", "precision=bf16") == (75, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "warning: precision bf16" in longspan("train", "smoke", "--set", "precision=bf16")[2]


def test_resume(longspan, started, tmp_path):
    assert longspan("resume", str(tmp_path))[0] == 0
    assert longspan("resume", str(tmp_path), "--exactness", "E1")[0] == 0
    assert [how["exactness"] for _, how in started] == [None, "E1"]
    assert {path for path, _ in started} == {tmp_path}
    code, _, err = longspan("resume", str(tmp_path), "--exactness", "e1")
    assert code == 2 and "--exactness is e1" in err and "E1 (same data and schedule)" in err
    assert len(started) == 2


def test_errors_of_a_run_and_ctrl_c(longspan, monkeypatch):
    def fail(*_, **__):
        raise RunError("it broke", "mend it")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "resume", fail)
    assert longspan("resume", "./x") == (2, "", "error: it broke\n  fix: mend it\n")
    monkeypatch.setattr(launch, "resume", interrupt)
    assert longspan("resume", "./x")[0] == 130


def test_recipes_one_line_each(longspan):
    code, out, _ = longspan("recipes")
    lines = out.splitlines()
    names = [line.split()[0] for line in lines]
    assert code == 0 and names == [*shipped_recipes()]
    assert {"quickstart", "smoke", "attention-nsa"} <= set(names)
    assert all(len(line.split()) > 4 for line in lines)


def test_mechanisms_says_what_each_can_do(longspan):
    code, out, err = longspan("mechanisms")
    assert (code, err) == (0, "")
    heading, *lines = [line for line in out.splitlines() if line.strip()]
    assert heading.split()[-7:] == ["packing", "GQA", "TP", "PP", "CP", "generation", "arXiv"]
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert list(rows) == ["dense", "window", "nsa", "infllm_v2", "ssa", "moba", "sharded_heads",
                          "seer", "indexer"]  # fmt: skip
    assert {kind for kind, row in rows.items() if row.split().count("yes") < 6} == {"seer"}
    assert " form token " in rows["seer"]
    assert max(map(len, out.splitlines())) <= 160


def test_schema_is_json(longspan):
    _, out, _ = longspan("schema")
    assert json.loads(out)["title"] == "longspan recipe"


def test_doctor_says_what_is_there_and_what_is_missing(longspan):
    code, out, err = longspan("doctor")
    assert (code, err) == (0, "")
    for word in ("python", "torch", "megatron-core", "backend", "flash-attn", "ray", "wandb"):
        assert word in out, out
    assert "broken" not in out


def test_doctor_survives_a_broken_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open')")
    done = cold("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "broken" in done.stdout and "libcudart.so.12" in done.stdout
    assert "megatron-core" in done.stdout


def cold(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, with PYTHONPATH in front of what this one has."""
    paths = [environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "longspan.cli", *arguments],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "verb", ["check quickstart", "recipes", "mechanisms", "schema", "--help", "check nope"]
)
def test_quick_verbs_import_nothing_heavy(verb):
    program = (
        "import sys\nfrom longspan import cli\nsys.argv = sys.argv[1:]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'megatron', 'pyarrow', 'numpy', 'wandb', 'transformers', 'tokenizers'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "longspan", *verb.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_verb_and_option_is_explained():
    for verb in ("", *VERBS):
        result = CliRunner().invoke(cli.app, [*verb.split(), "--help"])
        assert result.exit_code == 0
        assert "..." not in result.output.replace("[ARGS]...", "")
