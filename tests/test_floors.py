"""Imports go down the floors only, and what answers quickly stays free of torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import longspan
import pytest

ROOT = Path(longspan.__file__).parent
FLOORS = (
    "cli",
    "cli_checkpoint",
    "cli_cluster",
    "cli_render",
    "cluster",
    "recipes",
    "trainer",
    "attention",
    "parallel",
    "kernels",
)
"""From the top. Everything else (errors, settings, the version) lies below all of them."""


def package_files(root: Path) -> list[Path]:
    """The sources of the package: the modules of the root, and the folders of the floors."""
    folders = [file for floor in FLOORS for file in (root / floor).rglob("*.py")]
    return sorted([*root.glob("*.py"), *folders])


def imported(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and module of each import; those of the package relative to its root."""
    package = file.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = node.level - 1
            above = ("longspan", *package[: len(package) - up]) if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def floor_of(parts: tuple[str, ...]) -> int:
    """Height of a module: 0 below all floors."""
    name = parts[0].removesuffix(".py") if parts else ""
    return len(FLOORS) - FLOORS.index(name) if name in FLOORS else 0


def violations(root: Path) -> list[str]:
    """Imports that go up, and absolute imports of the package by itself."""
    found = []
    for file in package_files(root):
        here = file.relative_to(root)
        for line, module in imported(file, root):
            first, *rest = module.split(".")
            if first == "longspan" and floor_of(tuple(rest)) > floor_of(here.parts):
                found.append(f"{here}:{line} imports {module}")
        if "longspan" in {top for _, top in absolute(file)}:
            found.append(f"{here} imports itself by its full name")
    return found


def absolute(file: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each absolute import."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, str(node.module).split(".")[0]


def test_imports_go_down():
    assert len(package_files(ROOT)) > 30
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/attend.py", "from ..trainer.loop import Run"),
        ("kernels/attend.py", "from .. import parallel"),
        ("trainer/engine/model.py", "from ... import cli"),
        ("trainer/plan.py", "def late():\n    from ..recipes.recipe import Recipe"),
        ("settings.py", "from .kernels import attend"),
        ("settings.py", "from . import attention"),
        ("parallel/layout.py", "if TYPE_CHECKING:\n    import longspan.attention.dense"),
        ("cli.py", "from longspan.errors import LongspanError"),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, line):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from .settings import Settings\n")
    assert violations(tmp_path) == []
    path.write_text(line + "\n")
    assert any(found.startswith(file) for found in violations(tmp_path))


def test_settings_and_checks_are_free_of_torch():
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in package_files(ROOT)]
    light = [name for name in names if name.split(".")[-1] == "settings" or "recipes" in name]
    light += [
        "attention.catalogue",
        "attention.cost",
        "attention.frequencies",
        "attention.layer_settings",
        "attention.pairs",
        "attention.parameters",
        "attention.rope_config",
        "cli",
        "cluster.doctor",
        "cluster.preflight.preflight",
        "cluster.render.k8s",
        "cluster.render.slurm",
        "trainer.checkpoint.object_store",
        "trainer.checkpoint.verbs",
        "trainer.plan",
        "trainer.status",
        "trainer.devices",
        "trainer.flops",
        "trainer.gang_sizes",
        "trainer.parameters",
    ]
    imports = "".join(f"import longspan.{name.removesuffix('.__init__')}\n" for name in light)
    heavy = "{'torch', 'megatron', 'numpy', 'pyarrow', 'tokenizers'}"
    program = f"import sys\n{imports}print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
