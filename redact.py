"""Redaction: credentials are replaced by `***` wherever settings, events or errors are written.

Three things are taken for a credential: a value under a name that says so (`api_key`, `hfToken`,
`SECRET`), a part of a URL (`scheme://user:password@host`, `?X-Amz-Signature=`), and in text
anything that stands in the environment under such a name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"

_SHORTEST = 8  # shorter values of the environment are words like `true`, and would garble text
_ANY = r"password|passwords|passwd|passphrase|pwd|secret|secrets|credential|credentials|signature"
# Numbers stand under these too: `token: 5`; plurals count things.
_TEXT_ONLY = r"key|token|apikey|authorization"
# Endings of words that are written together: `accesskey`, `authtoken`.
_ENDS = r"password|passwd|secret|token|(?:api|access|private|secret|account|auth|master|sas)key"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ANY_WORD = re.compile(rf"(?:{_ANY})", re.IGNORECASE)
_TEXT_WORD = re.compile(rf"(?:{_ANY}|{_TEXT_ONLY}|[a-z0-9]*(?:{_ENDS}))", re.IGNORECASE)
_SHOUTED = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL")
# With one slash only, as a path that was made of a URL has it, there has to be a password.
_NO_END = r"[^\s/?#'\"<>]"
_USER = re.compile(
    rf"\b([A-Za-z][A-Za-z0-9+.-]{{0,30}}:/)(?:(/){_NO_END}+|{_NO_END}*?:{_NO_END}+)@"
)
_QUERY = re.compile(r"([?&;])([A-Za-z0-9._~-]+)=([^\s&;#'\"<>)\]]+)")
_QUERY_NAMES = frozenset({"sig", "auth", "awsaccesskeyid", "googleaccessid"})
_SCHEME = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}")
_SIGN = r"['\"]?[ \t]*(?P<sign>=(?!=)|:(?!//))[ \t]*"
_ASSIGNED = re.compile(r"(?<![?&;\w.-])(?P<name>[A-Za-z][\w.-]*)" + _SIGN)
_VALUE = re.compile(r"(?P<quote>['\"])(?P<quoted>.+?)(?P=quote)|(?P<bare>[^\s'\",;&)\]}]+)")


def is_secret_name(name: str, numbers: bool = False) -> bool:
    """Whether a name says that its value is a credential.

    Args:
        name: Of a setting, a variable or a field, in any spelling.
        numbers: Only the names under which a number is one, too: `password`, not `token`.
    """
    if not numbers and name.isupper() and _SHOUTED.search(name):
        return True
    known = _ANY_WORD if numbers else _TEXT_WORD
    return any(known.fullmatch(word) for word in _WORD.findall(name))


def redact_text(text: str) -> str:
    """Text without credentials: a message, a traceback, a URL."""
    for value in _secrets(tuple(os.environ.items())):
        text = text.replace(value, HIDDEN)
    return _redact_parts(text)


def redact(value: Any) -> Any:
    """Plain values (mappings, lists, text, numbers) without credentials; a copy."""
    return _redact(value, "", _secrets(tuple(os.environ.items())))


def credentials(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The places of plain values that hold a credential.

    The environment is not asked: whether a recipe is valid depends on the recipe alone.

    Yields:
        The dotted path, and the value as it may be shown.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from credentials(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from credentials(item, f"{path}.{index}")
    else:
        names = [key for key in path.split(".") if not key.isdigit()]
        shown = _redact(value, names[-1] if names else "", ())
        if shown != value:
            yield path, str(shown)


def _redact(value: Any, name: str, known: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _redact(item, str(key), known) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redact(item, name, known) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return HIDDEN if is_secret_name(name, numbers=True) else value
    text = str(value)
    if text and is_secret_name(name):
        return HIDDEN
    for secret in known:
        text = text.replace(secret, HIDDEN)
    cleaned = _redact_parts(text)
    return value if cleaned == str(value) else cleaned


def _redact_parts(text: str) -> str:
    text = _USER.sub(rf"\g<1>\g<2>{HIDDEN}@", text)
    text = _QUERY.sub(_hide_query, text)
    text = _SCHEME.sub(rf"\g<1> {HIDDEN}", text)
    return _hide_assigned(text)


def _hide_query(found: re.Match[str]) -> str:
    mark, name, _ = found.groups()
    secret = name.lower() in _QUERY_NAMES or is_secret_name(name)
    return f"{mark}{name}={HIDDEN}" if secret else found[0]


def _hide_assigned(text: str) -> str:
    """`name=value`, `name: value`, with quotes or without."""
    parts, at = [], 0
    for found in _ASSIGNED.finditer(text):
        quoted = text[found.end() : found.end() + 1] in ("'", '"')
        if found.start() < at or not _is_assignment(found, quoted):
            continue
        if (value := _VALUE.match(text, found.end())) is None:
            continue
        group = "quoted" if value["quote"] else "bare"
        parts += [text[at : value.start(group)], HIDDEN]
        at = value.end(group)
    return "".join([*parts, text[at:]])


def _is_assignment(found: re.Match[str], quoted: bool) -> bool:
    """Whether a name with a value gives a credential; prose and code (`key=len`) do not."""
    name = found["name"]
    if not is_secret_name(name) or _is_error(name):
        return False
    sure = is_secret_name(name, numbers=True) or name.isupper()
    return quoted or sure or (found["sign"] == "=" and name != "key")


def _is_error(name: str) -> bool:
    """Whether a name is a class like KeyError, which stands before its message."""
    return name.endswith(("Error", "Exception", "Warning"))


@lru_cache(maxsize=2)
def _secrets(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Values under names that say so; the longest first, so that none hides a part of another."""
    found = {
        value
        for name, value in environment
        if len(value) >= _SHORTEST and is_secret_name(name) and not os.access(value, os.F_OK)
    }
    # A file that holds the credential (HF_TOKEN_PATH) is not one.
    return tuple(sorted(found, key=len, reverse=True))
