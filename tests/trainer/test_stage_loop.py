"""What a stage tells of its steps: the canary before the first, alarms, waits and imbalance."""

from collections import namedtuple
from dataclasses import replace
from unittest.mock import PropertyMock, patch

import pytest
from longspan.errors import RunError
from longspan.trainer.observe.sink import Sink
from support.mechanism_cases import MECHANISMS
from support.tiny import VOCAB, random_sample, tiny_run

Piece = namedtuple("Piece", "length")


class Samples:
    """Random samples, and their documents as packing has them."""

    def __getitem__(self, number):
        return random_sample(number)

    @property
    def packing(self):
        return [[Piece(n) for n in self[at].cu_seqlens.diff().tolist()] for at in range(16)]


class Heard(Sink):
    """Keeps the news, and what the heartbeat was told: section, step, own seconds before."""

    def __init__(self):
        self.news, self.beats = [], []

    def step(self, metrics):
        self.news.append(("step", metrics))

    def compared(self, step, values):
        self.news.append(("canary", values))

    def alarm(self, name, step, text):
        self.news.append(("alarm", (name, step, text)))

    @property
    def order(self):
        return [kind for kind, _ in self.news]

    def of(self, kind):
        return [what for name, what in self.news if name == kind]


def train(run, step=0, peak=None, wrong=False):
    """The news of this rank, and how its stage ended."""
    from longspan.trainer.bad_steps import BadSteps
    from longspan.trainer.checkpoint.cursor import Cursor
    from longspan.trainer.engine import engine as module
    from longspan.trainer.heartbeat import Heartbeat
    from longspan.trainer.plan import plan_stage
    from longspan.trainer.stage_loop import StageLoop
    from longspan.trainer.stopping import StopRequest

    heard, (stage,), report = Heard(), run.stages, module._report
    plan = replace(plan_stage(stage, run.ranks), steps=3)
    engine = module.Engine(run, stage, VOCAB)
    given = {"steps": 3, "engine": engine, "samples": Samples(), "observer": heard}

    class Beats(Heartbeat):
        def enter(self, section, step=0):
            heard.beats.append((section, step, self.last_s))
            super().enter(section, step)

        def computed(self, seconds):
            self.last_s = seconds

        last_s = 0.0

    given |= {"bad": BadSteps(run.recovery), "beat": Beats()}
    then = {"stop": StopRequest(), "evaluate": lambda at: None}
    then |= {"save": lambda at, wait: None, "poll": lambda: None}
    first = Cursor(step, 0, step, step * 4, 0)

    def scaled(batch, output):
        loss, *rest = report(batch, output)
        return loss / 2, *rest

    known = patch.object(module.Engine, "peak_flops", new_callable=PropertyMock, return_value=peak)
    with known, patch.object(module, "_report", scaled if wrong else report):
        try:
            end = StageLoop(run, stage, plan, **given, **then).train(first).cursor.stage_step
        except RunError as error:
            end = str(error)
    return heard, end


def settings(**parallel):
    return tiny_run(ranks=2, stage__parallel={"context": 2, **parallel})


def test_the_canary_comes_before_the_first_step_of_an_attempt(worlds):
    for step, order in ((0, ["canary"] + ["step"] * 3), (2, ["canary", "step"]), (3, [])):
        found = worlds(2).run(train, settings(), step)
        assert [heard.order for heard, _ in found] == [order] * 2
        assert [end for _, end in found] == [3, 3]
    values = worlds(2).run(train, settings())[0][0].of("canary")[0]
    assert values["loss"] == pytest.approx(values["loss_alone"], rel=1e-5)
    assert 0 <= values["grad_difference"] < 1e-5 and values["seconds"] > 0


def test_a_mismatch_is_told_and_stops_every_rank_before_it_steps(worlds):
    for heard, end in worlds(2).run(train, settings(), 0, None, True):
        assert heard.order == ["canary"]
        assert end.startswith("stages.0.parallel: 2 context ranks") and "fix:" in end


@pytest.mark.parametrize("parallel", [{"canary": False}, {"context": 1}])
def test_switched_off_or_without_context_ranks_there_is_none(worlds, parallel):
    assert worlds(2).run(train, settings(**parallel))[0][0].order == ["step"] * 3


def test_steps_tell_of_waits_and_of_imbalance(worlds):
    run = tiny_run(ranks=2, stage__parallel={"context": 2, "layout": "contiguous"},
                   stage__attention=MECHANISMS["window"])  # fmt: skip
    (one, _), (other, _) = worlds(2).run(train, run)
    found = [metrics.imbalance for metrics in one.of("step")]
    assert found == [metrics.imbalance for metrics in other.of("step")]
    assert len(set(found)) == 3 and all(1 < ratio < 1.5 for ratio in found)
    assert all(0 < metrics.context_wait_s < metrics.step_s for metrics in one.of("step"))


def test_one_context_rank_has_neither(worlds):
    (heard, _) = worlds(2).run(train, tiny_run(ranks=2))[0]
    assert [(m.imbalance, m.context_wait_s) for m in heard.of("step")] == [(None, 0)] * 3


def test_an_impossible_mfu_is_an_alarm_once_in_a_stage(worlds):
    (heard, _) = worlds(2).run(train, tiny_run(ranks=2), 0, 1.0)[0]
    ((name, step, text),) = heard.of("alarm")
    assert (name, step) == ("mfu", 1) and "is impossible" in text
    assert all(metrics.mfu > 1 for metrics in heard.of("step"))
    assert worlds(2).run(train, tiny_run(ranks=2), 0, 1e18)[0][0].of("alarm") == []


def test_whoever_watches_sees_each_step_and_what_a_rank_computed_itself(worlds):
    for heard, _ in worlds(2).run(train, settings()):
        assert [beat[:2] for beat in heard.beats] == [
            ("canary", 0), ("step", 1), ("step", 2), ("step", 3)
        ]  # fmt: skip
        before, *own = [seconds for section, _, seconds in heard.beats if section == "step"]
        assert before == 0
        assert all(0 < s < m.step_s for s, m in zip(own, heard.of("step"), strict=False))
