"""Loader: the checkpoint that a run goes on from, the same on all ranks and only an intact one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ...attention.settings import RopeSettings
from ...errors import CheckpointError
from .agreement import on_first_rank
from .cursor import Cursor
from .files import CheckpointFiles
from .folders import step_of
from .manifest import Manifest, damages, read_manifest
from .store import Store


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes:
        files: Its files.
        manifest: What it is.
    """

    files: CheckpointFiles
    manifest: Manifest

    @property
    def name(self) -> str:
        """Its folder."""
        return self.files.folder

    @property
    def cursor(self) -> Cursor:
        """Where the run stood."""
        return self.manifest.cursor


def newest(store: Store, run: str = "RUN_DIR") -> Checkpoint | None:
    """The newest committed checkpoint; rank 0 chooses for all ranks.

    Args:
        store: The place of the checkpoints.
        run: The run's folder as a user would type it.

    Raises:
        CheckpointError: On all ranks: the store cannot be read, or that checkpoint's manifest.
    """
    return chosen(store, lambda names: names[-1] if names else None, run)


def chosen(
    store: Store, choose: Callable[[list[str]], str | None], run: str = "RUN_DIR"
) -> Checkpoint | None:
    """The checkpoint that rank 0 chooses for all ranks.

    Args:
        store: The place of the checkpoints.
        choose: Of the names of the committed ones, the oldest first.
        run: As of `newest`.

    Raises:
        CheckpointError: As of `newest`.
    """

    def look() -> tuple[str, Manifest] | None:
        try:
            name = choose(store.committed())
            return None if name is None else (name, read_manifest(CheckpointFiles(store, name)))
        except CheckpointError as error:
            raise CheckpointError(*_with_offer(store, run, error.what, error.fix)) from error

    found = on_first_rank(look)
    return None if found is None else Checkpoint(CheckpointFiles(store, found[0]), found[1])


def refuse_damaged(checkpoint: Checkpoint, run: str = "RUN_DIR") -> None:
    """Read every byte of a checkpoint, each rank other files, before any of it is believed.

    Args:
        checkpoint: The run is about to go on from it.
        run: As of `newest`.

    Raises:
        CheckpointError: On all ranks: it is not what was written. Names the newest that is.
    """
    files, share = checkpoint.files, (dist.get_rank(), dist.get_world_size())
    told: list[Any] = [None] * share[1]
    try:
        mine = damages(files, checkpoint.manifest, share=share)
    except CheckpointError as error:
        mine = [error.what]
    dist.all_gather_object(told, mine)
    found = [sentence for sentences in told for sentence in sentences]
    if not found:
        return
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    what = f"checkpoint {files} is damaged: {found[0]}{more}"
    raise CheckpointError(*on_first_rank(lambda: _with_offer(files.store, run, what, "")))


def newest_intact(store: Store) -> str | None:
    """The newest checkpoint of which every byte is what was written."""
    for name in reversed(store.committed()):
        files = CheckpointFiles(store, name)
        try:
            if not damages(files, read_manifest(files)):
                return name
        except CheckpointError:
            continue
    return None


def refuse_other_rope(checkpoint: Checkpoint, rope: RopeSettings) -> None:
    """Refuse to go on in the middle of a stage with positions that mean something else.

    Raises:
        CheckpointError: The checkpoint was written with another RoPE.
    """
    saved = checkpoint.manifest.info.get("rope")
    if saved != rope.model_dump(mode="json"):
        raise CheckpointError(
            f"checkpoint {checkpoint.files} was written with another RoPE than the stage's "
            f"{rope.words}: {json.dumps(saved)}",
            "resume with the recipe that it was written with; a new RoPE needs a new stage",
        )


def _with_offer(store: Store, run: str, what: str, fix: str) -> tuple[str, str]:
    """An error, and the newest intact checkpoint as the way out."""
    try:
        intact = newest_intact(store)
    except CheckpointError:
        return what, fix
    if intact is None:
        return f"{what}; no other checkpoint of the run is intact", fix or "start the run again"
    step = step_of(intact)
    return what, (
        f"the newest intact checkpoint is that of step {step}: `longspan resume {run} --from "
        f"{step}` goes on from it and keeps the newer ones aside"
    )
