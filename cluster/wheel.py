"""Wheel: this package as one file that is equal for equal sources, to be sent to a cluster."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tomllib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from .. import __version__
from ..cache import default_cache
from ..errors import ClusterError

_ROOT = Path(__file__).parents[1]
_NAME = "longspan"
_WHEN = (1980, 1, 1, 0, 0, 0)  # the time of a file must not change the wheel


@dataclass(frozen=True)
class Wheel:
    """A built wheel.

    Attributes:
        path: The file, kept in the cache; pip can install it.
        digest: Of its content: 32 hex digits.
    """

    path: Path
    digest: str


def build_wheel(root: Path = _ROOT, cache: Path | None = None) -> Wheel:
    """The running package as a wheel, from the cache where nothing has changed.

    Only what belongs to the package is in it: of a checkout what pyproject.toml names, of an
    installed package what its RECORD names.

    Args:
        root: The folder of the package.
        cache: Where wheels are kept; left out: `$LONGSPAN_CACHE/wheels`.

    Raises:
        ClusterError: The package's files cannot be read, or the cache cannot be written.
    """
    try:
        content = _pack(_files(root) | _about(root))
        digest = hashlib.sha256(content).hexdigest()[:32]
        folder = (cache or default_cache() / "wheels") / digest
        path = folder / f"{_NAME}-{__version__}-py3-none-any.whl"
        if not path.is_file() or path.read_bytes() != content:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.writing")
            temporary.write_bytes(content)
            temporary.replace(path)
    except OSError as error:
        what = f"the package cannot be made into a wheel: {error}"
        raise ClusterError(what, "mend that; LONGSPAN_CACHE names the cache's folder") from None
    return Wheel(path, digest)


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip file that depends on names and contents only."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _WHEN)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _pack(files: dict[str, bytes]) -> bytes:
    """A zip file with the RECORD that makes it a wheel."""
    record = f"{_info()}/RECORD"
    lines = [f"{name},sha256={_hash(files[name])},{len(files[name])}" for name in sorted(files)]
    return _zip(files | {record: "\n".join([*lines, f"{record},,", ""]).encode()})


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _info() -> str:
    return f"{_NAME}-{__version__}.dist-info"


def _files(root: Path) -> dict[str, bytes]:
    """The files of the package by their names in the wheel."""
    project = _project(root)
    found = _installed(root) if project is None else _of_checkout(root, project)
    files = {f"{_NAME}/{file.relative_to(root).as_posix()}": file.read_bytes() for file in found}
    if f"{_NAME}/__init__.py" not in files:
        what = f"the files of the package in {root} cannot be told from others"
        raise ClusterError(what, "install longspan with pip, or use a checkout of it")
    return files


def _project(root: Path) -> dict[str, Any] | None:
    """pyproject.toml of a checkout; None for an installed package."""
    file = root / "pyproject.toml"
    if not file.is_file():
        return None
    found = tomllib.loads(file.read_text("utf-8"))
    return found if found.get("project", {}).get("name") == _NAME else None


def _of_checkout(root: Path, project: dict[str, Any]) -> Iterable[Path]:
    tools = project["tool"]["setuptools"]
    data = tools.get("package-data", {})
    for package in tools["packages"]:
        folder = root.joinpath(*package.split(".")[1:])
        for pattern in ("*.py", *data.get(package, ())):
            yield from folder.glob(pattern)


def _installed(root: Path) -> Iterable[Path]:
    try:
        files = distribution(_NAME).files or ()
    except PackageNotFoundError:
        return
    for file in files:
        path = Path(str(file.locate()))
        if path.is_relative_to(root) and "__pycache__" not in path.parts:
            yield path


def _about(root: Path) -> dict[str, bytes]:
    """The metadata that a wheel needs."""
    project = (_project(root) or {}).get("project", {})
    needs = project.get("dependencies", ())
    python = project.get("requires-python", ">=3.11")
    if not project:
        found = distribution(_NAME)
        needs = [need for need in found.requires or () if "extra ==" not in need]
        python = found.metadata["Requires-Python"] or python
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {_NAME}",
        f"Version: {__version__}",
        f"Requires-Python: {python}",
        *(f"Requires-Dist: {need}" for need in needs),
    ]
    wheel = ("Wheel-Version: 1.0", "Generator: longspan", "Root-Is-Purelib: true",
             "Tag: py3-none-any")  # fmt: skip
    return {
        f"{_info()}/METADATA": ("\n".join(lines) + "\n").encode(),
        f"{_info()}/WHEEL": ("\n".join(wheel) + "\n").encode(),
        f"{_info()}/entry_points.txt": f"[console_scripts]\n{_NAME} = {_NAME}.cli:main\n".encode(),
    }
