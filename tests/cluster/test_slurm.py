"""Slurm scripts at work: Slurm's own commands are stood in for, the scripts themselves are real."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from longspan import cli
from longspan.cluster.render.order import Order, Wanted, take
from longspan.cluster.render.slurm import render_slurm
from longspan.cluster.station import process_state

ORDER = Order(
    run_id="mine-1", name="mine", text="# The resolved recipe of mine.\nseed: 1\n",
    ranks=2, nodes=2, gpus=0, cores=1, storage="", grace_s=5,
)  # fmt: skip
SLURM = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done\nSLURM_NODEID=0 exec "$@"\n',
    "hostname": 'echo "127.0.0.1 "\n',
    "scontrol": 'echo "scontrol $*" >> "$SHIM/log"\n',
    "sleep": "exec /bin/sleep 0.01\n",
}
# A second node joins once somebody has seen that there is one only.
RAY = """
echo "ray $*" >> "$SHIM/log"
case "$*" in
  "start --head "*)
    echo $$ > "$SHIM/head.pid"
    exec "$PYTHON" -S -c 'if True:
      import signal, socket, sys
      port = next(word for word in sys.argv if word.startswith("--dashboard-port="))
      server = socket.create_server(("127.0.0.1", int(port.partition("=")[2])))
      signal.pause()' "$@" ;;
  "start --address="*)
    echo $$ > "$SHIM/node.pid"
    [[ $NODES != break ]] || exit 1
    until [[ -e "$SHIM/asked" ]]; do sleep; done
    [[ $NODES != silent ]] || exec /bin/sleep 600
    echo "joined" >> "$SHIM/log"
    touch "$SHIM/joined"
    exec /bin/sleep 600 ;;
  "list nodes "*)
    node='{"node_id": "abc", "node_ip": "10.0.0.1", "state": "ALIVE"}'
    if [[ -e "$SHIM/joined" ]]; then echo "[$node, $node]"; else echo "[$node]"; fi
    touch "$SHIM/asked" ;;
esac
"""
# A run that ends with a code when it is stopped, or of itself.
RUN = """
follow() {
  touch "$SHIM/following"
  until [[ -e "$SHIM/end" ]]; do sleep; done
  exit "$(cat "$SHIM/end")"
}
"""
LONGSPAN = f"""{RUN}
echo "longspan $*" >> "$SHIM/log"
case "$1" in
  submit) cp "$LONGSPAN_CLUSTERS" "$RECIPE" "$SHIM"; stat -c %a "$WORK/token" > "$SHIM/mode" ;;
  logs) follow ;;
  stop) echo "$STOPS_WITH" > "$SHIM/end.new"; mv "$SHIM/end.new" "$SHIM/end" ;;
esac
"""
TORCHRUN = f"""{RUN}
echo "torchrun $*" >> "$SHIM/log"
trap 'exit "$STOPS_WITH"' TERM
follow
"""


class Job:
    """A script at work, as sbatch starts it.

    Args:
        folder: For everything; its storage has a name with a blank.
        script: Makes the script of an order.
        real: Commands that are not stood in for.
        variables: More of the environment.
    """

    def __init__(self, folder: Path, script, real: tuple[str, ...] = (), **variables: str) -> None:
        self.shims, self.storage = folder / "shims", folder / "all nodes"
        self.shims.mkdir()
        self.storage.mkdir()
        both = {"ray": RAY, "longspan": LONGSPAN, "torchrun": TORCHRUN}
        for name, body in (SLURM | both).items():
            if name not in real:
                (self.shims / name).write_text("#!/bin/bash\n" + body)
                (self.shims / name).chmod(0o755)
        file = folder / "job.sh"
        file.write_text(script(replace(ORDER, storage=str(self.storage))))
        given = {
            "PATH": os.pathsep.join(
                [str(self.shims), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "SHIM": str(self.shims),
            "PYTHON": sys.executable,
            "SLURM_JOB_ID": str(job_id()),
            "RAY_ADDRESS": "elsewhere:6379",
            "STOPS_WITH": "75",
            "NODES": "",
        }
        self.process = subprocess.Popen(
            ["bash", str(file)], env={**os.environ, **given, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def log(self) -> list[str]:
        """The commands that it has given, in order."""
        return (self.shims / "log").read_text().splitlines()

    def wait_until_it_runs(self) -> None:
        """Until the run is followed."""
        while not (self.shims / "following").exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def ends(self) -> tuple[int, str]:
        """Its exit code and what it printed; nothing of it is left."""
        out, _ = self.process.communicate(timeout=60)
        assert [*(self.storage / "slurm").iterdir()] == []
        for file in self.shims.glob("*.pid"):
            while process_state(int(file.read_text())) not in ("", "Z"):
                time.sleep(0.02)
        return self.process.returncode, out


@pytest.fixture
def start(tmp_path):
    """Starts a job; what a test leaves of it is ended."""
    jobs: list[Job] = []

    def begin(*arguments, **variables: str) -> Job:
        jobs.append(Job(tmp_path, *arguments, **variables))
        return jobs[0]

    yield begin
    for job in jobs:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def job_id() -> int:
    """The number of a job whose ports are free."""
    for number in range(1 + os.getpid() % 10_000, 20_000):
        try:
            for port in (20_000 + number, 20_001 + number):
                socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return number
    raise AssertionError("no port is free")


def test_a_run_is_submitted_once_all_nodes_are_there(start):
    job = start(render_slurm)
    job.wait_until_it_runs()
    (job.shims / "end").write_text("0")
    code, out = job.ends()
    assert (code, out) == (0, "")
    words = [line.split()[:2] for line in job.log()]
    assert (
        words.index(["ray", "list"]) < words.index(["joined"]) < words.index(["longspan", "submit"])
    )
    assert words[-1] == ["longspan", "logs"] and ["scontrol", "requeue"] not in words
    cluster = yaml.safe_load((job.shims / "clusters.yaml").read_text())["clusters"]["slurm"]
    head = next(line for line in job.log() if line.startswith("ray start --head"))
    port = cluster["address"].rpartition(":")[2]
    assert f"--dashboard-host=127.0.0.1 --dashboard-port={port}" in head
    assert cluster["token"].endswith("/token") and cluster["storage"] == str(job.storage)
    assert (job.shims / "mode").read_text() == "600\n"
    assert (job.shims / "mine.yaml").read_text() == ORDER.text


@pytest.mark.parametrize("nodes", ["break", "silent"])
def test_nodes_that_do_not_come_are_told_and_not_waited_for_for_ever(start, nodes):
    job = start(render_slurm, NODES=nodes)
    job.wait_until_it_runs()
    (job.shims / "end").write_text("2")
    code, out = job.ends()
    assert code == 2 and "warning: 1 of 2 nodes have joined; the run begins when" in out
    assert not any("requeue" in line for line in job.log())


def torchrun(order: Order) -> str:
    """The script without Ray."""
    return render_slurm(order, ray=False)


@pytest.mark.parametrize("script", [render_slurm, torchrun])
@pytest.mark.parametrize(
    ("word", "code", "again"),
    [(signal.SIGUSR1, 75, True), (signal.SIGUSR1, 0, False), (signal.SIGTERM, 75, False)],
)
def test_a_notice_saves_and_the_job_is_queued_again(start, script, word, code, again):
    """A run that was complete just then need not be, and one that was cancelled must not be."""
    job = start(script, STOPS_WITH=str(code))
    job.wait_until_it_runs()
    job.process.send_signal(word)
    assert job.ends()[0] == code
    asked = [line for line in job.log() if line.startswith("scontrol")]
    assert [line.split()[1] for line in asked] == ["requeue"] * again
    assert script is torchrun or "longspan stop mine-1" in job.log()


@pytest.mark.parametrize("script", [render_slurm, torchrun])
def test_a_run_that_ends_of_itself_is_not_queued_again(start, script):
    job = start(script)
    job.wait_until_it_runs()
    (job.shims / "end").write_text("1")
    assert job.ends()[0] == 1
    assert not any(line.startswith("scontrol") for line in job.log())


def test_a_script_with_torchrun_trains_and_cleans_up(start, tmp_path):
    """All that the script starts is real here."""
    order = take(Wanted("smoke", ["ranks=1", "stages.1.parallel.context=1",
                                  "tracking.wandb=off", "stages.0.tokens=1K", "stages.1.tokens=1K",
                                  "evaluation.documents=0"],
                        storage="/shared", nodes=1, cores=1, run_id="smoke-1"))  # fmt: skip
    job = start(
        lambda ours: torchrun(replace(order, storage=ours.storage)),
        ("torchrun", "longspan", "sleep"),
        PYTHONPATH=str(Path(cli.__file__).parents[1]),
        LONGSPAN_HOME=str(tmp_path / "home"),
    )
    code, out = job.ends()
    assert code == 0, out[-5000:]
    assert (job.storage / "runs" / "smoke-1" / "complete.json").exists()
    assert not (job.shims / "log").exists()
