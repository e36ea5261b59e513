"""A run's folder: its recipe, environment, events, logs, checkpoints and evaluations."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .. import __version__
from ..errors import RunError
from ..redact import known_credentials, redact
from .changes import changes
from .run_lock import Owner, holder, run_lock
from .settings import RunSettings

_FOLDERS = ("logs", "checkpoints", "evaluations")
_LOCK = "run.lock"
_TEMPORARY = ".writing"
_PACKAGES = ("torch", "megatron-core", "numpy", "tokenizers", "pyarrow", "wandb")


def settings_hash(run: RunSettings) -> str:
    """Sixteen hex digits that two runs share exactly when all their settings agree."""
    text = json.dumps(run.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that readers see all of it or nothing, also after a power cut."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunDirectory:
    """The files of one run. Nothing is read or written until a method is called.

    Args:
        path: The folder; made absolute, so that a later change of directory does not matter.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).expanduser().absolute()

    @property
    def recipe(self) -> Path:
        """The resolved recipe: complete, and what `longspan resume` runs."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """Versions and machine of the launch that created the run."""
        return self.path / "environment.json"

    @property
    def events(self) -> Path:
        """JSON lines, one per step, evaluation, checkpoint, start and end."""
        return self.path / "events.jsonl"

    @property
    def logs(self) -> Path:
        """Output and failures of the ranks."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """One folder `step-N` per checkpoint."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """One JSON file per evaluation."""
        return self.path / "evaluations"

    @property
    def companions(self) -> Path:
        """The tokenizer, and of a model that came from somewhere its config files."""
        return self.path / "tokenizer"

    @property
    def rewinds(self) -> Path:
        """The times that the run went back to a checkpoint; missing while there are none."""
        return self.path / "rewinds.json"

    @property
    def complete(self) -> Path:
        """The summary of a finished run; its presence is the mark."""
        return self.path / "complete.json"

    def __str__(self) -> str:
        """The path as a user would type it: relative where that is shorter."""
        try:
            return str(self.path.relative_to(Path.cwd()))
        except (ValueError, FileNotFoundError):
            return str(self.path)

    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.recipe.is_file()

    def load_settings(self) -> RunSettings:
        """The settings that the run was created with.

        Raises:
            RunError: The folder holds no run, or a recipe that this version cannot read.
        """
        try:
            return RunSettings.model_validate(yaml.safe_load(self.recipe.read_text("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            raise self.no_run() from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
            made = self.read_environment().get("longspan", "unknown")
            raise RunError(
                f"{self.recipe} cannot be read: {error}",
                f"it was written by longspan {made}, this is {__version__}: "
                "go on with that version, or start in another --run-dir",
            ) from None

    def no_run(self) -> RunError:
        """What to say about a folder without a run."""
        what = "holds no run: recipe.yaml is missing" if self.path.exists() else "does not exist"
        return RunError(
            f"{self} {what}",
            "give the run directory that `longspan train` printed, such as ./runs/quickstart",
        )

    def read_environment(self) -> dict[str, Any]:
        """environment.json; empty when it is missing or torn."""
        return _read_object(self.environment) or {}

    def working_directory(self, otherwise: Path | None = None) -> Path:
        """Where the run was created, which its relative data paths refer to, if it is there.

        Args:
            otherwise: If it is not; left out: the working directory of this process.
        """
        recorded = self.read_environment().get("working_directory")
        return Path(recorded) if recorded and Path(recorded).is_dir() else otherwise or Path.cwd()

    def is_complete(self) -> bool:
        """Whether the run was trained to its end."""
        return self.read_summary() is not None

    def read_summary(self) -> dict[str, Any] | None:
        """What `mark_complete` was given; None before that."""
        return _read_object(self.complete)

    def mark_complete(self, summary: Mapping[str, Any]) -> None:
        """Record that the run was trained to its end; call on rank 0 only."""
        write_atomically(self.complete, json.dumps(redact(summary), indent=2) + "\n")

    def owner(self) -> Owner | None:
        """See `holder`."""
        return holder(self.path / _LOCK)

    def lock(self) -> AbstractContextManager[int]:
        """See `run_lock`."""
        return run_lock(self.path / _LOCK, str(self))


def create_or_open(path: Path, run: RunSettings, name: str) -> RunDirectory:
    """The run's folder: made when it is new or empty, opened when it holds the same recipe.

    Args:
        path: The folder.
        run: The resolved settings.
        name: The recipe's name, for people.

    Raises:
        RunError: The folder belongs to another recipe, holds something else, is being created
            by another process, or cannot be written; or the recipe holds a credential. Nothing
            in it was changed.
    """
    directory = RunDirectory(path)
    try:
        if not directory.is_run():
            _refuse_foreign(directory)
            refuse_credentials(run)
            directory.path.mkdir(parents=True, exist_ok=True)
            with directory.lock():
                if not directory.is_run():
                    _write_recipe(directory, run, name)
        check_same_recipe(directory, run)
        for folder in _FOLDERS:
            (directory.path / folder).mkdir(exist_ok=True)
    except OSError as error:
        fix = "free some space there" if error.errno == errno.ENOSPC else "mend it"
        raise RunError(
            f"{directory} cannot be written: {error.strerror or error}",
            f"{fix}, or give another --run-dir",
        ) from error
    return directory


def check_same_recipe(directory: RunDirectory, run: RunSettings) -> None:
    """Compare a run's recorded settings with those that are asked for.

    Raises:
        RunError: They differ; the message names each setting, its old and its new value.
    """
    recorded = directory.load_settings()
    if settings_hash(recorded) == settings_hash(run):
        return
    old, new = (redact(settings.model_dump(mode="json")) for settings in (recorded, run))
    found = list(changes(old, new))
    shown = [*found[:12], *([f"and {len(found) - 12} more"] if len(found) > 12 else [])]
    lines = "\n  ".join(["holds a run of another recipe (there -> asked for):", *shown])
    raise RunError(
        f"{directory} {lines}",
        "give another --run-dir, or delete that folder if the run is not wanted; "
        f"`longspan resume {directory}` goes on with it as it is",
    )


def describe_environment(name: str) -> dict[str, Any]:
    """Versions and machine; no environment variables, so no secrets."""
    packages = {}
    for package in _PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "recipe": name,
        "longspan": __version__,
        "python": sys.version.split()[0],
        "packages": packages,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "working_directory": str(Path.cwd()),
        "created": time.time(),
    }


def _write_recipe(directory: RunDirectory, run: RunSettings, name: str) -> None:
    # recipe.yaml makes the folder a run, so it is written last.
    environment = redact(describe_environment(name))
    write_atomically(directory.environment, json.dumps(environment, indent=2) + "\n")
    header = f"# The resolved recipe of this run: {name}, longspan {__version__}.\n"
    body = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(directory.recipe, header + body)


def refuse_credentials(run: RunSettings) -> None:
    """A recipe is kept as it is: with the run, its checkpoints and whoever tracks it.

    Raises:
        RunError: It holds a credential of this machine.
    """
    for path, source in known_credentials(run.model_dump(mode="json", by_alias=True)):
        raise RunError(
            f"{path} holds a credential, that of {source}: a recipe is kept with every run of it",
            "leave it out of the recipe; what needs it finds it where it is",
        )


def _refuse_foreign(directory: RunDirectory) -> None:
    path = directory.path
    if path.exists() and not path.is_dir():
        raise RunError(f"{directory} is a file, not a folder", "give another --run-dir")
    # What a launch leaves that was killed while it created the folder.
    ours = {_LOCK, directory.environment.name}
    entries = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    strange = [name for name in entries if name not in ours and not name.endswith(_TEMPORARY)]
    if strange:
        shown = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
        raise RunError(
            f"{directory} is not empty and holds no run (it has {shown})",
            "give another --run-dir",
        )


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
