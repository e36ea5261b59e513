"""Causes: what a gang ended of, and whether another start would only repeat it."""

from dataclasses import replace

import pytest
from longspan.cluster.causes import Evidence, judge
from longspan.cluster.watch import End, Hang, Overdue
from longspan.trainer.failure import Failure

NONE = Evidence(
    ranks=2,
    nodes={0: "a", 1: "b"},
    ends={},
    failures=(),
    lost=(),
    hang=None,
    preempted=(),
    died={},
    error="",
    asked=False,
    complete=False,
)


def ends(**codes):
    return {int(rank[1:]): End(code, False) for rank, code in codes.items()}


def failure(rank, kind="internal", message="ValueError: no", trace="Traceback", time=1.0):
    return Failure(rank, kind, message, trace, time)


def verdict(**found):
    return judge(
        replace(NONE, **found), lambda rank, code: failure(rank, message=f"left no message {code}")
    )


PEER = failure(0, message="RuntimeError: [gloo] Connection closed by peer", time=1.0)
LATE = Overdue(1, "step", 5, 70.0, 60.0, "T")


@pytest.mark.parametrize(
    ("found", "cause", "code"),
    [
        ({"ends": ends(r0=0, r1=0)}, "complete", 0),
        ({"complete": True, "ends": ends(r0=0, r1=-9), "lost": ["b"]}, "complete", 0),
        ({"asked": True, "ends": ends(r0=75, r1=75)}, "stopped", 75),
        ({"asked": True}, "stopped", 75),
        ({"asked": True, "failures": [failure(1, "user")]}, "user", 2),
        ({"asked": True, "ends": ends(r0=130, r1=130)}, "stopped", 130),
        ({"failures": [failure(1, "user")], "ends": ends(r1=2)}, "user", 2),
        ({"failures": [failure(1)], "ends": ends(r1=1)}, "user", 1),
        ({"failures": [PEER], "ends": ends(r0=1)}, "infrastructure", 1),
        ({"failures": [PEER], "ends": ends(r0=1, r1=-9)}, "infrastructure", 1),
        ({"ends": ends(r1=9)}, "infrastructure", 1),
        ({"failures": [PEER], "ends": ends(r0=1), "lost": ["b"]}, "infrastructure", 1),
        ({"asked": True, "lost": ["b"], "ends": ends(r0=75)}, "infrastructure", 1),
        ({"died": {1: "ActorDiedError"}}, "infrastructure", 1),
        ({"died": {1: "x"}, "failures": [failure(0, "user")], "ends": ends(r0=2)},
         "infrastructure", 1),
        ({"died": {0: "x"}, "failures": [failure(0, "user")], "ends": ends(r0=2)}, "user", 2),
        ({"failures": [failure(0, message="DistStoreError: wait timeout after 300000ms")],
          "ends": ends(r0=1)}, "infrastructure", 1),
        ({"hang": Hang(LATE, "b", "rank 1 is stopped"), "ends": ends(r0=-9)}, "infrastructure", 1),
        ({"preempted": ["b"], "ends": ends(r0=75, r1=-9)}, "preemption", 1),
        ({"ends": {0: End(75, True), 1: End(75, True)}}, "preemption", 1),
        ({"ends": {0: End(75, True, ("b",)), 1: End(0)}}, "preemption", 1),
        ({"error": "ControllerError: no placement"}, "infrastructure", 1),
    ],
)  # fmt: skip
def test_what_follows_depends_on_the_cause(found, cause, code):
    said = verdict(**found)
    assert (said.cause, said.code) == (cause, code)
    assert (said.failure is None) == (cause in ("complete", "stopped"))


def test_memory_that_runs_out_on_a_gpu_would_run_out_again():
    text = "torch.OutOfMemoryError: CUDA out of memory. NCCL"
    assert verdict(failures=[failure(1, message=text)], ends=ends(r1=1)).cause == "user"
    text = "CUDA error: uncorrectable ECC error encountered"
    assert verdict(failures=[failure(1, message=text)], ends=ends(r1=1)).cause == "infrastructure"


def test_the_first_failure_is_shown_and_its_node_struck():
    said = verdict(failures=[PEER], ends=ends(r0=1, r1=-9))
    assert said.failure.rank == 1 and said.struck == ("b",)
    said = verdict(failures=[failure(1, "user", time=1.0), PEER], ends=ends(r0=1, r1=2))
    assert said.failure.rank == 1
    assert verdict(lost=["b"]).struck == ("b",) and "rank 1" in verdict(lost=["b"]).failure.message
    early = verdict(lost=["b"], nodes={})  # before any rank has joined
    assert early.failure.message == "lost node b"
    assert verdict(hang=Hang(LATE, "", "hangs")).struck == ()
    assert verdict(ends={0: End(75, True, ("b",)), 1: End(75, True, ("b",))}).struck == ("b",)
