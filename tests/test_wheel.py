"""The wheel holds every folder of the package, recipes, CUDA sources, the licence, no more."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import longspan
import pytest

ROOT = Path(longspan.__file__).parent
FLOORS = ("cluster", "recipes", "trainer", "attention", "parallel", "kernels")
NOT_SOURCES = (".*", "build", "dist", "runs", "wandb", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The files of a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: a build leaves files in its source folder.
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *options, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_every_source_is_in_the_wheel(wheel):
    folders = [file for floor in FLOORS for file in (ROOT / floor).rglob("*.py")]
    sources = [*ROOT.glob("*.py"), *folders]
    expected = {f"longspan/{file.relative_to(ROOT).as_posix()}" for file in sources}
    assert {name for name in wheel if name.endswith(".py")} == expected
    assert len({name.rpartition("/")[0] for name in expected}) >= 9


def test_recipes_cuda_sources_licence_and_command_are_in_the_wheel(wheel):
    recipes = {f"longspan/recipes/library/{file.name}" for file in ROOT.glob("recipes/library/*")}
    assert "longspan/recipes/library/quickstart.yaml" in recipes
    assert recipes <= wheel
    cuda = {f"longspan/kernels/cuda/{file.name}" for file in ROOT.glob("kernels/cuda/*.cu")}
    assert len(cuda) == 3
    assert cuda <= wheel
    info = f"longspan-{longspan.__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= wheel


def test_nothing_else_is_in_the_wheel(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"longspan", f"longspan-{longspan.__version__}.dist-info"}
    assert not [name for name in wheel if "/tests/" in name or "/benchmarks/" in name]
