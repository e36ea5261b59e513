"""Runs on a real cluster of two nodes end as `longspan train` ends them."""

from support.cluster import Drive
from support.cluster_runs import EVERY, cluster_run


def test_a_run_on_two_nodes_ends_bit_equal(cluster, reference, texts, tmp_path):
    drive = Drive(cluster, cluster_run(texts), tmp_path / "run")
    assert drive.ends() == 0, drive.text()
    reference.assert_same_content(drive.run_dir)
    assert reference.assert_history(drive.run_dir, EVERY) == 0
    said = drive.said()
    assert "attempt 1 with 2 ranks on 2 nodes, from the beginning" in said
    assert "run complete" in said and "goodput" in said
    assert "raylet" not in said and "pid=" not in said
