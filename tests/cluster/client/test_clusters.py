"""clusters.yaml: what is right in it, everything that is wrong with it, and who is meant."""

import pytest
from longspan.cluster.clusters import find_cluster, known_cluster, load_clusters
from longspan.cluster.token import read_token
from longspan.errors import ClusterError, ClustersFileError

ADDRESS = "http://127.0.0.1:8265"
SECRET = "hunter2-hunter2"


def of(**changes) -> dict:
    return {"address": ADDRESS, "storage": "/shared/longspan"} | changes


def mistakes(clusters, **named) -> dict:
    clusters(**named)
    with pytest.raises(ClustersFileError) as caught:
        load_clusters()
    assert str(caught.value).startswith("file /")
    assert SECRET not in str(caught.value)
    return {problem.path: problem for problem in caught.value.problems}


def test_a_whole_file(clusters):
    nodes = {"count": 2, "gpus": 8, "cores": 96}
    secrets = {"WANDB_API_KEY": "/etc/longspan/wandb"}
    clusters(lab=of(), big=of(nodes=nodes, secrets=secrets, interface="eth0", token="~/t"))
    lab, big = load_clusters().values()
    assert lab.settings.nodes is None and lab.settings.secrets == {}
    assert big.settings.nodes is not None and big.settings.nodes.gpus == 8
    assert big.settings.secrets == secrets and big.settings.interface == "eth0"


def test_all_mistakes_are_told_at_once(clusters):
    found = mistakes(
        clusters,
        lab=of(storage="runs", adress="x", nodes={"count": 0}),
        two=of(address="ray://10.0.0.1:10001", secrets={"WANDB_API_KEY": SECRET}),
        three=5,
        four=of(address=f"http://me:{SECRET}@host:8265", token=SECRET, interface="a b"),
        five={"address": "127.0.0.1:8265"},
    )
    expected = {
        "clusters.lab.storage": "an absolute path, the same on all nodes",
        "clusters.lab.adress": "one of address, storage, nodes, secrets, interface, token",
        "clusters.lab.nodes.count": "at least 1",
        "clusters.two.address": "the dashboard's address, such as http://127.0.0.1:8265",
        "clusters.two.secrets": "for WANDB_API_KEY the absolute path of a file on the nodes",
        "clusters.three": "a block of settings",
        "clusters.four.address": "no credential in it",
        "clusters.four.token": "the absolute path of a file that holds the token, not the token",
        "clusters.four.interface": "letters",
        "clusters.five.address": "the dashboard's address",
        "clusters.five.storage": "a value (A folder that all nodes see",
    }
    assert found.keys() == expected.keys()
    for path, text in expected.items():
        assert text in found[path].expected, (path, found[path])
    assert found["clusters.lab.adress"].fix == "did you mean address?"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clusters: {lab: [", "expected YAML"),
        ("- a", "expected a mapping of settings"),
        ("", "got nothing"),
        ("clusters: {}", "clusters: got an empty mapping"),
        ("cluster: {lab: {}}", "did you mean clusters?"),
        ("clusters: {a b: {}}", "a name of letters"),
        ("clusters: {lab: {}, lab: {}}", "key `lab` again"),
    ],
)
def test_a_file_that_is_something_else(tmp_path, text, expected):
    (tmp_path / "clusters.yaml").write_text(text)
    with pytest.raises(ClustersFileError) as caught:
        load_clusters()
    assert expected in str(caught.value)
    assert "longspan recipes" not in str(caught.value)


def test_without_a_file_a_minimal_one_is_shown(tmp_path):
    with pytest.raises(ClusterError) as caught:
        find_cluster(None)
    assert f"{tmp_path}/clusters.yaml does not exist" in caught.value.what
    (tmp_path / "clusters.yaml").write_text(caught.value.fix.split("\n", 1)[1].split("\n  or")[0])
    assert load_clusters()["lab"].settings.storage == "/shared/longspan"


def test_one_cluster_is_the_default_and_of_two_one_is_to_be_named(clusters):
    clusters(lab=of())
    assert find_cluster(None).name == "lab"
    clusters(lab=of(), big=of())
    assert find_cluster("big").name == "big"
    with pytest.raises(ClusterError, match=r"has 2 clusters: lab, big\n.*--cluster lab"):
        find_cluster(None)
    with pytest.raises(ClusterError, match="did you mean lab"):
        find_cluster("lap")


def test_a_cluster_by_its_address(clusters):
    assert find_cluster(f"{ADDRESS}/", "/s").settings.address == ADDRESS
    assert not find_cluster(ADDRESS, "/s").listed
    for address, storage, text in [
        (ADDRESS, None, "add --storage DIR"),
        (ADDRESS, "here", "--storage here is not an absolute path"),
        ("ray://h:10001", "/s", "--cluster ray://h:10001 is not the dashboard's address"),
        (f"http://me:{SECRET}@h", "/s", "no credential in it"),
    ]:
        with pytest.raises(ClusterError) as caught:
            find_cluster(address, storage)
        assert text in str(caught.value)
    clusters(lab=of(interface="eth0"))
    named = find_cluster(ADDRESS, "/other")
    assert (named.name, named.settings.storage) == ("lab", "/other")
    assert find_cluster(ADDRESS).settings.interface == "eth0"
    with pytest.raises(ClusterError, match="belongs to a cluster that is given by its address"):
        find_cluster("lab", "/s")


def test_a_run_finds_its_cluster_where_it_is_now(clusters):
    assert known_cluster("lab", ADDRESS, "/s").settings.address == ADDRESS
    clusters(lab=of(address="http://10.0.0.9:8265"))
    assert known_cluster("lab", ADDRESS, "/s").settings.address == "http://10.0.0.9:8265"


def test_the_token_is_looked_for_where_ray_looks(clusters, monkeypatch, tmp_path, user):
    clusters(lab=of())
    lab = find_cluster("lab")
    assert read_token(lab).value is None
    (user / ".ray").mkdir()
    (user / ".ray" / "auth_token").write_text("from-home\n")
    assert read_token(lab).value == "from-home"
    (tmp_path / "t").write_text("from-path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "t"))
    assert read_token(lab).value == "from-path"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-environment")
    assert read_token(lab).value == "from-environment"
    assert "from-environment" not in repr(read_token(lab))
    (tmp_path / "own").write_text("own")
    clusters(lab=of(token=str(tmp_path / "own")))
    assert read_token(find_cluster("lab")).value == "own"


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "cannot be read: No such file"), (b"", "is empty"), (b"a b", "more than a token"),
     (b"a\nb", "more than a token"), (b"\xff\xfe", "it is not text")],
)  # fmt: skip
def test_a_token_file_that_is_none(clusters, tmp_path, content, text):
    if content is not None:
        (tmp_path / "own").write_bytes(content)
    clusters(lab=of(token=str(tmp_path / "own")))
    with pytest.raises(ClusterError) as caught:
        read_token(find_cluster("lab"))
    assert text in str(caught.value)


def test_a_token_in_place_of_its_path_is_not_shown(monkeypatch, clusters):
    clusters(lab=of())
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", SECRET)
    with pytest.raises(ClusterError) as caught:
        read_token(find_cluster("lab"))
    assert SECRET not in str(caught.value)
