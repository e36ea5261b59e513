"""URLs of checkpoints: told from paths, and printed without their secrets."""

from __future__ import annotations

import re

# Up to the last @: keys that somebody pasted hold slashes and further @.
_CREDENTIALS = re.compile(r"://(?:[^\s/?#]*:\S*@|[^\s/?#]*@)")
_VALUES = re.compile(r"([?&#;][^=&#;\s\"']+)=[^&#;\s\"']*")


def is_url(where: str) -> bool:
    """Whether a place is a URL; anything else is a path."""
    return "://" in where


def redacted(text: str) -> str:
    """A URL, or a message with URLs in it, without credentials and without values of queries."""
    if not is_url(text):
        return text
    return _VALUES.sub(r"\1=***", _CREDENTIALS.sub("://***@", text))
