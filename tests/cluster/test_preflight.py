"""Preflight on a real cluster: of four nodes one has another version, and one hangs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import raylet

LOOK = Path(__file__).parents[1] / "support" / "look.py"
VERSION = "0.0.1"


@pytest.fixture
def other_version(tmp_path):
    """The environment of a node that finds another megatron-core first."""
    about = tmp_path / "other" / f"megatron_core-{VERSION}.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {VERSION}\n")
    return {"PYTHONPATH": f"{tmp_path / 'other'}{os.pathsep}{os.environ['PYTHONPATH']}"}


@pytest.fixture
def broken(cluster, other_version):
    """Two more nodes: one with another version, and one to be stopped."""
    inside = cluster._cluster
    found = [
        inside.add_node(num_cpus=cluster.cores, env_vars=variables, **cluster._common)
        for variables in (other_version, {})
    ]
    yield found
    with contextlib.suppress(ProcessLookupError):
        os.kill(raylet(found[1]).pid, signal.SIGCONT)
    for node in found:
        inside.remove_node(node, allow_graceful=False)


def test_broken_nodes_are_named_and_the_others_are_fit(cluster, broken, tmp_path):
    wrong, hanging = (node.node_id for node in broken)
    command = [sys.executable, "-P", str(LOOK), str(tmp_path), str(raylet(broken[1]).pid)]
    done = subprocess.run(
        command, env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = json.loads((tmp_path / "preflight.json").read_text())["looks"]
    assert report["versions"]["megatron-core"] != VERSION
    assert len(report["nodes"]) == 4 and report["seconds"] < 60
    assert sorted(report["healthy"]) == sorted(node.node_id for node in cluster.nodes)

    names = {node["id"]: node["name"] for node in report["nodes"]}
    failed = {(r["node"], r["check"]): r for r in report["results"] if r["level"] == "fail"}
    assert set(failed) == {(names[wrong], "versions"), (names[hanging], "answer")}
    assert failed[names[wrong], "versions"]["found"] == f"megatron-core {VERSION}"
    passed = {(r["node"], r["check"]) for r in report["results"] if r["level"] != "fail"}
    for node in report["healthy"]:
        for check in ("versions", "devices", "clock", "disk", "network", "storage"):
            assert (names[node], check) in passed
        assert (names[node], "bandwidth between") in passed
    # A node that is out measures nothing, and nothing of preflight is left in the folder.
    assert (names[wrong], "bandwidth between") not in passed
    assert [*Path(tmp_path).glob(".preflight-*")] == []

    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").open()]
    assert event["event"] == "preflight" and len(event["problems"]) >= 2
