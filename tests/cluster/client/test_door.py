"""A cluster that does not answer, does not let us in, or lets everybody in."""

import socket
import threading

import pytest
from longspan.cluster.door import Door
from longspan.cluster.registry import Registry
from longspan.errors import ClusterError


def refused(longspan, *arguments: str) -> str:
    """The message of a submission that is refused; nothing was recorded."""
    code, out, err = longspan("submit", "smoke", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and "  fix: " in err
    assert Registry().records() == []
    return err


def test_a_cluster_that_is_down(longspan, lab, dashboard):
    dashboard.stop()
    err = refused(longspan)
    assert f"cluster lab ({dashboard.address}) cannot be reached: connection refused" in err
    assert f"ssh -L {dashboard.port}:127.0.0.1:{dashboard.port} HEAD_NODE" in err


def test_a_machine_that_does_not_exist(longspan, lab):
    lab(address="http://no-such-host.invalid:8265")
    assert "there is no machine `no-such-host.invalid`" in refused(longspan)


@pytest.mark.parametrize(
    ("says", "text"),
    [
        (None, "gave no answer in"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "what answers there is no dashboard"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "cannot show its version"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "what answers at"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://else\r\nContent-Length: 0\r\n\r\n", "elsewhere"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "address of a Ray dashboard?"),
    ],
)
def test_something_else_at_that_address(longspan, lab, monkeypatch, says, text):
    monkeypatch.setattr("longspan.cluster.door._TIMEOUT_S", 0.3)
    monkeypatch.setattr(Door.__init__, "__defaults__", (0.3,))
    with socket.create_server(("127.0.0.1", 0)) as server:
        lab(address=f"http://127.0.0.1:{server.getsockname()[1]}")

        def answer():
            with server.accept()[0] as connection:
                connection.recv(65536)
                if says is not None:
                    connection.sendall(says)
                else:
                    connection.recv(65536)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert text in refused(longspan)
        thread.join(5)


def test_no_certificate(longspan, lab, dashboard):
    lab(address=dashboard.address.replace("http:", "https:"))
    assert "no encrypted connection" in refused(longspan)


def test_a_token_that_is_missing(longspan, lab):
    lab(token=None)
    err = refused(longspan)
    assert "cluster lab asks for a token, and none was found (in $RAY_AUTH_TOKEN, " in err
    assert "`ray get-auth-token` on the cluster shows it" in err


def test_a_token_that_is_wrong(longspan, lab, dashboard, tmp_path):
    (tmp_path / "token").write_text("wrong-token-9876543210")
    err = refused(longspan)
    assert f"cluster lab refuses the token from {tmp_path}/token (HTTP status 403)" in err
    assert "wrong-token" not in err


def test_a_dashboard_that_asks_for_none_is_refused(longspan, lab, dashboard):
    dashboard.token = None
    err = refused(longspan)
    assert "asks for no token: whoever reaches" in err and "RAY_AUTH_MODE=token" in err
    code, _, err = longspan("submit", "smoke", "--run-id", "mine", "--insecure")
    assert code == 0 and "warning: cluster lab asks for no token" in err
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
    assert longspan("resume", "mine")[0] == 2
    assert longspan("resume", "mine", "--insecure")[0] == 0
    assert list(dashboard.jobs) == ["mine-1", "mine-2"]


def test_a_token_that_travels_in_the_open_is_a_warning(lab, monkeypatch):
    from longspan.cluster.clusters import find_cluster

    for address, shown in [("http://10.0.0.7:8265", True), ("https://10.0.0.7", False)]:
        lab(address=address)
        assert Door(find_cluster("lab")).shows_token is shown
    lab()
    assert not Door(find_cluster("lab")).shows_token


@pytest.mark.parametrize(("version", "fine"), [("2.52.0", True), ("2.51.1", False), ("3.0", True)])
def test_ray_before_tokens_is_refused(longspan, lab, dashboard, version, fine):
    dashboard.version = version
    if fine:
        assert longspan("submit", "smoke", "--dry-run")[0] == 0
    else:
        assert f"runs Ray {version}, which is older than 2.52" in refused(longspan)


def test_a_cluster_that_does_not_say_what_it_has(longspan, lab, dashboard):
    dashboard.nodes = None
    assert "write nodes: {count: ..., gpus: ...} for lab" in refused(longspan)


def test_a_token_is_in_no_message_of_a_broken_door(lab, tmp_path):
    from longspan.cluster.clusters import find_cluster

    (tmp_path / "token").write_text("two words")
    with pytest.raises(ClusterError) as caught:
        Door(find_cluster("lab"))
    assert "two words" not in str(caught.value)


def test_a_head_without_workers_offers_nothing(longspan, lab, dashboard):
    dashboard.nodes = [(0, 0)]
    err = refused(longspan)
    assert "ranks: got 2; expected at most 0 CPU cores: cluster lab has 0 nodes" in err
    assert "fix: for a cluster that grows, nodes: of lab in clusters.yaml" in err
