"""The same verbs against Ray itself: two nodes on loopback, and a driver that only pretends."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import longspan
import pytest
from longspan.cluster import stop, submission, wheel
from longspan.cluster.clusters import find_cluster
from longspan.cluster.jobs import Jobs

ROOT = Path(longspan.__file__).parent
LEFT_OUT = (".*", "tests", "benchmarks", "docs", "runs", "build", "dist", "wandb", "__pycache__")
TOKEN = "0123456789abcdef" * 4
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

port = int(sys.argv[1])
common = {"object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1"}
common["dashboard_agent_listen_port"] = 0  # both nodes have one address
head = {"num_cpus": 0, "dashboard_host": "127.0.0.1", "dashboard_port": port}
head = {**common, **head, "include_dashboard": True}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=2, **common)
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
"""
DRIVER = '''
"""Says what it was given, and saves when it is asked to stop."""

import os, signal, sys, time
from pathlib import Path
import longspan

def save(*_):
    time.sleep(1)
    print("saved", flush=True)
    os._exit(75)

signal.signal(signal.SIGTERM, save)
print("package", Path(longspan.__file__).parent, flush=True)
print("arguments", sys.argv[1:], flush=True)
print(Path(sys.argv[-1]).read_text()[:40], flush=True)
print("key", os.environ.get("WANDB_API_KEY"), flush=True)
if "--from" in sys.argv:
    sys.exit(0)
time.sleep(120)
'''


@pytest.fixture(scope="module")
def ray_address():
    """The dashboard of a cluster of a head and a node, which asks for a token."""
    folder = tempfile.mkdtemp(prefix="lsc-")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Where drivers look for the newest cluster of the machine: there may be others.
        "RAY_TMPDIR": folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback is the address of a node
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        address = f"http://127.0.0.1:{port}"
        wait_for_dashboard(address)
        yield address
        process.communicate("")
    shutil.rmtree(folder, ignore_errors=True)


def wait_for_dashboard(address: str) -> None:
    """Its parts start one after the other."""
    request = urllib.request.Request(f"{address}/api/jobs/")
    request.add_header("Authorization", f"Bearer {TOKEN}")
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=60).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)


@pytest.fixture
def ray_lab(ray_address, clusters, storage, tmp_path, monkeypatch):
    """That cluster, named lab, to which a package with the pretending driver is sent."""
    (tmp_path / "token").write_text(TOKEN)
    clusters(lab={"address": ray_address, "storage": str(storage), "token": f"{tmp_path}/token",
                  "secrets": {"WANDB_API_KEY": "/etc/key"}})  # fmt: skip
    ignored = shutil.ignore_patterns(*LEFT_OUT)
    copy = Path(shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored))
    (copy / "cluster" / "driver.py").write_text(DRIVER)
    monkeypatch.setattr(submission, "build_wheel", lambda: wheel.build_wheel(copy))
    monkeypatch.setattr(stop, "_POLL_S", 0.2)
    return Jobs(find_cluster("lab"))


def wait_for_output(longspan, run_id: str, text: str) -> str:
    deadline = time.monotonic() + 60
    while text not in (out := longspan("logs", run_id)[1]):
        assert time.monotonic() < deadline, longspan("status", run_id)
        time.sleep(0.3)
    return out


def test_submit_logs_stop_and_resume(longspan, ray_lab, storage, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-hunter2")
    code, out, err = longspan("submit", "smoke", "--run-id", "mine")
    assert code == 0 and "ranks    2, one per CPU core, on 1 node with 2 CPU cores" in out, err
    out = wait_for_output(longspan, "mine", "key None")
    package = next(line for line in out.splitlines() if line.startswith("package "))
    assert "py_modules_files" in package and str(ROOT) not in package
    assert "arguments ['--run-id', 'mine', '--run-dir'" in out
    assert "# The resolved recipe of smoke.\n" in out
    assert "--secrets', 'WANDB_API_KEY=***" in out
    assert longspan("status", "mine")[1].startswith("mine: running\n  cluster lab, job mine-1 run")
    assert "was submitted before" in longspan("submit", "smoke", "--run-id", "mine")[1]
    assert [job.id for job in ray_lab.of_run("mine")] == ["mine-1"]
    assert longspan("resume", "mine")[0] == 2

    code, out, _ = longspan("stop", "mine")
    assert code == 0 and "mine has stopped\n" in out
    assert longspan("logs", "mine")[1].endswith("saved\n")  # Ray would have killed it at once
    assert "is not running" in longspan("stop", "mine")[2]

    assert longspan("resume", "mine", "--from", "4")[1].startswith("submitted mine-2\n")
    code, out, err = longspan("logs", "-f", "mine")
    assert code == 0 and err == "\nmine: complete\n"
    assert "Running entrypoint" not in out and out.count("'--from', '4'") == 1
    assert [job.status for job in ray_lab.of_run("mine")] == ["STOPPED", "SUCCEEDED"]


def test_what_ray_says_to_strangers(longspan, ray_lab, ray_address, storage, monkeypatch, tmp_path):
    url = ("--cluster", ray_address, "--storage", str(storage))
    (tmp_path / "clusters.yaml").unlink()
    assert "asks for a token, and none was found" in longspan("submit", "smoke", *url)[2]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    assert "refuses the token from $RAY_AUTH_TOKEN" in longspan("submit", "smoke", *url)[2]
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    code, _, err = longspan("submit", "smoke", *url, "--set", "ranks=4")
    assert code == 2 and "at most 2 CPU cores" in err
    shown = str(ray_lab.door.ask("GET", "/api/jobs/").value())
    assert "hunter2" not in shown and TOKEN not in shown
