"""Weights & Biases, at arm's length: another process talks to it, this one never waits."""

from __future__ import annotations

import configparser
import importlib.util
import json
import netrc
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from ...errors import RunError
from ...redact import redact
from ..run_directory import RunDirectory, write_atomically
from ..settings import RunSettings, TrackingSettings
from .sink import Sink, StepMetrics, numbers

Mode = Literal["off", "offline", "online"]

# -P: a file of the user's folder must not stand in for a package of the same name.
TRACKER = (sys.executable, "-P", "-m", "longspan.trainer.observe.tracking_process")
_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
_MOST_PENDING_BYTES = 4 * 2**20
_LAST_UPLOAD_S = 20.0


def resolve_mode(tracking: TrackingSettings) -> Mode:
    """Where metrics go, by the recipe and by what the user set up; imports nothing of wandb's."""
    if tracking.wandb != "auto":
        return tracking.wandb
    files = _settings_files()
    mode = os.environ.get("WANDB_MODE") or files.get("mode", "")
    disabled = os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes")
    if disabled or mode == "disabled" or importlib.util.find_spec("wandb") is None:
        return "off"
    if mode in ("offline", "dryrun"):
        return "offline"
    return "online" if _has_credentials(files) else "off"


def check_tracking(tracking: TrackingSettings) -> None:
    """Find out before training that the recipe asks for tracking that cannot work.

    Raises:
        RunError: wandb is missing, or `online` without a key.
    """
    if tracking.wandb in ("online", "offline") and importlib.util.find_spec("wandb") is None:
        raise RunError(
            f"tracking.wandb is {tracking.wandb} and the package wandb is not installed",
            "pip install wandb, or set tracking.wandb: off",
        )
    if tracking.wandb == "online" and not _has_credentials(_settings_files()):
        raise RunError(
            "tracking.wandb is online and no Weights & Biases key is configured",
            "run `wandb login` or set WANDB_API_KEY, or set tracking.wandb: auto or offline",
        )


def start_tracking(
    directory: RunDirectory, run: RunSettings, attempt: int, console: Sink
) -> Tracking | None:
    """Begin to track, or None when it is off or cannot be started (which is a warning).

    Args:
        directory: Holds the W&B run id, so that a resumed run continues.
        run: The settings; they become the W&B config.
        attempt: Counts the launches of the run.
        console: Told about the run's address and about failures.
    """
    mode = resolve_mode(run.tracking)
    if mode == "off":
        return None
    try:
        return Tracking(directory, run, mode, attempt, console)
    except OSError as error:
        console.warning(f"Weights & Biases is off: {error}")
        return None


class Tracking(Sink):
    """Hands metrics to the tracker process through a pipe that never blocks."""

    def __init__(
        self, directory: RunDirectory, run: RunSettings, mode: Mode, attempt: int, console: Sink
    ) -> None:
        self._console = console
        self._log = directory.logs / "wandb.log"
        self._pending = b""
        self._tokens = 0
        self._answer = b""
        begin = {
            "id": run_id(directory),
            "project": run.tracking.project,
            "name": directory.path.name,
            "dir": str(directory.path),
            "mode": mode,
            "config": run.model_dump(mode="json"),
            "attempt": attempt,
            "pid": os.getpid(),
        }
        with self._log.open("ab") as log:
            # A session of its own: what stops the run must not cut off the last metrics.
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                TRACKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self._send("begin", begin)

    def step(self, metrics: StepMetrics) -> None:
        """Log under `train/`, with the axes `step` and `tokens`."""
        self._tokens = metrics.tokens
        fields = ["loss", "grad_norm", "lr", "tokens_per_s", "step_s", "data_s", "tflops_per_s"]
        fields += ["mfu"] if metrics.mfu is not None else []
        fields += ["context_bytes", "context_wait_s"] if metrics.context_bytes else []
        fields += ["imbalance"] if metrics.imbalance is not None else []
        fields += ["peak_bytes"] if metrics.peak_bytes is not None else []
        values = {field: getattr(metrics, field) for field in fields} | dict(metrics.losses)
        values = {f"train/{field}": value for field, value in values.items()}
        self._send("log", {"step": metrics.step, "tokens": metrics.tokens, **values})

    def observed(self, step: int, layers: Sequence[Mapping[str, float]]) -> None:
        """Log under `attention/layer_<number>/`."""
        named = {
            f"attention/layer_{number}/{key}": value
            for number, values in enumerate(layers)
            for key, value in values.items()
        }
        self._send("log", {"step": step, "tokens": self._tokens, **named})

    def alarm(self, name: str, step: int, text: str) -> None:
        """Keep the alarm with the run."""
        self._send("summary", {f"alarm/{name}": f"step {step}: {text}"})

    def evaluated(self, name: str, step: int, values: Mapping[str, Any], seconds: float) -> None:
        """Log the plain numbers under the evaluation's name."""
        named = {f"{name}/{key}": value for key, value in numbers(values).items()}
        self._send("log", {"step": step, "tokens": self._tokens, **named})

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Keep the summary with the run and mark it finished."""
        self._send("summary", dict(summary))
        self._finish(0)

    def stopped(self, step: int, reason: str) -> None:
        """Mark the run as not finished; a resumed run goes on with it."""
        self._finish(1)

    def close(self) -> None:
        """Let the tracker end; without `finished` the run is marked as failed."""
        self._finish(1)

    def _send(self, kind: str, values: Mapping[str, Any]) -> None:
        if self._process is None:
            return
        message = {"kind": kind, "values": redact(values)}
        self._pending += json.dumps(message, default=str).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        self._listen(process)
        try:
            while self._process and self._pending and (sent := process.stdin.write(self._pending)):
                self._pending = self._pending[sent:]
        except OSError:
            self._listen(process)
            self._give_up(f"its process ended; see {self._log}")
        if len(self._pending) > _MOST_PENDING_BYTES:
            self._give_up(f"its process does not keep up; see {self._log}")

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Pass on what the tracker has to say, if anything."""
        assert process.stdout is not None
        with suppress(OSError):
            self._answer += process.stdout.read() or b""
        while b"\n" in self._answer:
            line, self._answer = self._answer.split(b"\n", 1)
            kind, text = line.decode("utf-8", "replace").split(" ", 1)
            if kind == "failed":
                self._give_up(text)
            else:
                self._console.message(f"Weights & Biases: {text}")

    def _give_up(self, reason: str) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
            self._console.warning(f"Weights & Biases is off, training goes on: {reason}")

    def _finish(self, code: int) -> None:
        self._send("finish", {"code": code})
        deadline = time.monotonic() + _LAST_UPLOAD_S
        while self._pending and self._process and time.monotonic() < deadline:
            time.sleep(0.05)
            self._flush()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
            self._listen(process)
        except subprocess.TimeoutExpired:
            self._console.message("Weights & Biases: the rest is uploaded in the background")


def run_id(directory: RunDirectory) -> str:
    """The W&B id of the run: made once, then read, so that every attempt continues it."""
    path = directory.path / "wandb.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text("utf-8"))["id"])
    made = secrets.token_hex(4)
    write_atomically(path, json.dumps({"id": made}) + "\n")
    return made


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
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    base = os.environ.get("WANDB_BASE_URL") or files.get("base_url")
    hosts = [urlsplit(base).netloc] if base else _HOSTS
    return bool(files.get("api_key")) or any(host in _netrc_hosts() for host in hosts)


def _netrc_hosts() -> frozenset[str]:
    choices = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(choice).expanduser() for choice in choices if choice):
        if path.exists():
            try:
                return frozenset(netrc.netrc(path).hosts)
            except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
                return frozenset()
    return frozenset()
