"""The documents are true: links, recipes, commands and the names of tests."""

import ast
import re
import shlex
from pathlib import Path

import longspan
import pytest
import typer
import yaml
from longspan import cli
from longspan.recipes.check import CheckedRecipe, check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine

ROOT = Path(longspan.__file__).parent
README, CONTRIBUTING, CHANGELOG = (
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
)
DESIGN, CLUSTER = (ROOT / "docs" / name for name in ("design.md", "cluster.md"))
RUN = ROOT / ".ci/run"
DOCUMENTS = [README, CONTRIBUTING, CHANGELOG, DESIGN, CLUSTER]
# What exists only where a document was written, and where packages come from.
PRIVATE = re.compile(
    r"/(work|root|home|Users|opt|mnt|srv|tmp)/|index-url|find-links|pypi|whl/", re.IGNORECASE
)


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def broken_links(file: Path, text: str) -> list[str]:
    """Relative links to nothing, and links whose text names a test that their file lacks."""
    broken = []
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        path = file.parent / target.partition("#")[0]
        if "://" in target or target.startswith("#"):
            continue
        name = re.fullmatch(r"`(test_\w+)`", label)
        if not path.exists() or (name is not None and name[1] not in functions(path)):
            broken.append(f"[{label}]({target})")
    return broken


def functions(path: Path) -> set[str]:
    """The functions of a Python file."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def verbs(text: str) -> set[str]:
    """What follows `longspan` in code, fenced or not."""
    fenced = re.findall(r"^```\w*\n.*?^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`[^`\n]+`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    code = "\n".join([*fenced, *inline])
    return set(re.findall(r"(?:^|[\s/`])longspan +([a-z]+)", code, re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The arguments of each `longspan train` and `longspan check` in fenced blocks."""
    lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
    found = [re.search(r"longspan (?:train|check) (.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


def check(reference: str, overrides: list[str]) -> CheckedRecipe:
    return check_recipe(load_recipe(reference, overrides), Machine(gpus=0, cores=2))


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """A folder with the README's recipes under the names that it gives, and their data."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(README.read_text("utf-8"), "yaml"):
        (tmp_path / re.match(r"# (\S+\.yaml)", block)[1]).write_text(block)
        for source in yaml.safe_load(block)["defaults"]["data"]["sources"]:
            for name in source["paths"]:
                (tmp_path / name).mkdir()
                (tmp_path / name / "one.txt").write_text("text")
    return tmp_path


def test_readme_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150
    assert len(CONTRIBUTING.read_text("utf-8").splitlines()) < 100


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_resolve(file):
    assert broken_links(file, file.read_text("utf-8")) == []


def test_a_broken_link_is_found():
    good = "[x](cli.py) [`test_links_resolve`](tests/test_docs.py) [web](https://example.org)"
    assert broken_links(README, good) == []
    for bad in ("[x](no.py)", "[`test_no_such`](tests/test_docs.py)"):
        assert broken_links(README, f"{good} {bad}") == [bad]


def test_recipes_of_the_readme_can_run(written):
    files = sorted(written.glob("*.yaml"))
    assert files
    for file in files:
        assert len(check(file.name, []).recipe.stages) > 1


def test_commands_of_the_readme_can_run(written):
    found = commands(README.read_text("utf-8"))
    changed = [arguments for arguments in found if "--set" in arguments]
    assert len(found) > len(changed) >= 4
    for recipe, *options in found:
        pairs = list(zip(options[::2], options[1::2], strict=True))
        assert {name for name, _ in pairs} <= {"--set", "--run-dir"}
        check(recipe, [value for name, value in pairs if name == "--set"])


@pytest.mark.parametrize("file", [README, CONTRIBUTING, CHANGELOG, RUN], ids=lambda file: file.name)
def test_every_verb_exists(file):
    text = file.read_text("utf-8")
    found = verbs(f"```bash\n{text}\n```" if file == RUN else text)
    known = typer.main.get_command(cli.app).commands
    assert found and found <= set(known)
    if file == README:
        assert found == set(known), "a verb that the README does not mention"


def test_verbs_are_found_in_code_only():
    text = "longspan prose `longspan a x`, `.venv/bin/longspan b`\n```bash\n$ longspan c\n```\n"
    assert verbs(text) == {"a", "b", "c"}


def test_the_pinned_torch_is_one_and_the_same():
    set_up = 'python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 -e ".[dev]"'
    commands_alone = blocks(README.read_text("utf-8"), "bash")
    assert f"{set_up} && .venv/bin/longspan train quickstart\n" in commands_alone
    assert f"{set_up} && .venv/bin/pytest\n" in commands_alone
    for file in (README, CONTRIBUTING, RUN):
        text = file.read_text("utf-8")
        assert set_up in text
        assert set(re.findall(r"torch==([0-9.]*[0-9])", text)) == {"2.13.0"}


@pytest.mark.parametrize("file", [*DOCUMENTS, RUN], ids=lambda file: file.name)
def test_nothing_private_is_named(file):
    lines = file.read_text("utf-8").splitlines()
    assert [line for line in lines if PRIVATE.search(line)] == []
    assert PRIVATE.search("see /home/me/data") and not PRIVATE.search("runs/home, ~/.cache")
