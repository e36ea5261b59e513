"""What the doctor says of clusters: versions, py-spy, and where tokens are, never what they are."""

import stat

import pytest
from longspan.cluster import doctor

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LONGSPAN_CLUSTERS", str(tmp_path / "clusters.yaml"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def found():
    rows = {name: (value, remark) for name, value, remark in doctor.rows()}
    assert TOKEN not in str(rows)
    return rows


def test_ray_is_there_and_new_enough(monkeypatch):
    assert found()["ray"][1] == "runs on a cluster"
    monkeypatch.setattr(doctor, "version", lambda name: "2.51.9")
    assert "too old" in found()["ray"][1]
    monkeypatch.setattr(doctor, "version", lambda name: "3.0.0rc1")
    assert found()["ray"] == ("3.0.0rc1", "runs on a cluster")


def test_py_spy_is_looked_for_beside_python_and_on_the_path(home, monkeypatch):
    monkeypatch.setattr(doctor.sys, "executable", str(home / "python"))
    monkeypatch.setenv("PATH", str(home))
    assert found()["py-spy"] == ("missing", "shows where ranks hang: pip install py-spy")
    (home / "py-spy").write_text("#!/bin/sh\n")
    (home / "py-spy").chmod(stat.S_IRWXU)
    assert found()["py-spy"][0] == "found"


def test_a_token_is_named_by_its_place(monkeypatch, home):
    assert found()["clusters"][0] == "none" and found()["token"][0] == "none"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert found()["token"] == ("found", "from $RAY_AUTH_TOKEN")


def test_every_cluster_has_a_row(home):
    (home / "lab").write_text(TOKEN)
    (home / "clusters.yaml").write_text(f"""
clusters:
  lab: {{address: 'http://127.0.0.1:8265', storage: /data, token: {home}/lab}}
  far: {{address: 'https://far.example', storage: /data, token: {home}/gone}}
""")
    rows = found()
    assert rows["clusters"][0] == "lab, far"
    assert rows["token of lab"] == ("found", f"from {home}/lab")
    assert rows["token of far"][0] == "broken" and "gone cannot be read" in rows["token of far"][1]


def test_a_broken_file_is_told(home):
    (home / "clusters.yaml").write_text("clusters: {lab: {storage: here}}")
    value, remark = found()["clusters"]
    assert value == "broken" and "clusters.lab.storage" in remark
