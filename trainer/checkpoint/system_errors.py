"""Errors of disks, networks and object stores, in words that say what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import CheckpointError, LongspanError
from .urls import is_url, redacted

_SPACE = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file would be larger than is allowed there",
}
_MISSING = (errno.ENOENT, errno.ENOTDIR)
_MISTAKES = (TypeError, AttributeError, LookupError, AssertionError, MemoryError, BufferError)
_STALE = (errno.ESTALE, errno.EIO, errno.ENXIO, errno.ENODEV)


@contextmanager
def explained(what: str, place: str) -> Iterator[None]:
    """Turn what the system or an object store raises into an error that names a fix.

    Args:
        what: What was tried, as `checkpoint step-00000010 cannot be written`.
        place: The root of the store.

    Raises:
        CheckpointError: In place of an error of the block; `__cause__` is the original.
    """
    try:
        yield
    except (LongspanError, *_MISTAKES):
        raise
    except Exception as error:
        # A disk raises OSErrors; what an object store raises has no base of its own.
        if not (isinstance(error, OSError) or is_url(place)):
            raise
        why, fix = _reason(error, redacted(place))
        raise CheckpointError(f"{what} at {redacted(place)}: {redacted(why)}", fix) from error


def _reason(error: Exception, place: str) -> tuple[str, str]:
    """Why, and what to do about it."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _SPACE:
        return _SPACE[number], (
            "free some space there, then resume; checkpoint.keep decides how many stay"
        )
    if number == errno.EROFS:
        fix = f"make {place} writable, or give another checkpoint.where"
        return "the file system is read-only", fix
    if isinstance(error, PermissionError):
        if is_url(place):
            fix = "check the credentials and what they may do there"
            return f"access was refused ({_words(error)})", fix
        return "permission was denied", f"check the owner and the permissions of {place}"
    if isinstance(error, FileNotFoundError) or number in _MISSING:
        if is_url(place):
            fix = "check the bucket's name, the region and the endpoint"
            return f"there is no such object or bucket ({_words(error)})", fix
        return f"there is no such file ({_words(error)})", f"check that {place} is mounted"
    if number in _STALE:
        return _words(error), f"check the disk or the mount of {place}"
    if any("Credentials" in cls.__name__ for cls in type(error).__mro__):
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or an AWS profile"
        return f"credentials are missing or incomplete ({_words(error)})", fix
    if is_url(place):
        return _words(error), "check the network and the endpoint (AWS_ENDPOINT_URL)"
    return _words(error), f"make sure that {place} can be read and written"


def _words(error: Exception) -> str:
    """The error in its own words."""
    if isinstance(error, OSError) and error.strerror:
        name = f" ({error.filename})" if error.filename else ""
        return error.strerror + name
    return f"{type(error).__name__}: {error}"
