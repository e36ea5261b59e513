"""Interrupted: patches for launches that print credentials and are stopped, killed, or fail.

Ranks are forked from the launcher, so that a patch of the launcher is one of its ranks.
"""

import netrc
import os
import signal
import sys
import time
from pathlib import Path

VARIABLES = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "aws_secret_access_key",
    "Service_Password",
    "myAuthToken",
)
STOPPED_AT, KILLED_AT, FAILED_AT = 3, 7, 7
_LATE_S = 60


def plant(home: Path) -> tuple[dict[str, str], list[str]]:
    """Fake keys of every kind: an environment that has them, and the keys."""
    letters = "0123456789abcdef0123456789abcdef01234567"
    keys = [f"{number}{letters[1:]}"[:40] for number in "123456789"]
    variables = dict(zip(VARIABLES, keys, strict=False))
    by_file, in_netrc, in_settings = keys[len(VARIABLES) : len(VARIABLES) + 3]
    (home / "key").write_text(by_file + "\n")
    (home / ".netrc").write_text(f"machine api.wandb.ai login user password {in_netrc}\n")
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text(f"[default]\napi_key = {in_settings}\n")
    files = {"STORE_SECRET_PATH": str(home / "key"), "HOME": str(home)}
    return variables | files, [*variables.values(), by_file, in_netrc, in_settings]


def found_keys() -> list[str]:
    """The keys as a program finds them that is careless with them."""
    home = Path.home()
    hosts = netrc.netrc(home / ".netrc").hosts.values()
    settings = (home / ".config" / "wandb" / "settings").read_text().split()[-1]
    named = [os.environ[name] for name in VARIABLES]
    return [*named, Path(os.environ["STORE_SECRET_PATH"]).read_text().strip(),
            *(password for *_, password in hosts if password), settings]  # fmt: skip


def completes() -> None:
    """Print the keys in every step, by Python and past it."""
    _at_step(lambda step: None)


def is_stopped() -> None:
    """Rank 0 asks its launcher to stop, and goes on when it was asked itself."""

    def stop(step: int) -> None:
        if step == STOPPED_AT and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)

    _at_step(stop)


def is_killed() -> None:
    """Rank 0 kills its launcher, which takes all ranks along."""

    def kill(step: int) -> None:
        if step == KILLED_AT and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(_LATE_S)

    _at_step(kill)


def fails() -> None:
    """Rank 1 fails with the keys in its message and its traceback."""

    def fail(step: int) -> None:
        if step == FAILED_AT and os.environ["RANK"] == "1":
            raise ConnectionError(f"refused: {' '.join(found_keys())}")

    _at_step(fail)


def _at_step(act) -> None:
    """Call `act` with the step on every rank, after rank 0 has told of it."""
    from longspan.trainer.observe import tracking_pipe
    from longspan.trainer.stage_loop import StageLoop

    tracking_pipe.LAST_UPLOAD_S = 60.0  # the last lines of an attempt, however busy the machine is
    real = StageLoop._report

    def report(self, pending, ended):
        real(self, pending, ended)
        keys = " ".join(found_keys())
        print(f"step {pending.cursor.step}: {keys}", flush=True)
        os.write(2, f"past Python: {keys}\n".encode())
        print("no end of line:", keys, end="", file=sys.stderr, flush=True)
        act(pending.cursor.step)

    StageLoop._report = report
