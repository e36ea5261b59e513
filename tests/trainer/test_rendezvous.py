"""Where ranks listen: on loopback alone in a local run, and again on a port that was used."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil
from longspan.trainer.loopback import keep_to_loopback

RANK = """
import gc
from datetime import timedelta
import psutil, torch, torch.distributed as dist
from longspan.trainer.rendezvous import meet

for _ in range(2):
    meet("gloo", timedelta(seconds=60))
    group = dist.new_group(backend="gloo")
    number = torch.ones(1)
    dist.all_reduce(number, group=group)
    sockets = psutil.Process().net_connections("inet")
    hosts = {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    dist.barrier()
    dist.destroy_process_group()
    del group
    gc.collect()  # the store goes with the last of its groups
    print(int(number), *sorted(hosts), flush=True)
"""
SMOKE = ["train", "smoke", "--set", "stages.0.tokens=2K", "--set", "stages.1.tokens=2K",
         "--set", "evaluation.documents=0", "--set", "tracking=none"]  # fmt: skip


def looked_at(process: psutil.Process) -> tuple[set[str], set[str]]:
    """Where a process listens, and which interface it was given if it is a rank."""
    with suppress(psutil.Error):
        sockets = process.net_connections("inet")
        environment = process.environ()
        given = {environment.get("GLOO_SOCKET_IFNAME", "")} if "RANK" in environment else set()
        return {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}, given
    return set(), set()


def test_a_local_run_listens_on_loopback_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    environment |= {"LONGSPAN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "longspan.cli", *SMOKE, "--run-dir", str(tmp_path / "run")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hosts: set[str] = set()
    given: set[str] = set()
    launcher = psutil.Process(run.pid)
    while run.poll() is None:
        with suppress(psutil.Error):
            for process in [launcher, *launcher.children(recursive=True)]:
                found = looked_at(process)
                hosts |= found[0]
                given |= found[1]
        time.sleep(0.2)
    assert run.returncode == 0, run.communicate()[1]
    assert hosts == {"127.0.0.1"}
    # By itself gloo listens where the machine's name leads, which need not be elsewhere.
    assert given and given <= {"lo", "lo0"}


def test_ranks_meet_twice_on_the_same_port_and_listen_nowhere_else():
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    keep_to_loopback(environment)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK], env={**environment, "RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert out.splitlines() == ["2 127.0.0.1"] * 2, err


def test_an_interface_that_is_named_stays():
    named = {"GLOO_SOCKET_IFNAME": "eth7"}
    keep_to_loopback(named)
    assert named == {"GLOO_SOCKET_IFNAME": "eth7"}
    nothing: dict[str, str] = {}
    keep_to_loopback(nothing)
    assert nothing["GLOO_SOCKET_IFNAME"] in psutil.net_if_addrs()
