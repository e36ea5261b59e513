"""The rules that checkpoints obey: which stay, and a place that can be written to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..errors import Problem
from ..trainer.checkpoint.settings import CheckpointSettings
from ..trainer.checkpoint.urls import is_url, redacted
from .fixes import around

_WHERE = "checkpoint.where"
_PLACE = "a folder in the run's, an absolute path, or a URL such as s3://bucket/prefix"


def check_checkpoint(settings: CheckpointSettings) -> Iterator[Problem]:
    """What is wrong with when, where and how long checkpoints are kept.

    Args:
        settings: Of the recipe.
    """
    every, stays = settings.every, settings.keep_every
    if stays % every:
        expected = f"a multiple of checkpoint.every ({every}): no other step has a checkpoint"
        fix = around("keep_every", stays, every)
        yield Problem("checkpoint.keep_every", str(stays), expected, fix)
    if is_url(settings.where):
        yield from _check_url(settings.where)
    else:
        yield from _check_path(settings.where)


def _check_url(where: str) -> Iterator[Problem]:
    shown, protocol = redacted(where), where.partition("://")[0]
    if shown != where:
        expected = "a URL without credentials: a recipe is copied into runs and reports"
        fix = "put them into the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE"
        yield Problem(_WHERE, shown, expected, f"{fix}) or the provider's own files")
        return
    if protocol == "file":
        yield from _check_path(where.removeprefix("file://"))
    elif protocol == "memory":
        yield Problem(_WHERE, where, "a place that outlives the process", "where: checkpoints")
    elif not where.partition("://")[2].strip("/"):
        yield Problem(_WHERE, where, _PLACE, f"where: {protocol}://bucket/prefix")
    else:
        yield from _check_package(where, protocol)


def _check_package(where: str, protocol: str) -> Iterator[Problem]:
    """The packages behind a URL; they are looked for, not imported."""
    if find_spec("fsspec") is None:
        expected = "a folder: URLs need the package fsspec, which is missing"
        yield Problem(_WHERE, where, expected, 'pip install "longspan[s3]"')
        return
    from fsspec.registry import known_implementations, registry

    known = known_implementations.get(protocol)
    if known is None and protocol not in registry:
        expected = f"a protocol that fsspec knows; {protocol} is none"
        yield Problem(_WHERE, where, expected, "where: s3://bucket/prefix")
    elif known is not None and find_spec(known["class"].split(".")[0]) is None:
        needed = known["class"].split(".")[0]
        expected = f"a folder: {protocol}:// needs the package {needed}, which is missing"
        extra = '"longspan[s3]"' if needed == "s3fs" else needed
        yield Problem(_WHERE, where, expected, f"pip install {extra}")


def _check_path(where: str) -> Iterator[Problem]:
    path = Path(where).expanduser()
    if not where.strip() or where.strip(" ./") == "" or where != where.strip():
        yield Problem(_WHERE, repr(where), _PLACE, "where: checkpoints")
    elif not path.is_absolute():
        if ".." in path.parts:
            expected = "a folder in the run's; this one leads out of it"
            yield Problem(_WHERE, where, expected, "where: checkpoints, or an absolute path")
    else:
        yield from _check_absolute(where, path)


def _check_absolute(where: str, path: Path) -> Iterator[Problem]:
    """Whether the folder is there, or can be made."""
    there = path
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        yield Problem(_WHERE, where, f"a folder; {there} is a file", "give another path")
    elif not os.access(there, os.W_OK | os.X_OK):
        expected = f"a folder that can be written to; {there} cannot"
        yield Problem(_WHERE, where, expected, "change its permissions, or give another path")
