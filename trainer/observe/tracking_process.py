"""The process that talks to Weights & Biases: JSON lines in, one line about the run out.

It can hang, fail or be killed; the run that feeds it goes on. When its input ends without a
`finish`, the run was killed, and it is marked as failed.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import IO, Any

from ...redact import redact_text

_START_S = 60
_UPLOAD_S = 600


def main() -> int:
    """Run until the input ends."""
    # wandb prints; our answers alone belong on stdout.
    answers, sys.stdout = sys.stdout, sys.stderr
    messages: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
    # Read ahead of wandb, so that the pipe stays empty while it starts or waits for the network.
    threading.Thread(target=_read, args=(sys.stdin, messages), daemon=True).start()
    _, begin = messages.get()
    try:
        run = _begin(begin)
    except Exception as error:
        return _answer(answers, "failed", _one_line(error)) or 1
    _answer(answers, "started", run.url or f"offline; to upload: wandb sync {Path(run.dir).parent}")
    try:
        return _follow(run, messages)
    except Exception as error:
        return _answer(answers, "failed", _one_line(error)) or 1


def _read(stream: IO[str], messages: queue.Queue[tuple[str, dict[str, Any]]]) -> None:
    for line in stream:
        try:
            message = json.loads(line)
        except ValueError:
            break
        messages.put((message["kind"], message["values"]))
    messages.put(("finish", {"code": 1}))


def _begin(begin: dict[str, Any]) -> Any:
    import wandb

    wanted = {
        "console": "off",
        "init_timeout": _START_S,
        "finish_timeout": _UPLOAD_S,
        "x_stats_pid": begin["pid"],
    }
    # Not every version knows all of these.
    known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    run = wandb.init(
        id=begin["id"],
        project=begin["project"],
        name=begin["name"],
        dir=begin["dir"],
        mode=begin["mode"],
        resume="allow",
        settings=wandb.Settings(**known),
    )
    run.config.update({**begin["config"], "attempt": begin["attempt"]}, allow_val_change=True)
    run.summary["attempt"] = begin["attempt"]
    run.define_metric("step")
    run.define_metric("tokens")
    run.define_metric("*", step_metric="step")
    return run


def _follow(run: Any, messages: queue.Queue[tuple[str, dict[str, Any]]]) -> int:
    while True:
        kind, values = messages.get()
        if kind == "log":
            run.log(values)
        elif kind == "summary":
            run.summary.update(values)
        else:
            run.finish(exit_code=values["code"])
            return 0


def _answer(stream: IO[str], kind: str, text: str) -> None:
    try:
        print(kind, text, file=stream, flush=True)
    except OSError:
        # The run is gone; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: BaseException) -> str:
    return redact_text(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    sys.exit(main())
