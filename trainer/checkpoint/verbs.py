"""The verbs that look after a run's checkpoints: list, verify and prune them. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import CheckpointError
from .files import CheckpointFiles
from .manifest import damages
from .reference import RunStore
from .retention import expendable
from .settings import CheckpointSettings
from .survey import Found, age_words, columns, committed_at, layout_words, size_words, survey

_HEAD = ("step", "stage", "tokens", "size", "age", "layout", "state")
_STATES = {
    "committed": "intact by size",
    "unfinished": "unfinished",
    "aside": "set aside",
}


@dataclass(frozen=True)
class Report:
    """What to print, and whether all is well."""

    lines: list[str]
    good: bool = True


def list_checkpoints(run_dir: Path) -> Report:
    """A line per folder in the run's store; sizes are compared, no data are read.

    Raises:
        LongspanError: There is no run, or its store cannot be read.
    """
    run = RunStore.of(run_dir)
    found = survey(run.store)
    if not found:
        return Report([f"{run.directory} has no checkpoint yet"])
    lines = columns([_HEAD, *map(_cells, found)])
    lines += [f"{each.name}: {each.problem}" for each in found if each.problem]
    return Report(lines)


def verify(run_dir: Path, step: int | None = None) -> Report:
    """Read every byte of the complete checkpoints, or of one, and compare the hashes.

    Returns:
        A line per damage and per intact checkpoint, and the newest intact one.

    Raises:
        LongspanError: There is no run or checkpoint, or the store cannot be read.
    """
    run = RunStore.of(run_dir)
    found = [each for each in survey(run.store) if each.kind in ("committed", "damaged")]
    if step is not None:
        found = [each for each in found if each.step == step]
    if not found:
        committed_at(run.store, step)  # says what there is
    lines, newest, good = [], None, True
    for each in found:
        problems = _problems(run, each)
        lines += [f"{each.name}: {problem}" for problem in problems]
        if problems:
            good = False
            continue
        newest = each.name
        lines.append(f"{newest}: intact ({len(each.sizes)} files, {size_words(each.size)})")
    if not good and step is None:
        none = "no checkpoint of the run is intact"
        lines.append(none if newest is None else f"the newest intact checkpoint is {newest}")
    return Report(lines, good)


def prune(run_dir: Path, keep: int | None, agree: Callable[[list[str]], bool]) -> Report:
    """Remove what retention lets go, and attempts that were left behind.

    Args:
        run_dir: The run's folder.
        keep: How many of the newest stay, whatever the recipe says; None: as the recipe says.
        agree: Told what would go; whether it shall.

    Returns:
        What was removed.

    Raises:
        LongspanError: The run is in progress, the newest checkpoint is damaged, or the store
            cannot be read. Nothing was removed.
    """
    run = RunStore.of(run_dir)
    with run.directory.lock():
        run.store.claim()
        found = survey(run.store)
        gone = [*_expendable(run, found, keep), *(f for f in found if f.kind == "unfinished")]
        if not gone:
            return Report(["nothing to remove"])
        if not agree([f"{each.name}  {size_words(each.size)}" for each in gone]):
            return Report(["nothing was removed"])
        for each in gone:
            run.store.remove(each.name)
    total = size_words(sum(each.size for each in gone))
    return Report([*(f"removed {each.name}" for each in gone), f"{total} are free again"])


def _cells(found: Found) -> tuple[str, ...]:
    state = _STATES.get(found.kind, "damaged")
    manifest = found.manifest
    if manifest is None:
        return str(found.step), "-", "-", size_words(found.size), "-", "-", state
    return (
        str(found.step),
        str(manifest.info.get("stage_name", manifest.cursor.stage)),
        f"{manifest.cursor.tokens:,}",
        size_words(found.size),
        age_words(found.age),
        layout_words(manifest.info),
        state,
    )


def _problems(run: RunStore, found: Found) -> list[str]:
    """What is wrong with a checkpoint; every byte is read."""
    if found.manifest is None:
        return [found.problem]
    return damages(CheckpointFiles(run.store, found.name), found.manifest)


def _expendable(run: RunStore, found: list[Found], keep: int | None) -> list[Found]:
    """Complete checkpoints that may go, once the newest was read again.

    Damaged ones do not count and stay: somebody may want to look at them.
    """
    complete = {each.step: each for each in found if each.kind == "committed"}
    named = [each for each in found if each.kind in ("committed", "damaged")]
    if not named:
        return []
    newest = named[-1]
    problems = _problems(run, newest)
    if problems:
        raise CheckpointError(
            f"nothing was removed: the newest checkpoint {newest.name} is damaged: {problems[0]}",
            f"`longspan checkpoint verify {run.directory}` names the newest intact one",
        )
    settings = run.settings.checkpoint
    if keep is not None:
        settings = CheckpointSettings(every=settings.every, keep=keep)
    ages = {step: each.age for step, each in complete.items()}
    return [complete[step] for step in expendable(ages, settings, reread=True)]
