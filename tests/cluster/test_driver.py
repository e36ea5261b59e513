"""Runs on a real cluster of two nodes end as `longspan train` ends them."""

from pathlib import Path

from support.cluster import Drive
from support.cluster_runs import EVERY, cluster_run


def test_a_run_on_two_nodes_ends_bit_equal(cluster, reference, texts, tmp_path):
    key = tmp_path / "key"
    key.write_text("planted-0123456789\n")
    secret = ("--secrets", f"PLANTED_API_KEY={key}")
    drive = Drive(cluster, cluster_run(texts), tmp_path / "run", *secret)
    ranks = drive.wait_for(lambda: drive.events("step") and drive.workers())
    for pid in ranks.values():
        assert b"PLANTED_API_KEY=planted-0123456789" in Path(f"/proc/{pid}/environ").read_bytes()
    assert drive.ends() == 0, drive.text()
    reference.assert_same_content(drive.run_dir)
    assert reference.assert_history(drive.run_dir, EVERY) == 0
    said = drive.said()
    assert "attempt 1 with 2 ranks on 2 nodes, from the beginning" in said
    assert "run complete" in said and "goodput" in said
    assert "raylet" not in said and "pid=" not in said
    written = [path for path in drive.run_dir.rglob("*") if path.is_file()]
    assert len(written) > 10 and "planted" not in said
    assert not [path for path in written if b"planted-0123456789" in path.read_bytes()]
