"""The wheel that goes to a cluster: the package, nothing of the user's, equal for equal sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import longspan
import pytest
from longspan.cluster.wheel import build_wheel
from longspan.errors import ClusterError

ROOT = Path(longspan.__file__).parent
LEFT_OUT = (".*", "tests", "benchmarks", "docs", "runs", "build", "dist", "wandb", "__pycache__")


@pytest.fixture
def checkout(tmp_path):
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    return Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))


def test_it_holds_the_package_and_nothing_else(checkout, tmp_path, monkeypatch):
    for stray in ("notes.txt", "trainer/data.bin", "runs/r/recipe.yaml", "tests/test_x.py",
                  "trainer/__pycache__/x.pyc", ".env"):  # fmt: skip
        (checkout / stray).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stray).write_text("mine")
    monkeypatch.chdir(checkout)
    names = set(zipfile.ZipFile(build_wheel(checkout, tmp_path / "cache").path).namelist())
    code = {name for name in names if name.startswith("longspan/")}
    floors = ("attention", "cluster", "kernels", "parallel", "recipes", "trainer")
    sources = [file for floor in floors for file in (ROOT / floor).rglob("*.py")]
    data = [*ROOT.glob("recipes/library/*.yaml"), *ROOT.glob("kernels/cuda/*.cu")]
    files = [*ROOT.glob("*.py"), *sources, *data]
    assert code == {f"longspan/{file.relative_to(ROOT).as_posix()}" for file in files}
    info = f"longspan-{longspan.__version__}.dist-info"
    rest = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    assert names - code == rest


def test_it_is_equal_for_equal_sources_and_made_once(checkout, tmp_path):
    cache = tmp_path / "cache"
    first = build_wheel(checkout, cache)
    made = first.path.stat().st_mtime_ns
    os.utime(checkout / "cli.py", (1, 1))
    (checkout / "notes.txt").write_text("mine")
    assert build_wheel(checkout, cache) == first and first.path.stat().st_mtime_ns == made
    (checkout / "cli.py").write_text("changed = True\n")
    other = build_wheel(checkout, cache)
    assert other.digest != first.digest and first.path.exists()
    first.path.write_bytes(b"torn")
    (checkout / "cli.py").write_bytes((ROOT / "cli.py").read_bytes())
    assert build_wheel(checkout, cache) == first and first.path.read_bytes() != b"torn"


def test_pip_can_install_it_and_the_installed_package_makes_it_again(tmp_path):
    wheel = build_wheel(cache=tmp_path / "cache")
    target = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(target)]
    command = [sys.executable, "-m", "pip", "install", *options, str(wheel.path)]
    subprocess.run(command, check=True, capture_output=True)
    program = (
        "import sys, longspan; from pathlib import Path;"
        "from longspan.cluster.wheel import build_wheel;"
        "assert longspan.__file__.startswith(sys.argv[1]), longspan.__file__;"
        "print(build_wheel(cache=Path(sys.argv[2])).path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(target), str(tmp_path / "again")],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again, first = zipfile.ZipFile(done.stdout.strip()), zipfile.ZipFile(wheel.path)
    assert again.namelist() == first.namelist()
    assert {name for name in again.namelist() if again.read(name) != first.read(name)} == set()


def test_a_package_whose_files_are_not_known_is_refused(checkout, tmp_path):
    (checkout / "pyproject.toml").unlink()
    with pytest.raises(ClusterError, match="cannot be told from others"):
        build_wheel(checkout, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="LONGSPAN_CACHE"):
        build_wheel(cache=tmp_path / "file")
