"""One stage: its steps, each reported while the next one runs, its checkpoints and evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..attention.probe import Probe
from ..parallel.waiting import Waiting
from .bad_steps import BadStep, BadSteps
from .checkpoint.cursor import Cursor
from .context_load import ContextLoad
from .data.samples import Sample, TrainingSamples, join
from .engine.canary import compare
from .engine.engine import Engine
from .engine.optimizer import StepSums
from .engine.schedule import learning_rate
from .flops import FlopsCounter
from .heartbeat import Heartbeat
from .mfu_alarm import MfuAlarm
from .observe.observer import Observer
from .observe.sink import StepMetrics
from .plan import StagePlan
from .settings import RunSettings, StageSettings
from .stopping import StopRequest


@dataclass(frozen=True)
class _Pending:
    """A step that the device may still be working on."""

    sums: StepSums
    lr: float
    begun: float
    data_s: float
    cursor: Cursor
    probe: Probe | None
    context_bytes: int
    waiting: Waiting
    batches: list[Sample]


@dataclass(frozen=True)
class StageEnd:
    """How a stage was left.

    Attributes:
        cursor: Where.
        loss: Of the last step that was applied.
        stopped: Whether it was asked to stop early.
        bad: The step because of which the run must go back; it counts for nothing then.
    """

    cursor: Cursor
    loss: float
    stopped: bool
    bad: BadStep | None = None


class StageLoop:
    """Trains one stage.

    Args:
        run: The run's settings.
        stage: This stage's.
        plan: Its arithmetic.
        steps: Steps of the whole run.
        engine: Its model and optimizer.
        samples: Its sequences.
        observer: Told of every step.
        stop: Set by a signal.
        bad: Decides what follows a bad step.
        beat: Told what this rank is at.
        save: Called with the cursor where a checkpoint is due, and whether to wait for it.
        poll: Called after every step.
        evaluate: Called with the cursor where an evaluation is due.
    """

    def __init__(
        self,
        run: RunSettings,
        stage: StageSettings,
        plan: StagePlan,
        *,
        steps: int,
        engine: Engine,
        samples: TrainingSamples,
        observer: Observer,
        stop: StopRequest,
        bad: BadSteps,
        beat: Heartbeat,
        save: Callable[[Cursor, bool], None],
        poll: Callable[[], None],
        evaluate: Callable[[Cursor], object],
    ) -> None:
        self.run, self.stage, self.plan, self.steps = run, stage, plan, steps
        self.engine, self.samples, self.observer, self.stop = engine, samples, observer, stop
        self.bad, self.save, self.poll, self.evaluate = bad, save, poll, evaluate
        self.beat = beat
        self._loss, self._stopping, self._save_asked = math.nan, False, False
        self._back: BadStep | None = None
        self._load = ContextLoad(run.model, stage, engine.choice)
        self._count = FlopsCounter(run.model, stage, engine.model.real_vocab)
        self._peak = engine.peak_flops
        self._alarm = MfuAlarm(self._peak)

    def train(self, cursor: Cursor) -> StageEnd:
        """Train from `cursor` to the end of the stage, to a stop (agreed and saved) or a rewind.

        Every rank reads the same sums, so all of them stop, save and go back after the same step.
        """
        pending: _Pending | None = None
        if cursor.stage_step < self.plan.steps:
            self._compare(cursor)
        while cursor.stage_step < self.plan.steps and not self._stopping:
            begun = time.monotonic()
            self._tell(cursor)
            if pending is None:
                self._alarm.idle()
            lr = learning_rate(self.stage.optimizer, cursor.stage_step, self.plan.steps)
            key = (self.run.seed, self.stage.name, cursor.stage_step)
            batches = self._micro_batches(cursor.next_sample)
            data_s = time.monotonic() - begun
            probe = self._probe(cursor.step + 1)
            traffic = self.engine.traffic
            _ = traffic.take(), traffic.take_waiting()  # an evaluation may have been between
            asked = self.stop.requested
            sums = self.engine.train_step(
                batches, lr, asked, key, probe, save=self.stop.take_save()
            )
            sent = traffic.take(), traffic.take_waiting()
            if pending is not None:
                self._report(pending, begun)
            cursor = self._after_step(cursor)
            pending = _Pending(sums, lr, begun, data_s, cursor, probe, *sent, batches)
            if self._back is None and self._must_report(cursor):
                self._report(pending, time.monotonic())
                pending = None
            # What ran after a bad step may have been applied, and is thrown away with the rest.
            if self._back is not None:
                return StageEnd(cursor, self._loss, False, self._back)
            if cursor.stage_step < self.plan.steps:
                self._evaluate_and_save(cursor)
            self.poll()
        return StageEnd(cursor, self._loss, self._stopping)

    def _tell(self, cursor: Cursor) -> None:
        """Let whoever watches know that the step after a cursor begins."""
        self.beat.computed(self.engine.own_time.seconds())
        self.beat.enter("step", cursor.step + 1)

    def _must_report(self, cursor: Cursor) -> bool:
        """Whether the step that ended at a cursor has to be over before anything else."""
        ended = cursor.stage_step == self.plan.steps
        asked = self._stopping or self._save_asked
        return ended or asked or self._save_due(cursor) or self._evaluation_due(cursor)

    def _save_due(self, cursor: Cursor) -> bool:
        return cursor.step % self.run.checkpoint.every == 0

    def _evaluation_due(self, cursor: Cursor) -> bool:
        every = self.run.evaluation.every
        return every > 0 and cursor.step % every == 0

    def _evaluate_and_save(self, cursor: Cursor) -> None:
        """What is due between two steps; at the end of a stage the run does both."""
        if self._evaluation_due(cursor):
            self.evaluate(cursor)
        if self._save_due(cursor) or self._stopping or self._save_asked:
            self.save(cursor, self._stopping)
            self._save_asked = False

    def _compare(self, cursor: Cursor) -> None:
        """Stop before the first step if context ranks do not compute what one rank does."""
        parallel = self.stage.parallel
        if parallel.context == 1 or not parallel.canary:
            return
        self.beat.enter("canary", cursor.step)
        comparison = compare(self.engine, self._micro_batches(cursor.next_sample)[0])
        self.observer.compared(cursor.step, comparison.values)
        comparison.demand(self.run, self.stage)

    def _probe(self, step: int) -> Probe | None:
        """What measures a step's attention, where it is due."""
        settings = self.run.telemetry
        if not settings.every or step % settings.every:
            return None
        return Probe(self.run.model.layers, settings.rows, self.engine.device)

    def _flops(self, after: Cursor) -> float:
        """What the model needs for the documents of the step that ended at a cursor."""
        first = after.next_sample - self.plan.sequences_per_step
        packed = (self.samples.packing[number] for number in range(first, after.next_sample))
        return self._count(piece.length for pieces in packed for piece in pieces)

    def _micro_batches(self, first: int) -> list[Sample]:
        """This data rank's micro-batches of the step whose sequences begin at `first`."""
        width, data = self.stage.micro_batch, self.plan.data
        starts = [
            first + (number * data + self.engine.data_rank) * width
            for number in range(self.plan.micro_batches)
        ]
        return [join([self.samples[start + i] for i in range(width)]) for start in starts]

    def _after_step(self, cursor: Cursor) -> Cursor:
        sequences = self.plan.sequences_per_step
        return replace(
            cursor,
            step=cursor.step + 1,
            stage_step=cursor.stage_step + 1,
            next_sample=cursor.next_sample + sequences,
            tokens=cursor.tokens + sequences * self.stage.length,
        )

    def _report(self, pending: _Pending, ended: float) -> None:
        """Read a step's sums, which waits for the device, and tell the observer."""
        sums, at = pending.sums.on_host(), pending.cursor
        self._stopping = self._stopping or sums["stop"] > 0
        self._save_asked = self._save_asked or sums["save"] > 0
        if sums["skipped"]:
            self._report_bad(at, sums)
            return
        self.bad.applied()
        self._loss = sums["loss"] / sums["tokens"]
        seconds, flops = ended - pending.begun, self._flops(at)
        tokens = self.plan.sequences_per_step * self.stage.length
        places = ((self.engine.place(s).layout, s.cu_seqlens) for s in pending.batches)
        self.observer.step(
            StepMetrics(
                step=at.step,
                steps=self.steps,
                stage=self.stage.name,
                stage_step=at.stage_step,
                stage_steps=self.plan.steps,
                tokens=at.tokens,
                loss=self._loss,
                grad_norm=math.sqrt(sums["square_norm"]),
                lr=pending.lr,
                tokens_per_s=tokens / seconds,
                step_s=seconds,
                data_s=pending.data_s,
                losses=pending.sums.noted(),
                tflops_per_s=flops / seconds / 1e12,
                mfu=None if self._peak is None else flops / seconds / self._peak,
                context_bytes=pending.context_bytes,
                context_wait_s=pending.waiting.seconds(),
                imbalance=self._load.imbalance(places),
                peak_bytes=self.engine.peak_memory,
            )
        )
        if (text := self._alarm.done(flops)) is not None:
            self.observer.alarm("mfu", at.step, text)
        if pending.probe is not None:
            self.observer.observed(at.step, pending.probe.table())

    def _report_bad(self, at: Cursor, sums: dict[str, float]) -> None:
        """Decide what follows a step that was not applied; its loss is none of the stage's."""
        bad = BadStep(
            step=at.step,
            stage=self.stage.name,
            stage_step=at.stage_step,
            next_sample=at.next_sample,
            reason="spike" if sums["spike"] else "not finite",
            loss=sums["loss"] / sums["tokens"],
            grad_norm=math.sqrt(sums["square_norm"]),
        )
        if self.bad.decide(bad) == "rewind":
            self._back = bad
        else:
            self.observer.skipped(bad.step, bad.loss, bad.grad_norm, bad.reason)
