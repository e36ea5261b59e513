"""A stand-in for the package wandb, put on the path of a tracker: it writes down what it is told.

FAKE_WANDB says how it misbehaves: `hangs` or is `broken` when a run starts, `slow` with each row,
`breaks` at the third row of its first run, `dies` there with its process, `late` when the run ends.
"""

CODE = """
import json, os, sys, time
from pathlib import Path

HOW = os.environ.get("FAKE_WANDB", "")
TOLD = Path(os.environ["FAKE_WANDB_TOLD"])
runs = 0


def tell(*what):
    with TOLD.open("a") as file:
        file.write(json.dumps(what) + "\\n")


class Settings:
    model_fields = {"console": None}

    def __init__(self, **known):
        self.base_url = "http://127.0.0.1:9"


class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.refs = name, []

    def add_reference(self, uri, checksum):
        self.refs.append([uri, checksum])


class Run:
    def __init__(self, mode, folder):
        self.offline, self.url = mode == "offline", None if mode == "offline" else "http://run"
        self.dir, self.summary, self.config, self.rows = f"{folder}/run-1-x/files", {}, self, 0

    def update(self, values, **_):
        tell("config", sorted(values))

    def define_metric(self, name, **axis):
        tell("metric", name, axis)

    def log(self, row, step, commit):
        self.rows += 1
        if HOW == "slow":
            time.sleep(0.2)
        if HOW == "breaks" and self.rows == 3 and runs == 1:
            raise ConnectionResetError("Connection lost")
        if HOW == "dies" and self.rows == 3:
            os._exit(9)
        tell("row", row["step"], step)

    def log_artifact(self, artifact, aliases):
        tell("artifact", artifact.name, artifact.refs, aliases)

    def finish(self, exit_code):
        if HOW == "late":
            time.sleep(3600)
        tell("finish", exit_code)


def init(mode, dir, **_):
    global runs
    runs += 1
    tell("init", mode)
    if HOW == "broken":
        print("for", os.environ.get("MY_LOGIN"))
        raise ConnectionResetError("Connection refused " + os.environ.get("MY_LOGIN", ""))
    if HOW == "hangs":
        time.sleep(3600)
    if HOW == "refuses" and mode == "online":
        raise RuntimeError("no")
    return Run(mode, dir)


def teardown():
    tell("teardown")
"""
