"""Redaction: credentials are replaced by `***` wherever settings, events or errors are written.

Three things are taken for a credential: a value under a name that says so (`api_key`, `hfToken`,
`SECRET`), a part of a URL (`scheme://user:password@host`, `?X-Amz-Signature=`), and in text
anything that stands in the environment under such a name or under one that HIDDEN_NAMES lists, or
in the files of the home directory in which tools keep credentials.
"""

from __future__ import annotations

import configparser
import json
import netrc
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

HIDDEN = "***"
HIDDEN_NAMES = "LONGSPAN_HIDDEN"
"""The environment variable with the names of others, between commas, that hold credentials
whatever they are called; processes inherit it with them."""

SHORTEST = 8
"""Characters: shorter values of the environment are words like `true`, and would garble text."""

_LARGEST = 2**14  # bytes of a file that holds a credential and not much else
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
_URL_PARTS = re.compile(r"[/:@?&=;#]")
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


def known_credentials(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The places of plain values that hold a credential of this machine.

    What only HIDDEN_NAMES takes for one may be an ordinary word, such as a login or a region: it
    has to be the whole value, or a part of a URL.

    Yields:
        The dotted path, and where the credential is from: a variable or a file.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from known_credentials(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from known_credentials(item, f"{path}.{index}")
    elif isinstance(value, str):
        parts = {value, *(_URL_PARTS.split(value) if "://" in value else ())}
        for secret, (source, sure) in _known(tuple(os.environ.items())).items():
            if secret in parts or (sure and secret in value):
                yield path, source


def _secrets(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    return tuple(_known(environment))


@lru_cache(maxsize=2)
def _known(environment: tuple[tuple[str, str], ...]) -> dict[str, tuple[str, bool]]:
    """Credentials of this machine, where they are from, and whether more than HIDDEN_NAMES says
    that they are some; the longest first, so that none hides a part of another."""
    found = [(value, source, True) for value, source in _of_home(dict(environment))]
    hidden = hidden_names(dict(environment))
    for name, value in environment:
        if name not in hidden and not is_secret_name(name):
            continue
        is_file = os.access(value, os.F_OK)
        if is_file:
            found += [(_first_line(Path(value)), value, True)]
        # A file that holds the credential (HF_TOKEN_PATH) is not one; what it holds is.
        if not is_file or name in hidden:
            source = f"the environment variable {name}"
            sure = is_secret_name(name) or "\n" in value  # no word has lines
            found += [(part, source, sure) for part in _parts(value)]
    found.sort(key=lambda one: one[2])  # of several sources the surest counts
    long = {value: (source, sure) for value, source, sure in found if len(value) >= SHORTEST}
    return {value: long[value] for value in sorted(long, key=len, reverse=True)}


def hidden_names(environment: Mapping[str, str]) -> list[str]:
    """The variables that HIDDEN_NAMES lists; none where it is not set."""
    return [name for name in environment.get(HIDDEN_NAMES, "").split(",") if name]


def _parts(value: str) -> Iterator[str]:
    """A credential, and what of it may be printed by itself: lines, secrets of a JSON key file."""
    yield value
    # A key in a JSON file has its ends of lines as two characters, and shows real ones elsewhere.
    yield from (line.strip() for line in re.split(r"\\n|[\r\n]+", value))
    pairs: list[tuple[str, Any]] = []
    with suppress(ValueError, RecursionError):
        json.loads(value, object_pairs_hook=pairs.extend)
    yield from (item for name, item in pairs if isinstance(item, str) and is_secret_name(name))


def _of_home(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What netrc files, Weights & Biases, Hugging Face, AWS and Ray keep in the home directory."""
    home = Path(environment.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111, never raises
    for path in (environment.get("NETRC", ""), home / ".netrc", home / "_netrc"):
        with suppress(netrc.NetrcParseError, OSError, UnicodeDecodeError, RuntimeError):
            file = Path(path).expanduser()
            for _, _, password in netrc.netrc(file).hosts.values() if path else ():
                yield password or "", str(path)
    wandb = Path(environment.get("WANDB_CONFIG_DIR") or home / ".config" / "wandb")
    with suppress(RuntimeError):
        wandb = wandb.expanduser()
    here = Path(environment.get("WANDB_DIR") or ".") / "wandb"
    aws = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials")
    for path in (wandb / "settings", here / "settings", aws):
        parser = configparser.ConfigParser(interpolation=None, default_section="default")
        with suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(path, "utf-8")
        for section in ("default", *parser.sections()):
            for name, value in parser[section].items():
                if is_secret_name(name):
                    yield value, str(path)
    hugging_face = Path(environment.get("HF_HOME") or home / ".cache" / "huggingface")
    for path in (hugging_face / "token", home / ".ray" / "auth_token"):
        yield _first_line(path), str(path)


def _first_line(path: Path) -> str:
    """Of a small file; empty where there is none."""
    with suppress(OSError, UnicodeDecodeError):
        if path.is_file() and path.stat().st_size <= _LARGEST:
            line = path.read_text("utf-8").strip().partition("\n")[0].strip()
            # The head of a section or of a key is no credential.
            return "" if line.startswith(("[", "-----BEGIN")) else line
    return ""
