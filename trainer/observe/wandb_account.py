"""The Weights & Biases account: what the user set up, found as wandb finds it, and if it works.

Nothing here imports wandb but `server`, for processes of their own.
"""

from __future__ import annotations

import base64
import configparser
import importlib.util
import json
import netrc
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

from ...errors import RunError
from ...redact import HIDDEN_NAMES, hidden_names
from ..settings import TrackingSettings

Mode = Literal["off", "offline", "online"]
Answer = Literal["accepted", "rejected", "unreachable", "unknown"]

# -P: a file of the user's folder must not stand in for a package of the same name.
PROBE = (sys.executable, "-P", "-m", "longspan.trainer.observe.wandb_account")
KEY = "WANDB_API_KEY"
"""The environment variable that holds the key."""

_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_ANSWER_S = 5.0
_PROBE_S = 20.0
_QUERY = b'{"query": "query Viewer { viewer { id } }"}'
_REJECTED = (401, 403)


def resolve_mode(tracking: TrackingSettings) -> Mode:
    """Where metrics go, by the recipe and by what the user set up; imports nothing of wandb's."""
    if tracking.wandb in ("off", "offline"):
        return tracking.wandb
    files = _settings_files()
    mode = os.environ.get("WANDB_MODE") or files.get("mode", "")
    if mode in ("offline", "dryrun") and importlib.util.find_spec("wandb") is not None:
        return "offline"
    if tracking.wandb == "online":
        return "online"
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    if disabled or mode == "disabled" or importlib.util.find_spec("wandb") is None:
        return "off"
    return "online" if _has_credentials(files) else "off"


def check_tracking(tracking: TrackingSettings) -> None:
    """Find out before training that the recipe asks for tracking that cannot work.

    Raises:
        RunError: A package is missing, or `online` without a key or with one that is rejected.
    """
    check_set_up(tracking)
    check_key(tracking)


def check_set_up(tracking: TrackingSettings) -> None:
    """Find out what is missing here for the tracking that the recipe asks for; asks no server.

    Raises:
        RunError: A package is missing, or `online` without a key.
    """
    wandb = tracking.wandb in ("online", "offline")
    for package, wanted, setting in (
        ("wandb", wandb, f"wandb is {tracking.wandb}"),
        ("tensorboardX", tracking.tensorboard, "tensorboard is true"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise RunError(
                f"tracking.{setting} and the package {package} is not installed",
                f"pip install {package}, or set tracking: none",
            )
    if _is_online(tracking) and not _has_credentials(_settings_files()):
        raise RunError(
            "tracking.wandb is online and no Weights & Biases key is configured",
            f"{key_fix()}, or set tracking.wandb: auto or offline",
        )


def check_key(tracking: TrackingSettings) -> None:
    """Ask the server for its opinion of the key that is here, where the recipe insists on one.

    Raises:
        RunError: It is rejected.
    """
    if _is_online(tracking) and ask() == "rejected":
        raise RunError(
            f"Weights & Biases rejects the key that {key_source()} holds",
            f"{key_fix(rejected=True)}, or set tracking.wandb: offline",
        )


def has_own_key() -> bool:
    """Whether this process can track with a key of its environment, not one of a file."""
    return bool(os.environ.get(KEY)) and importlib.util.find_spec("wandb") is not None


def _is_online(tracking: TrackingSettings) -> bool:
    return tracking.wandb == "online" and resolve_mode(tracking) == "online"


def key_fix(*, rejected: bool = False) -> str:
    """How to give a key, here or on a cluster.

    Args:
        rejected: There is one, which is not valid.
    """
    if HIDDEN_NAMES in os.environ:
        valid = "a valid key" if rejected else "the key"
        return (
            f"name a file on the nodes that holds {valid} as {KEY} in `secrets` of the cluster "
            "in clusters.yaml"
        )
    if rejected:
        return f"run `wandb login --relogin` or set {KEY} to a key that is valid"
    return f"run `wandb login` or set {KEY}"


def ask() -> Answer:
    """Whether the server takes the key, asked by a process that may import wandb.

    It takes a second or two, and never longer than 20 s.
    """
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(PROBE, capture_output=True, text=True, timeout=_PROBE_S)
        for answer in get_args(Answer):
            if done.stdout.strip() == answer:
                return answer
    return "unknown"


def probe(base_url: str) -> Answer:
    """Whether the server takes the key; `unknown` where only wandb itself could tell."""
    if (key := _key(base_url)) is None:
        return "unknown"
    token = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{base_url.rstrip('/')}/graphql",
        data=_QUERY,
        headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as response:
            viewer = json.load(response)["data"]["viewer"]
    except urllib.error.HTTPError as error:
        return "rejected" if error.code in _REJECTED else "unknown"
    except OSError:
        return "unreachable"
    except (ValueError, KeyError, TypeError):
        return "unknown"
    return "accepted" if viewer else "rejected"


def server() -> str:
    """The server that wandb would talk to; imports wandb for its default alone.

    Settings made by themselves know nothing of the environment and of files.
    """
    import wandb

    base_url = os.environ.get("WANDB_BASE_URL") or _settings_files().get("base_url")
    return base_url or str(wandb.Settings().base_url)


def key_source() -> str:
    """Where the key is from, for messages."""
    if os.environ.get(KEY):
        secret = KEY in hidden_names(os.environ)
        return f"the {'secret of the cluster' if secret else 'environment variable'} {KEY}"
    return "the settings file of wandb" if _settings_files().get("api_key") else "~/.netrc"


def _key(base_url: str) -> str | None:
    """The key that wandb would use for a server."""
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    found = os.environ.get(KEY) or _settings_files().get("api_key")
    return found or _netrc_passwords().get(urlsplit(base_url).netloc)


def _settings_files() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and the like wrote; the folder's file wins."""
    home = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    here = Path(os.environ.get("WANDB_DIR") or ".")
    parser = configparser.ConfigParser(interpolation=None, default_section="default")
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        parser.read([home / "settings", here / "wandb" / "settings"], "utf-8")
    return dict(parser.defaults())


def _has_credentials(files: Mapping[str, str]) -> bool:
    """Whether wandb would find a key: in the environment, the netrc file or its settings."""
    if os.environ.get(KEY) or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.environ.get("WANDB_BASE_URL") or files.get("base_url")
    hosts = [urlsplit(base).netloc] if base else _HOSTS
    return bool(files.get("api_key")) or any(host in _netrc_passwords() for host in hosts)


def _netrc_passwords() -> dict[str, str]:
    """Passwords by host, of the first netrc file that there is."""
    choices = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(choice).expanduser() for choice in choices if choice):
        try:
            if not path.exists():
                continue
            hosts = netrc.netrc(path).hosts
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
            return {}
        return {host: password or "" for host, (_, _, password) in hosts.items()}
    return {}


def main() -> None:
    """Print the answer for the server that wandb would talk to."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(probe(server()), file=answers)


if __name__ == "__main__":
    main()
