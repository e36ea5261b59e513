"""Which interface ranks use: patterns as NCCL takes them, one whole name for gloo."""

import socket
import sys
from types import SimpleNamespace

import psutil
import pytest
from longspan.cluster.interfaces import Interface, find_interface
from longspan.cluster.limits import Limits
from longspan.cluster.rank import Rank, Task
from longspan.cluster.settings import ClusterSettings
from longspan.cluster.station import Station
from longspan.cluster.watch import Assignment
from longspan.errors import RunError
from longspan.trainer.recovery_settings import HangSettings
from pydantic import ValidationError

NODE = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5", "eth1": "10.1.0.5",
        "eth10": "10.2.0.5", "ib0": "10.3.0.5"}  # fmt: skip
OWN = "10.1.0.5"


@pytest.fixture
def node(monkeypatch):
    """A node with several networks."""
    found = {name: [SimpleNamespace(family=socket.AF_INET6, address="fe80::1"),
                    SimpleNamespace(family=socket.AF_INET, address=address)]
             for name, address in NODE.items()}  # fmt: skip
    found["eth9"] = [SimpleNamespace(family=socket.AF_PACKET, address="aa:bb")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


def test_of_several_addresses_of_an_interface_the_nodes_own_is_taken(monkeypatch):
    found = [SimpleNamespace(family=socket.AF_INET, address=one) for one in ("10.1.0.9", OWN)]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth1": found})
    assert find_interface(None, OWN) == find_interface("eth", OWN) == Interface("eth1", OWN)
    assert find_interface("eth", "10.9.0.1") == Interface("eth1", "10.1.0.9")


@pytest.mark.parametrize(("wanted", "name"), [
    (None, "eth1"), ("eth1", "eth1"), ("=eth0", "eth0"), ("ib", "ib0"),
    ("eth", "eth1"), ("eth0,eth1", "eth1"), ("=eth10,ib0", "eth10"), ("ib0:1", "ib0"),
    ("^docker0,lo", "eth1"), ("^docker,eth", "ib0"), ("^=eth1,ib0", "docker0"),
    ("lo", "lo"), ("^docker0,ib,eth", "lo"),
])  # fmt: skip
def test_a_pattern_stands_for_one_interface(node, wanted, name):
    assert find_interface(wanted, OWN) == Interface(name, NODE[name])


def test_what_is_not_there_is_named(node):
    with pytest.raises(OSError, match=r"no interface =eth with an IPv4 .* there is .*ib0"):
        find_interface("=eth", OWN)
    with pytest.raises(OSError, match="no interface eth9"):
        find_interface("eth9", OWN)
    assert find_interface(None, "192.0.2.9") == Interface(None, "192.0.2.9")


def variables(monkeypatch, tmp_path, wanted, host, own=OWN, bound=True):
    """What a rank hands to NCCL and gloo, and the place that it tells the others."""
    told = []
    given = Assignment(0, 1, 1, host, 29500, "go on", "")
    ray = SimpleNamespace(
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "0" * 56),
        util=SimpleNamespace(get_node_ip_address=lambda: own),
        get=lambda answer, timeout: given,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)

    def free_port(*addresses):
        if not bound:
            raise OSError("no such address")
        return addresses

    monkeypatch.setattr("longspan.cluster.rank.free_port", free_port)
    monkeypatch.setattr("longspan.cluster.station.tempfile.gettempdir", lambda: str(tmp_path))
    watch = SimpleNamespace(join=SimpleNamespace(remote=lambda attempt, place: told.append(place)))
    limits = Limits(HangSettings())
    task = Task(str(tmp_path), 1, watch, 1.0, limits, 1.0, interface=wanted)
    rank = Rank(task, 0, 2)
    rank._station = Station(tmp_path, 1, "0" * 56)
    environment = rank._environment(rank._join())
    return {name: value for name, value in environment.items() if "IFNAME" in name}, told[0]


def test_ranks_get_a_pattern_for_nccl_and_a_name_for_gloo(node, monkeypatch, tmp_path):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    found, place = variables(monkeypatch, tmp_path, "^docker0,eth", "10.3.0.5")
    assert found == {"NCCL_SOCKET_IFNAME": "^docker0,eth", "GLOO_SOCKET_IFNAME": "ib0"}
    # Where the ranks would meet is on that network, too.
    assert place.address == "10.3.0.5" and place.port == ("10.3.0.5", "127.0.0.1")
    found, place = variables(monkeypatch, tmp_path, None, OWN)
    assert (found, place.address) == ({"GLOO_SOCKET_IFNAME": "eth1"}, OWN)
    with pytest.raises(RunError, match=r"no interface wlan .*\n.*fix: name one that every node"):
        variables(monkeypatch, tmp_path, "wlan", OWN)
    with pytest.raises(RunError, match=r"no such address .*\n.*fix: name one that every node"):
        variables(monkeypatch, tmp_path, "ib", OWN, bound=False)


def test_ranks_of_one_machine_listen_on_loopback(monkeypatch, tmp_path):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    found, _ = variables(monkeypatch, tmp_path, None, "127.0.0.1")
    assert psutil.net_if_addrs()[found["GLOO_SOCKET_IFNAME"]][0].address == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    for host in ("127.0.0.1", OWN):
        assert variables(monkeypatch, tmp_path, None, host)[0] == {"GLOO_SOCKET_IFNAME": "mine"}


@pytest.mark.parametrize(
    "wanted", ["eth0", "=eth0,eth1", "^docker0,lo", "^=lo", "br-1.2", "eth0:1"]
)
def test_settings_take_names_and_patterns(wanted):
    given = {"address": "http://h:8265", "storage": "/s"}
    assert ClusterSettings(**given, interface=wanted).interface == wanted
    for wrong in ("a b", "eth0,", "eth0^", "", "=", "^", "a;b"):
        with pytest.raises(ValidationError):
            ClusterSettings(**given, interface=wrong)
