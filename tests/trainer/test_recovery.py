"""Runs with bad sequences: skipped or gone back over, killed in between, bit-equal all the same."""

import json
import math
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.manifest import read_manifest
from longspan.trainer.observe.events import read_events
from longspan.trainer.run_directory import create_or_open
from longspan.trainer.settings import merge
from support.tiny import tiny_run

LENGTH, SEQUENCES = 64, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few documents, and a cache for what is made of them."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [f"word{number % 37} of {number % 11}" for number in range(6000)]
    documents = [" ".join(words[at : at + 60]) for at in range(0, 6000, 60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    (folder / "text.jsonl").write_text(lines)
    return folder


def settings(corpus, steps=8, every=3, keep=2, stages=1, **recovery):
    raw = tiny_run(model__layers=2, model__ffn_hidden=32).model_dump(mode="json")
    stage = merge(raw["stages"][0], {
        "tokens": steps * SEQUENCES * LENGTH,
        "data": {"sources": [{"kind": "jsonl", "paths": [str(corpus / "text.jsonl")]}],
                 "held_out": 0.1},
    })  # fmt: skip
    raw |= {
        "ranks": 2,
        "stages": [{**stage, "name": f"stage{number}"} for number in range(stages)],
        "checkpoint": {"every": every, "keep": keep},
        "evaluation": {"sequences": 1, "documents": 0},
        "telemetry": {"every": 0},
        "tracking": {"wandb": "off"},
        "recovery": recovery,
    }
    return type(tiny_run()).model_validate(raw)


class Crash(Exception):
    """Ends an attempt on both ranks at once; their processes are used again."""


class Bad:
    """Makes sequences bad and remembers every step; ends before the one it is told."""

    def __init__(self, sequences, factor, crash):
        self.sequences, self.factor, self.crash = set(sequences), factor, crash
        self.steps, self.engine = [], None

    def __call__(self, whole):
        def step(engine, samples, lr, stop, key, probe=None, *, save=False):
            if len(self.steps) == self.crash:
                raise Crash
            self.engine = engine
            numbers = [sample.number for sample in samples]
            self.steps.append((samples, lr, key))
            handle = None
            if self.sequences.intersection(numbers):
                weight = next(engine.model.parameters())
                handle = weight.register_hook(lambda grad: grad * self.factor)
            try:
                return whole(engine, samples, lr, stop, key, probe, save=save)
            finally:
                if handle is not None:
                    handle.remove()

        return step


def state_of(engine) -> list[bytes]:
    """Weights, moments and step counts, bit by bit."""
    states = [
        state[name].numpy().tobytes()
        for part in engine.optimizer._parts
        for state in part.optimizer.state.values()
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    return [p.detach().numpy().tobytes() for p in engine.model.parameters()] + states


def replayed(run, engine, steps) -> list[bytes]:
    """The state that these steps alone lead to, without a checkpoint on the way."""
    from longspan.trainer.engine.engine import Engine

    again = Engine(run, run.stages[0], engine.model.real_vocab)
    for samples, lr, key in steps:
        again.train_step(samples, lr, False, key).on_host()
    return state_of(again)


def train(run, path, bad, factor, kill, crash, signals, late):
    """Train as a rank; how it ended, its state, its steps, and where these alone lead to."""
    import torch.distributed as dist
    from longspan.errors import RunError
    from longspan.trainer import going_back
    from longspan.trainer.engine.engine import Engine
    from longspan.trainer.loop import Run
    from longspan.trainer.observe.observer import open_observer
    from longspan.trainer.run_directory import RunDirectory
    from longspan.trainer.stopping import StopRequest

    os.environ["LONGSPAN_CACHE"] = str(path.parent / "cache")
    directory, stop, watch = RunDirectory(path), StopRequest(), Bad(bad, factor, crash)
    stop.listen()
    opens = Run._open_stage

    def ask(late_now):
        for number in signals if dist.get_rank() == 1 and late_now == late else ():
            os.kill(os.getpid(), number)

    def open_and_ask(self, *where):
        stage = opens(self, *where)
        ask(True)
        return stage

    ask(False)
    observer = open_observer(directory, run, dist.get_rank())
    with ExitStack() as patches:
        patches.enter_context(patch.object(Engine, "train_step", watch(Engine.train_step)))
        patches.enter_context(patch.object(Run, "_open_stage", open_and_ask))
        if kill:
            die = patch.object(going_back, "write_rewinds", lambda *_: signal.raise_signal(9))
            patches.enter_context(die)
        try:
            end: object = Run(directory, run, observer, stop).train()
        except RunError as error:
            end = str(error)
        except Crash:
            end = "crashed"
    observer.close()
    if watch.engine is None:
        return end, None, [], None
    # The last time that a step was taken counts, and a bad one not at all.
    counted = {key: (samples, lr, key) for samples, lr, key in watch.steps}
    numbers = [(s[2][2], [sample.number for sample in s[0]]) for s in counted.values()]
    state, replay = state_of(watch.engine), None
    if len(run.stages) == 1 and end is True and watch.steps[0][2][2] == 0:
        lost = {number // SEQUENCES for number in bad}
        good = [s for s in counted.values() if s[0][0].number // SEQUENCES not in lost]
        replay = replayed(run, watch.engine, good)
    return end, state, numbers, replay


@pytest.fixture(scope="module")
def run_in(worlds, corpus):
    """Train in two ranks; None when they were killed, as they were told to."""

    def begin(run, name, bad=(), factor=math.nan, kill=False, crash=None, signals=(), late=False):
        path, world = corpus / name, worlds(2)
        create_or_open(path, run, "tiny")
        try:
            return world.run(train, run, path, list(bad), factor, kill, crash, signals, late)
        except (EOFError, OSError, RuntimeError):
            world.close()
            if not kill:
                raise
            return None

    return begin


def events(corpus: Path, kind: str, name: str):
    found = [e for e in read_events(corpus / name / "events.jsonl") if e["event"] == kind]
    return [{k: v for k, v in e.items() if k not in ("event", "time", "attempt")} for e in found]


def first_sequences(result):
    """The first sequence of every step of both ranks, by step."""
    steps = {}
    for _, _, numbers, _ in result:
        for step, sequences in numbers:
            steps.setdefault(step, []).extend(sequences)
    return {step: min(sequences) for step, sequences in sorted(steps.items())}


def assert_ends_as_its_good_steps(result):
    for end, state, _, replay in result:
        assert end is True, end
        assert state == replay


def test_a_step_that_is_not_finite_is_skipped_bit_for_bit(run_in, corpus):
    result = run_in(settings(corpus, nonfinite="skip"), "skip", bad=[13, 30])
    assert_ends_as_its_good_steps(result)
    skipped = events(corpus, "skipped", "skip")
    assert [(e["step"], e["reason"], e["loss"] is None) for e in skipped] == [
        (4, "not finite", False),
        (8, "not finite", False),
    ]
    assert [e["step"] for e in events(corpus, "step", "skip")] == [1, 2, 3, 5, 6, 7]
    (stage,) = events(corpus, "finished", "skip")[0]["summary"]["stages"]
    assert stage["loss"] == events(corpus, "step", "skip")[-1]["loss"]


def test_skips_in_a_row_are_counted_over_a_crash_and_end_the_run(run_in, corpus):
    run = settings(corpus, every=1, nonfinite="skip", max_skips=2)
    bad = range(12, 32)
    assert [end for end, *_ in run_in(run, "row", bad=bad, crash=5)] == ["crashed"] * 2
    for end, *_ in run_in(run, "row", bad=bad):
        assert end.startswith("3 steps in a row were skipped, 4 to 6: recovery.max_skips is 2")


def test_spikes_are_the_same_ones_after_a_crash(run_in, corpus):
    """The window is full at the checkpoint only: without it the next step would be applied."""
    run = settings(corpus, every=4, spike="skip", window=4, sigma=50)
    how = {"bad": [17], "factor": 1e6}
    straight = run_in(run, "spikes", **how)
    assert_ends_as_its_good_steps(straight)
    assert [(e["step"], e["reason"]) for e in events(corpus, "skipped", "spikes")] == [(5, "spike")]
    run_in(run, "spikes-crashed", crash=4, **how)
    resumed = run_in(run, "spikes-crashed", **how)
    assert [state for _, state, *_ in resumed] == [state for _, state, *_ in straight]
    assert len(events(corpus, "skipped", "spikes-crashed")) == 1


def test_a_new_stage_compares_with_its_own_steps_only(run_in, corpus):
    """The first step of each is bad: the window is empty, and without it full of good steps."""
    run = settings(corpus, steps=4, stages=2, spike="skip", window=3, sigma=50)
    assert [end for end, *_ in run_in(run, "stages", bad=[1], factor=1e6)] == [True, True]
    assert events(corpus, "skipped", "stages") == []


# Step 5 is bad, and after it step 6 of the data behind: both go back to the checkpoint at 3.
TWICE = {"bad": [17, 30]}
REWOUND = [
    {"from": 5, "to": 3, "sequences": 8, "reason": "not finite"},
    {"from": 6, "to": 3, "sequences": 12, "reason": "not finite"},
]


@pytest.fixture(scope="module")
def rewound(run_in, corpus):
    """What a run that goes back twice ends in."""
    return run_in(settings(corpus, nonfinite="rewind"), "rewind", **TWICE)


def test_a_rewind_leaves_out_the_data_and_keeps_the_number_of_steps(rewound, corpus):
    result = rewound
    assert_ends_as_its_good_steps(result)
    assert events(corpus, "rewound", "rewind") == REWOUND
    starts = [0, 4, 8, 32, 36, 40, 44, 48]
    assert first_sequences(result) == dict(enumerate(starts))
    names = sorted(path.name for path in (corpus / "rewind" / "checkpoints").glob("step-*"))
    assert names == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("how", [{"crash": 9}, {"kill": True}], ids=str)
def test_ended_around_a_rewind_it_comes_to_the_same_end(run_in, corpus, rewound, how):
    """Calls 0 to 5 end with the first rewind, 6 to 8 with the second; a kill: before its record."""
    run, name = settings(corpus, nonfinite="rewind"), f"ended-{next(iter(how))}"
    ended = run_in(run, name, **TWICE, **how)
    assert ended is None or [end for end, *_ in ended] == ["crashed"] * 2
    resumed = run_in(run, name, **TWICE)
    assert [end for end, *_ in resumed] == [True, True]
    assert [state for _, state, *_ in resumed] == [state for _, state, *_ in rewound]
    assert events(corpus, "rewound", name) == REWOUND


def test_without_a_checkpoint_a_rewind_starts_again(run_in, corpus):
    result = run_in(settings(corpus, steps=4, nonfinite="rewind"), "start", bad=[5])
    assert_ends_as_its_good_steps(result)
    assert events(corpus, "rewound", "start")[0]["to"] == 0
    assert first_sequences(result) == {0: 8, 1: 12, 2: 16, 3: 20}


def test_a_rewind_goes_back_further_but_not_into_the_stage_before(run_in, corpus):
    run = settings(corpus, steps=4, stages=2, every=2, keep=9, nonfinite="rewind", back=2)
    result = run_in(run, "back", bad=[13])
    assert [end for end, *_ in result] == [True, True]
    found = [(e["from"], e["to"], e["sequences"]) for e in events(corpus, "rewound", "back")]
    # At step 4 of each stage: one checkpoint in it, and before the second one another.
    assert found == [(4, 2, 8), (8, 4, 16)]
    paths = sorted((corpus / "back" / "checkpoints").glob("step-*"))
    cursors = [read_manifest(CheckpointFiles.of(path)).cursor for path in paths]
    # The one at 6 is a new one: the old one was removed.
    assert [(c.step, c.next_sample) for c in cursors] == [(2, 8), (4, 24), (6, 24), (8, 32)]


def test_the_run_ends_after_too_many_rewinds(run_in, corpus):
    run = settings(corpus, nonfinite="rewind", max_rewinds=1)
    for end, *_ in run_in(run, "often", **TWICE):
        assert end.startswith("the run went back 1 times (recovery.max_rewinds) and now step 6 ")


def test_a_signal_to_one_rank_before_the_first_step_saves_once_and_goes_on(run_in, corpus):
    run = settings(corpus, steps=4, every=100)
    assert_ends_as_its_good_steps(run_in(run, "save", signals=[signal.SIGUSR1]))
    assert [e["step"] for e in events(corpus, "saved", "save")] == [2, 4]


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while the stage opens"])
def test_a_stop_before_the_first_step_takes_none(run_in, corpus, late):
    name = f"stop-{late}"
    found = run_in(settings(corpus, steps=4), name, signals=[signal.SIGTERM], late=late)
    assert found == [(False, None, [], None)] * 2
    assert events(corpus, "step", name) == [] and len(events(corpus, "stopped", name)) == 1
