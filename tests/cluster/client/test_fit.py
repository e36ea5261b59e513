"""What submit decides about nodes, and tells the driver."""

import json

BIG = ("--set", "defaults.batch_tokens=8192", "--set", "defaults.tokens=81920")


def test_the_driver_waits_for_what_was_decided_whatever_is_up_then(longspan, lab, dashboard):
    """A head without GPUs is up, and clusters.yaml says what the cluster can grow to."""
    dashboard.nodes = [(0, 32)]
    lab(nodes={"count": 4, "gpus": 8})
    assert longspan("submit", "smoke", "--run-id", "mine", *BIG, "--set", "ranks=null")[0] == 0
    dashboard.end(dashboard.jobs["mine-1"], "FAILED", 1)
    assert longspan("resume", "mine")[0] == 0
    entrypoints = [json.loads(request.body)["entrypoint"] for request in dashboard.posted()]
    assert len(entrypoints) == 2 and all(
        "--device gpu --ranks 32 --slots 8" in words for words in entrypoints
    )


def test_groups_that_no_node_has_room_for_are_a_warning(longspan, lab, dashboard):
    dashboard.nodes = [(2, 16), (2, 16)]
    split = ("--set", "defaults.parallel={tensor: 2, context: 2}")
    split += ("--set", "stages.1.parallel={tensor: 2, context: 2}", "--set", "ranks=4")
    code, out, err = longspan("submit", "smoke", "--dry-run", *BIG, *split)
    assert code == 0 and "ranks    4, one per GPU, on 2 nodes" in out, err
    assert "parallel: no node has room for a tensor x context group of 4 ranks" in err
