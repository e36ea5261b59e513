"""Registry: a small file per run that was started from here, so that an id finds its folder."""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import LongspanError, RunError
from ..recipes.recipe import NAME
from ..trainer.run_directory import RunDirectory, write_atomically
from .clusters import Cluster, load_clusters

_LETTERS = "bcdfghjkmnpqrstvwxz"  # no vowels: an id is never a word
_LONGEST = 80
_SHOWN = 8


@dataclass(frozen=True)
class Submission:
    """One Ray job for a run.

    Attributes:
        id: Of the job: the run's id and a number.
        time: When it was asked for, in unix seconds.
    """

    id: str
    time: float


@dataclass(frozen=True)
class Place:
    """The cluster that a run was submitted to, as it was known then.

    Attributes:
        name: As in clusters.yaml, or its address.
        address: Of its dashboard.
        storage: Its folder for runs.
    """

    name: str
    address: str
    storage: str


@dataclass(frozen=True)
class Record:
    """What is kept of a run.

    Attributes:
        id: Its id.
        recipe: The name of its recipe.
        created: In unix seconds.
        run_dir: Its folder, absolute; of a run on a cluster as the nodes see it.
        cluster: Where it was submitted to; None for a run of this machine.
        submissions: Its jobs, the newest last.
        settings: `settings_hash` of its recipe; empty for runs of this machine.
        shape: What runs of equal speed share; empty where it is not known.
        device: What every rank has, `gpu` or `cpu`; empty where it was not decided here.
        ranks: How many there are; 0 where that was not decided here.
        slots: Ranks that the largest node takes; 0 where nobody says.
    """

    id: str
    recipe: str
    created: float
    run_dir: str
    cluster: Place | None = None
    submissions: tuple[Submission, ...] = ()
    settings: str = ""
    shape: str = ""
    device: str = ""
    ranks: int = 0
    slots: int = 0

    @property
    def directory(self) -> RunDirectory:
        """The run's folder; of a run on a cluster it may not be visible here."""
        return RunDirectory(Path(self.run_dir))

    def submitted(self, submission: str) -> Record:
        """The record with one more job."""
        return replace(self, submissions=(*self.submissions, Submission(submission, time.time())))


def home() -> Path:
    """$LONGSPAN_HOME, else $XDG_DATA_HOME/longspan, else ~/.local/share/longspan."""
    if own := os.environ.get("LONGSPAN_HOME"):
        return Path(own).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "longspan"


def new_id(recipe: str) -> str:
    """`<recipe>-<yymmdd>-<6 letters>`; nobody else has it."""
    letters = "".join(secrets.choice(_LETTERS) for _ in range(6))
    return f"{recipe[: _LONGEST - 14]}-{time.strftime('%y%m%d')}-{letters}"


def check_id(run_id: str) -> None:
    """Refuse what is no id.

    Raises:
        RunError: It would not do as the name of a file, a folder and a job.
    """
    if not re.fullmatch(NAME, run_id) or len(run_id) > _LONGEST or run_id.endswith(".json"):
        raise RunError(
            f"--run-id {run_id} cannot be the id of a run",
            f"take letters, digits, -, _ and ., a letter or digit first, at most {_LONGEST}",
        )


class Registry:
    """The records of a user.

    Args:
        root: The folder that holds them.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home()) / "runs"

    def records(self) -> list[Record]:
        """All of them, the newest first; files that are no record are skipped."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(self.root):
                if entry.name.endswith(".json") and (record := _read(Path(entry.path))):
                    found.append(record)
        return sorted(found, key=lambda record: (-record.created, record.id))

    def get(self, run_id: str) -> Record | None:
        """The record of exactly this id."""
        if not re.fullmatch(NAME, run_id):
            return None
        return _read(self.root / f"{run_id}.json")

    def write(self, record: Record, recipe: str | None = None, *, new: bool = False) -> None:
        """Keep a record.

        Args:
            record: The record.
            recipe: The resolved recipe, which later submissions send again.
            new: Refuse to replace one.

        Raises:
            FileExistsError: There is one of this id, and `new`.
            RunError: The folder cannot be written.
        """
        file = self.root / f"{record.id}.json"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if new:
                with file.open("x"):
                    pass
            if recipe is not None:
                write_atomically(file.with_name(f"{record.id}.yaml"), recipe)
            write_atomically(file, json.dumps(asdict(record), indent=2) + "\n")
        except OSError as error:
            if new and isinstance(error, FileExistsError) and file.exists():
                raise
            what = f"{file} cannot be written: {error.strerror or error}"
            raise RunError(what, "mend that, or name another folder with LONGSPAN_HOME") from None

    def recipe(self, record: Record) -> str:
        """The resolved recipe of a run on a cluster.

        Raises:
            RunError: It is gone.
        """
        for file in (self.root / f"{record.id}.yaml", record.directory.recipe):
            with suppress(OSError, UnicodeDecodeError):
                return file.read_text("utf-8")
        what = f"the recipe of {record.id} is not in {self.root} any more"
        raise RunError(what, f"submit it again: longspan submit RECIPE --run-id {record.id}")

    def forget(self, run_id: str) -> None:
        """Remove the record of a run that never began."""
        for ending in (".json", ".yaml"):
            (self.root / f"{run_id}{ending}").unlink(missing_ok=True)

    def of_folder(self, path: Path) -> Record | None:
        """The record of the run in a folder."""
        wanted = str(RunDirectory(path).path)
        return next((record for record in self.records() if record.run_dir == wanted), None)


def find_run(reference: str, registry: Registry | None = None) -> Record | RunDirectory:
    """The run that a user means.

    Args:
        reference: An id, a prefix that only one id has, or a folder.
        registry: Where to look; left out: the user's own.

    Raises:
        RunError: It is none of these, or several.
    """
    registry = registry or Registry()
    if (exact := registry.get(reference)) is not None:
        return exact
    directory = RunDirectory(Path(reference))
    if directory.is_run() or "/" in reference or reference in (".", ".."):
        known = registry.of_folder(directory.path) or _of_cluster(directory)
        return known or directory
    records = registry.records()
    matches = [record.id for record in records if record.id.startswith(reference)]
    if len(matches) == 1:
        return next(record for record in records if record.id == matches[0])
    if matches:
        lines = [f"  {name}" for name in matches[:_SHOWN]]
        lines += [f"  and {len(matches) - _SHOWN} more"] * (len(matches) > _SHOWN)
        raise RunError(
            "\n".join([f"{len(matches)} runs begin with `{reference}`:", *lines]),
            "give more of the id; the newest is listed first",
        )
    if re.fullmatch(NAME, reference) and (found := _on_storage(reference)) is not None:
        return found
    raise _unknown(reference, directory, [record.id for record in records])


def run_folder(reference: str) -> Path:
    """The folder that a user means by a run's id, the beginning of one, or a path.

    Raises:
        RunError: There is no such run, or its folder is not visible here.
    """
    registry = Registry()
    if registry.get(reference) is None and ("/" in reference or Path(reference).exists()):
        return Path(reference)
    found = find_run(reference, registry)
    if isinstance(found, RunDirectory):
        return found.path
    if found.cluster is not None and not found.directory.path.is_dir():
        raise RunError(
            f"{found.run_dir} of run {found.id} is on cluster {found.cluster.name}, not here",
            f"use a machine that sees {found.cluster.storage}",
        )
    return found.directory.path


def _on_storage(run_id: str) -> Record | None:
    """A run that was submitted from another machine, where its cluster's storage is visible."""
    for path in _storages():
        if (found := _of_cluster(RunDirectory(path / run_id))) is not None:
            return found
    return None


def _of_cluster(directory: RunDirectory) -> Record | None:
    """The run in a folder, if that lies where a cluster keeps its runs."""
    cluster = _storages().get(directory.path.parent)
    if cluster is None or not directory.is_run():
        return None
    made = directory.read_environment()
    place = Place(cluster.name, cluster.settings.address, cluster.settings.storage)
    name = directory.path.name
    created = float(made.get("created", 0.0))
    return Record(name, str(made.get("recipe", name)), created, str(directory.path), place)


def _storages() -> dict[Path, Cluster]:
    """Where the clusters keep their runs; a file of clusters that is wrong names none."""
    with suppress(LongspanError):
        clusters = load_clusters().values()
        return {Path(cluster.settings.storage) / "runs": cluster for cluster in clusters}
    return {}


def _unknown(reference: str, directory: RunDirectory, known: Sequence[str]) -> RunError:
    close = difflib.get_close_matches(reference, known, n=3, cutoff=0.5)
    fix = f"did you mean {' or '.join(close)}?" if close else "`longspan runs` lists the runs"
    holds = " (a folder of that name holds no run)" if directory.path.is_dir() else ""
    what = f"there is no run `{reference}`: it is neither an id nor a run's folder{holds}"
    if not known:
        fix = "no run was started from here yet: longspan train quickstart"
    return RunError(what, fix)


def _read(file: Path) -> Record | None:
    try:
        raw: dict[str, Any] = json.loads(file.read_text("utf-8"))
        place = raw.pop("cluster", None)
        jobs = tuple(Submission(**job) for job in raw.pop("submissions", ()))
        record = Record(**raw, cluster=Place(**place) if place else None, submissions=jobs)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return record if record.id == file.stem and isinstance(record.run_dir, str) else None
