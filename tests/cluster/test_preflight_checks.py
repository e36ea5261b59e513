"""The checks of preflight, one by one: what they find on files and sockets, and how they judge."""

import http.server
import json
import socket
import threading
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import longspan
import pytest
from longspan.cluster import needs
from longspan.cluster.nodes import Node
from longspan.cluster.preflight import (
    child,
    clock,
    dashboard,
    disk,
    network,
    storage,
    versions,
)
from longspan.cluster.preflight.links import cut_off
from longspan.cluster.preflight.report import Report, healthy
from longspan.cluster.preflight.result import Result
from longspan.errors import RunError
from longspan.trainer.settings import TrackingSettings
from support.short_run import short_run

SAME = {"python": "3.11.7", "longspan": "aa", "torch": "2.10", "CUDA driver": "570"}


def level_of(results, node):
    (result,) = [result for result in results if result.node == node]
    return result.level, result.found, result.fix


def test_most_nodes_decide_what_is_installed_but_the_driver_what_starts():
    other = {**SAME, "torch": "2.11"}
    nodes = {"a": SAME, "b": other, "c": SAME}
    results = list(versions.judge(nodes, versions.reference(nodes, other)))
    assert level_of(results, "a")[0] == level_of(results, "c")[0] == "ok"
    assert level_of(results, "b")[:2] == ("fail", "torch 2.11")
    old = {"a": {**SAME, "longspan": "old"}, "b": {**SAME, "longspan": "old"}}
    results = list(versions.judge(old, versions.reference(old, SAME)))
    assert [result.level for result in results] == ["fail", "fail"]
    assert "remove longspan" in results[0].fix


def test_another_cuda_driver_is_a_warning_and_a_tie_is_decided_by_ours():
    nodes = {"a": SAME, "b": {**SAME, "CUDA driver": "580"}}
    results = list(versions.judge(nodes, versions.reference(nodes, SAME)))
    assert level_of(results, "a")[0] == "ok"
    assert level_of(results, "b")[:2] == ("warn", "CUDA driver 580")


def test_nodes_that_come_later_have_to_be_like_those_in_use():
    newer = {**SAME, "torch": "2.11"}
    assert next(iter(versions.judge({"late": newer}, SAME))).level == "fail"
    assert next(iter(versions.judge({"late": SAME}, SAME))).level == "ok"


def test_what_is_missing_is_a_failure_also_where_it_is_missing_everywhere():
    bare = {**SAME, "torch": "missing", "megatron-core": "missing", "ray": "2.52.1"}
    nodes = {"a": bare, "b": bare}
    results = list(versions.judge(nodes, versions.reference(nodes, bare)))
    assert [result.level for result in results] == ["fail", "fail"]
    assert results[0].found == "megatron-core missing, torch missing"
    assert results[0].fix == (
        "on the node: pip install 'megatron-core>=0.16.1,<0.20' 'torch>=2.10'"
    )
    # Where others have it, theirs is wanted; a driver without what only ranks need is none of it.
    full = {**SAME, "torch": "2.13.0+cpu", "ray": "2.52.1", "megatron-core": "0.16.1"}
    nodes = {"a": full, "b": full, "c": {**full, "torch": "missing", "tokenizers": "missing"}}
    results = list(versions.judge(nodes, versions.reference(nodes, bare)))
    assert [result.level for result in results] == ["ok", "ok", "fail"]
    assert results[2].fix == "on the node: pip install 'tokenizers>=0.21' torch==2.13.0"
    # However many are bare: they do not outvote the one that ranks could start on.
    nodes = {"a": full, "b": {**bare, "triton": "3.6"}, "c": {**bare, "triton": "3.6"}}
    results = list(versions.judge(nodes, versions.reference(nodes, {**bare, "triton": "3.6"})))
    assert [result.level for result in results] == ["ok", "fail", "fail"]
    assert results[1].fix.endswith("pip install megatron-core==0.16.1 torch==2.13.0")


def test_a_node_without_a_tracker_is_a_warning_where_metrics_are_expected(monkeypatch):
    monkeypatch.delenv("LONGSPAN_HIDDEN", raising=False)
    has, lacks = {**SAME, "wandb": "0.30"}, {**SAME, "wandb": "missing"}
    mixed, none = {"a": has, "b": lacks}, {"a": lacks, "b": lacks}

    def warned(nodes, mode):
        results = list(versions.judge_tracking(nodes, TrackingSettings(wandb=mode)))
        assert all(result.level == "warn" for result in results)
        return [result.node for result in results]

    assert [warned(none, mode) for mode in ("online", "offline")] == [["a", "b"]] * 2
    assert warned(mixed, "auto") == ["b"] and warned(none, "auto") == []
    assert warned(mixed, "off") == []
    monkeypatch.setenv("LONGSPAN_HIDDEN", "OTHER,WANDB_API_KEY")
    assert warned(none, "auto") == ["a", "b"]
    # The ranks need not have the same one, nor one at all.
    for node, found in mixed.items():
        expected = versions.reference(mixed, has)
        assert level_of(list(versions.judge({node: found}, expected)), node)[0] == "ok"
    assert versions.probe()["wandb"][0].isdigit()


def test_a_checkout_without_a_version_is_there(monkeypatch):
    monkeypatch.setitem(needs.NEEDS, "megatron-core", ("json", "x"))
    monkeypatch.setitem(needs.NEEDS, "torch", ("no_such_package.torch", "x"))
    monkeypatch.setattr(versions, "version", none_installed)
    found = versions.probe()
    assert (found["megatron-core"], found["torch"]) == ("unknown", "missing")
    assert found["triton"] == "missing"
    assert next(iter(versions.judge({"a": {**found, "torch": "2"}}, {}))).level == "ok"


def none_installed(package):
    raise PackageNotFoundError(package)


def test_what_nodes_need_is_what_the_package_asks_for():
    project = tomllib.loads((Path(longspan.__file__).parent / "pyproject.toml").read_text())
    asked = {text.partition(";")[0].strip() for text in project["project"]["dependencies"]}
    assert {text for _, text in needs.NEEDS.values()} <= asked
    # The others are those of the command line and of one kind of tracking.
    left = asked - {text for _, text in needs.NEEDS.values()}
    assert left == {"aiohttp", "typer>=0.15", "wandb>=0.19"}
    assert needs.missing() == []
    readme = (Path(longspan.__file__).parent / "README.md").read_text("utf-8")
    (told,) = [line for line in readme.splitlines() if line.startswith("A Ray cluster with")]
    assert not [name for name in needs.NEEDS if name not in told]


def test_versions_of_this_node_are_those_of_its_packages():
    found = versions.probe()
    assert found["torch"][0].isdigit() and found["megatron-core"][0].isdigit()
    assert len(found["longspan"]) == 12 and found == versions.probe()
    # Every folder of the package is part of its content.
    root = Path(longspan.__file__).parent
    floors = {p.parent.name for p in root.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert floors == set(versions._FOLDERS)


def test_a_clock_is_corrected_for_the_round_trip(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(clock.time, "time", lambda: 1000.0)
    # The trips take 7, 1, 7, 7 and 7 s; in the quickest the other clock was asked half of it later.
    ticks = iter([0, 7, 10, 11, 20, 27, 30, 37, 40, 47])
    monkeypatch.setattr(clock.time, "monotonic", lambda: float(next(ticks)))
    skew = clock.probe(lambda: 990.0 + next(now))
    assert skew == clock.Skew(ahead_s=1000.0 + 0.5 - 991.0, doubt_s=0.5)


def test_clocks_are_judged_by_what_the_round_trip_does_not_explain():
    nodes = {"a": clock.Skew(0.1, 0.01), "b": clock.Skew(-9.0, 8.0), "c": clock.Skew(9.0, 0.1),
             "d": clock.Skew(-600.0, 0.1)}  # fmt: skip
    found = list(clock.judge(nodes))
    assert [result.level for result in found] == ["ok", "ok", "warn", "fail"]
    assert "600 s behind" in found[3].found


def test_nodes_that_share_a_folder_see_each_other(tmp_path):
    folder = tmp_path / ".preflight-1"
    names = ["10.0.0.1 (aa)", "10.0.0.2 (bb)"]
    writes = {name: storage.write(folder, name, name) for name in names}
    seen = {name: storage.read(folder, dict(zip(names, names, strict=True))) for name in names}
    assert [r.level for r in storage.judge(folder, writes, seen)] == ["ok", "ok"]
    assert len(list(folder.iterdir())) == 2


def test_a_node_that_cannot_write_is_told_why(tmp_path):
    (tmp_path / "file").write_text("")
    wrote = {"a": storage.write(tmp_path / "file" / ".preflight-1", "a", "a")}
    level, found, fix = level_of(storage.judge(tmp_path, wrote, {}), "a")
    assert level == "fail" and "Not a directory" in found and "mount the storage" in fix


def test_a_node_with_a_folder_of_its_own_is_the_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PATIENCE_S", 0.0)
    places = {"a": tmp_path / "shared", "b": tmp_path / "own", "c": tmp_path / "shared"}
    writes = {name: storage.write(place, name, name) for name, place in places.items()}
    written = {name: name for name in places}
    seen = {name: storage.read(place, written) for name, place in places.items()}
    seen[storage.DRIVER] = storage.read(places["a"], written)
    results = list(storage.judge(tmp_path, writes, seen))
    assert [result.level for result in results] == ["ok", "fail", "ok"]
    assert "it and a, c, the driver do not see each other's files" in results[1].found


def test_a_file_that_comes_late_is_waited_for(tmp_path):
    timer = threading.Timer(0.3, lambda: (tmp_path / storage.file_name("a")).write_text("a"))
    timer.start()
    assert storage.read(tmp_path, {"a": "a"}) == []


def test_room_is_needed_for_what_stays_and_one_more(tmp_path):
    run = short_run()
    one = disk.checkpoint_bytes(run, 512)
    # Two layers of 4 x 64 x 64 and 3 x 64 x 128, two norms each and one at the end, embeddings.
    assert one == 12 * (512 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 128) + 64)
    much = 2**31
    nodes = {"a": {"checkpoints": 3 * one, "temporary": much},
             "b": {"checkpoints": 3 * one - 1, "temporary": much},
             "c": {"checkpoints": one - 1, "temporary": much},
             "d": {"checkpoints": 3 * one, "temporary": 5},
             "e": {"error": "Permission denied (/x)"}}  # fmt: skip
    levels = [result.level for result in disk.judge(nodes, one, 2)]
    assert levels == ["ok", "warn", "fail", "warn", "fail"]
    folders = disk.places(run, tmp_path / "not" / "there")
    assert folders["checkpoints"] == tmp_path / "not" / "there" / "checkpoints"
    assert disk.probe(folders)["checkpoints"] > 0
    away = short_run(checkpoint={"where": "s3://bucket/prefix"})
    assert "checkpoints" not in disk.places(away, tmp_path)


class _Dashboard(http.server.BaseHTTPRequestHandler):
    status = 401

    def do_GET(self):
        self.send_response(self.status if self.path == "/api/jobs/" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("status", "level"), [(401, "ok"), (200, "warn"), (500, "warn")])
def test_a_dashboard_that_asks_for_no_token_is_told_of(status, level):
    handler = type("Answer", (_Dashboard,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = dashboard.judge(dashboard.probe(f"127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert found.level == level and found.node == "cluster"


def test_a_dashboard_that_is_not_there_is_told_of():
    found = dashboard.judge(dashboard.probe("http://127.0.0.1:1"))
    assert found.level == "warn" and "no clear answer" in found.found


def test_the_node_that_nobody_reaches_is_to_blame():
    assert cut_off({"a": ["b"], "b": ["a", "c"], "c": ["b"]}) == {"b": ["a", "c"]}
    assert cut_off({"a": [], "b": [], "c": ["a", "b"]}) == {"c": ["a", "b"]}
    assert cut_off({"a": ["b"], "b": ["a"]}) == {"b": ["a"]}
    assert cut_off({"a": ["b"], "b": []}, keep=("b",)) == {"a": ["b"]}
    assert cut_off({"a": [], "b": []}) == {}


def test_connections_are_opened_and_refused():
    listener = network.Listener("127.0.0.1")
    peers = {"a": ("127.0.0.1", listener.port), "b": ("127.0.0.1", network.free_port("127.0.0.1"))}
    assert network.reach(peers) == {"b": "connection refused"}
    listener.close()
    assert set(network.reach(peers)) == {"a", "b"}
    with pytest.raises(OSError):
        network.Listener("192.0.2.77")


def test_every_node_is_tried_by_others_however_many_there_are():
    names = [str(number) for number in range(100)]
    tried = {other for name in names for other in network.neighbours(names, name)}
    assert tried == set(names)
    assert network.neighbours(["a", "b", "c"], "b") == ["c", "a"]


def test_a_port_is_free_at_all_addresses(monkeypatch):
    """The first that is offered may be taken elsewhere."""
    with socket.socket() as taken, socket.socket() as probe:
        taken.bind(("127.0.0.2", 0))
        port = taken.getsockname()[1]
        offers = iter([port, 0])
        bind = socket.socket.bind

        class Offered(socket.socket):
            def bind(self, address):
                offered = next(offers, 0) if address[1] == 0 else address[1]
                bind(self, (address[0], offered))

        monkeypatch.setattr(network.socket, "socket", Offered)
        free = network.free_port("127.0.0.1", "127.0.0.2", "127.0.0.1")
        assert free not in (0, port) and not list(offers)
        bind(probe, ("127.0.0.2", free))
    with pytest.raises(OSError):
        network.free_port("192.0.2.77")


def test_the_network_names_who_is_not_reached_and_why():
    failed = {"a": {"c": "timed out"}, "b": {"c": "timed out"}, "c": {}}
    found = list(network.judge(failed, None))
    assert [result.level for result in found] == ["ok", "ok", "fail"]
    assert found[2].found == "none with a, b (timed out)" and "interface" in found[2].fix


def test_a_child_that_fails_says_why(tmp_path):
    with pytest.raises(child.ChildError, match="No module named"):
        child.run_children("no_such_module", [{}], 30)


def node(number, cores=2, gpus=0):
    return Node(id=f"{number}" * 56, address=f"10.0.0.{number}", gpus=gpus, cores=cores)


def report(*failing, nodes=()):
    nodes = nodes or (node(1), node(2), node(3))
    results = [Result(n.name, "clock", "ok", "0 s", "2 s") for n in nodes]
    results += [Result(n.name, "disk", "warn", "1 GiB", "2 GiB", "free some") for n in nodes[:1]]
    results += [
        Result(n.name, "versions", "fail", "torch 1", "torch 2", "mend it") for n in failing
    ]
    return Report(nodes, results, 1.5)


def test_nodes_that_failed_are_left_out_and_warnings_are_not():
    assert healthy(report(node(2))) == (node(1), node(3))


def test_a_report_is_a_file(tmp_path):
    found = report(node(2))
    found.write(tmp_path)
    (written,) = json.loads((tmp_path / "preflight.json").read_text())["looks"]
    assert written["healthy"] == [node(1).id, node(3).id]
    assert written["results"][-1]["level"] == "fail"
    report(nodes=(node(4),)).write(tmp_path)  # of a node that came later
    looks = json.loads((tmp_path / "preflight.json").read_text())["looks"]
    assert looks[0] == written and looks[1]["healthy"] == [node(4).id]
    assert looks[0]["time"] <= looks[1]["time"]
    (tmp_path / "preflight.json").write_text("{torn")
    found.write(tmp_path)
    assert len(json.loads((tmp_path / "preflight.json").read_text())["looks"]) == 1
    with pytest.raises(RunError, match="cannot be written"):
        found.write(tmp_path / "nowhere")
