"""The checkpoints of a run: written aside, completed by a marker, then renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..attention.settings import RopeSettings
from ..errors import CheckpointError
from .engine.checkpoint import checkpoint_bytes, load_engine, save_engine
from .engine.engine import Engine

MARKER = "COMMITTED"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Cursor:
    """Where a run stands between two steps. With the recipe it decides everything that follows.

    Attributes:
        step: Steps done in the run.
        stage: Index of the current stage.
        stage_step: Steps done in it.
        next_sample: Index of the stage's next sequence, over all ranks.
        tokens: Tokens trained on in the run.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    next_sample: int = 0
    tokens: int = 0


def name(cursor: Cursor) -> str:
    """The folder of the checkpoint at `cursor`."""
    return f"step-{cursor.step:08d}"


def newest(directory: Path) -> Path | None:
    """The newest complete checkpoint, as rank 0 sees it and tells all ranks."""
    found: list[str | None] = [None]
    if dist.get_rank() == 0:
        complete = _complete(directory)
        found = [complete[-1].name if complete else None]
    dist.broadcast_object_list(found)
    return None if found[0] is None else directory / found[0]


def steps(directory: Path) -> list[int]:
    """The steps of all complete checkpoints, as this process sees them, ascending."""
    return [_step(path) for path in _complete(directory)]


def remove_after(directory: Path, step: int) -> None:
    """Remove every checkpoint newer than that of `step`, the newest first; on rank 0 only."""
    newer = [path for path in _complete(directory) if _step(path) > step]
    for path in reversed(newer):
        _remove(path)
    if newer:
        _sync(directory)


def save(directory: Path, engine: Engine, cursor: Cursor, *, keep: int, info: Any) -> Path:
    """Write a checkpoint from all ranks and drop the oldest ones beyond `keep`.

    Args:
        directory: The run's checkpoint folder.
        engine: What to save.
        cursor: Where the run stands.
        keep: How many complete checkpoints stay.
        info: Anything printable as JSON that explains the checkpoint.

    Returns:
        The committed checkpoint.

    Raises:
        CheckpointError: If it cannot be written; older ones are untouched.
    """
    target = directory / name(cursor)
    if (target / MARKER).is_file():
        return target
    part = directory / f"{target.name}.tmp"
    needed = checkpoint_bytes(engine)
    try:
        if dist.get_rank() == 0:
            _make_room(directory, part, needed)
        dist.barrier()
        save_engine(engine, part)
    except Exception as error:
        raise _explained(error, part, needed) from error
    if dist.get_rank() == 0:
        try:
            _commit(part, target, cursor, info)
            _prune(directory, keep)
        except OSError as error:
            raise _explained(error, part, needed) from error
    dist.barrier()
    return target


def load(checkpoint: Path, engine: Engine, *, optimizer: bool) -> list[str]:
    """Load a checkpoint's weights and, if asked, the optimizer's state.

    Returns:
        Parameters that the stage's attention adds, and the checkpoint does not have.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return load_engine(engine, checkpoint, optimizer=optimizer)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} cannot be read: {type(error).__name__}: {error}",
            "delete that folder to go on from the checkpoint before it",
        ) from error


def refuse_other_rope(checkpoint: Path, rope: RopeSettings) -> None:
    """Refuse to go on in the middle of a stage with positions that mean something else.

    Raises:
        CheckpointError: The checkpoint was written with another RoPE.
    """
    try:
        saved = json.loads((checkpoint / "state.json").read_text())["rope"]
    except (OSError, ValueError, KeyError):
        return  # what is wrong with state.json is said where the cursor is read
    if saved != rope.model_dump(mode="json"):
        raise CheckpointError(
            f"checkpoint {checkpoint} was written with another RoPE than the stage's "
            f"{rope.words}: {json.dumps(saved)}",
            "resume with the recipe that it was written with; a new RoPE needs a new stage",
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """All that state.json says; empty when it is missing or torn."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def read_cursor(checkpoint: Path) -> Cursor:
    """Where the run stood when the checkpoint was written."""
    try:
        return Cursor(**json.loads((checkpoint / "state.json").read_text())["cursor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} has no usable state.json: {error}",
            "delete that folder to go on from the checkpoint before it",
        ) from error


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _make_room(directory: Path, part: Path, needed: int) -> None:
    """An empty folder to write to, on a disk that has room for a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob("step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, "not enough free space", str(directory))
    part.mkdir()


def _commit(part: Path, target: Path, cursor: Cursor, info: Any) -> None:
    """Complete the folder with its state and marker, durably, and rename it into place."""
    state = {"format": 1, "cursor": asdict(cursor), **info}
    _write(part / "state.json", json.dumps(state, indent=1))
    _write(part / MARKER, "")
    _sync(part)
    if target.exists():  # incomplete: `save` returns early where it is complete
        shutil.rmtree(target)
    part.rename(target)
    _sync(target.parent)


def _prune(directory: Path, keep: int) -> None:
    for old in _complete(directory)[:-keep]:
        _remove(old)


def _complete(directory: Path) -> list[Path]:
    """The complete checkpoints, the newest last."""
    found = [mark.parent for mark in directory.glob(f"step-*/{MARKER}")]
    return sorted((path for path in found if _step(path) >= 0), key=_step)


def _remove(checkpoint: Path) -> None:
    # Without the marker first, so that a half-deleted folder is never taken for complete.
    (checkpoint / MARKER).unlink()
    shutil.rmtree(checkpoint, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explained(error: BaseException, part: Path, needed: int) -> CheckpointError:
    """The error as a user can act on it; the unfinished folder is removed."""
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    chain: BaseException | None = error
    full = False
    while chain is not None:
        number = chain.errno if isinstance(chain, OSError) else None
        full = full or number in _FULL or "No space left" in str(chain)
        chain = chain.__cause__ or chain.__context__
    if full:
        return CheckpointError(
            f"no space left for a checkpoint at {part.parent} "
            f"(about {needed / 2**20:,.0f} MiB needed); older checkpoints are intact",
            "free some space there, then resume; checkpoint.keep decides how many stay",
        )
    return CheckpointError(
        f"checkpoint {part.name.removesuffix('.tmp')} cannot be written: "
        f"{type(error).__name__}: {error}; older checkpoints are intact",
        f"make sure that {part.parent} can be written to, then resume",
    )
