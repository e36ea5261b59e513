"""A run: its stages one after the other, from wherever the newest checkpoint left off."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..cache import default_cache
from ..errors import CheckpointError
from .bad_steps import BadStep, BadSteps
from .checkpoint.cursor import Cursor
from .checkpoint.loader import Checkpoint, refuse_other_rope
from .checkpoint.stored import StoredState
from .conditions import machine_conditions, stage_conditions
from .context_proof import context_proof
from .convert.companions import keep_companions
from .convert.weights import FolderWeights
from .data.corpus import Corpus, prepare_corpus
from .data.packing import Packing
from .data.samples import HeldOutSamples, LongDocuments, TrainingSamples
from .engine.checkpoint import load_state
from .engine.engine import Engine
from .evaluation import held_out_loss
from .exactness import Promise, declared, described, go_on
from .going_back import GoingBack
from .heartbeat import Heartbeat
from .observe.goodput import goodput_so_far
from .observe.observer import Observer
from .observe.tracking import identity
from .open_stage import OpenStage
from .plan import plan_stage
from .platform import barrier
from .run_directory import RunDirectory, settings_hash, write_atomically
from .saves import Saves
from .settings import RunSettings, StageSettings
from .stage_loop import StageEnd, StageLoop
from .stopping import StopRequest


class Run:
    """One attempt at a run on this rank.

    Args:
        directory: The run's folder.
        run: Its settings.
        observer: Told what happens; silent on ranks other than 0.
        stop: Set by a signal.
        beat: Told what this rank is at.
    """

    def __init__(
        self,
        directory: RunDirectory,
        run: RunSettings,
        observer: Observer,
        stop: StopRequest,
        beat: Heartbeat | None = None,
    ) -> None:
        self.directory, self.run, self.observer, self.stop = directory, run, observer, stop
        self.beat = beat or Heartbeat()
        self.plans = [plan_stage(stage, dist.get_world_size()) for stage in run.stages]
        self.steps = sum(plan.steps for plan in self.plans)
        self.first = dist.get_rank() == 0
        self.saves = Saves(directory, run, observer)
        self.machine = machine_conditions(run)
        self.promise: Promise | None = None
        """None until the first stage of this attempt is open."""
        self.loss: float | None = None
        """Of the last step of a stage that is trained to its end."""
        self.bad = BadSteps(run.recovery)
        self.going_back = GoingBack(directory, self.saves.store, run.recovery)

    def train(self) -> bool:
        """Train what is left. Returns whether the run is complete (else it was asked to stop)."""
        try:
            return self._train()
        finally:
            self.saves.close()

    def _train(self) -> bool:
        begun = time.monotonic()
        self.observer.run_started(self._info())
        checkpoint = self.saves.found()
        cursor = Cursor() if checkpoint is None else checkpoint.cursor
        done_before = cursor.tokens
        while True:
            last = cursor.stage + 1 == len(self.run.stages)
            if not last and self._closed(cursor):
                cursor = replace(cursor, stage=cursor.stage + 1, stage_step=0, next_sample=0)
                continue
            cursor = self.going_back.where(cursor)
            stage = None if self._asked_to_stop() else self._open_stage(cursor, checkpoint)
            if stage is None or self._asked_to_stop():  # before a step: there is nothing to save
                self.observer.stopped(cursor.step, "asked to stop")
                return False
            end = self._train_stage(stage, cursor)
            cursor = end.cursor
            if end.stopped:
                self.observer.stopped(cursor.step, "asked to stop")
                return False
            if end.bad is not None:
                checkpoint = self._go_back(stage.index, end.bad)
                cursor = Cursor() if checkpoint is None else checkpoint.cursor
                del stage
                gc.collect()
                continue
            self._close_stage(stage, cursor)
            if last:
                seconds = time.monotonic() - begun
                self._finish(stage, cursor, seconds, (cursor.tokens - done_before) / seconds)
                return True
            checkpoint = self.saves.newest()
            del stage
            gc.collect()

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop."""
        asked = [False] * dist.get_world_size()
        dist.all_gather_object(asked, self.stop.requested)
        return any(asked)

    def _go_back(self, stage: int, bad: BadStep) -> Checkpoint | None:
        """Leave a bad step's data out; the checkpoint to go on from, None: the start of the run."""
        self.saves.settle()
        begin = sum(plan.steps for plan in self.plans[:stage])
        checkpoint, rewind = self.going_back.go_back(bad, stage, begin)
        self.saves.going_on_from(checkpoint)
        self.observer.rewound(bad.step, rewind.to, rewind.sequences, bad.reason)
        return checkpoint

    def _open_stage(self, cursor: Cursor, checkpoint: Checkpoint | None) -> OpenStage:
        """Build the stage's engine and load the newest checkpoint into it."""
        self.beat.enter("open", cursor.step, cursor.stage)
        settings, folder = self.run.stages[cursor.stage], self.run.model.folder
        plan = self.plans[cursor.stage]
        weights = None
        if checkpoint is None and folder is not None:
            weights = FolderWeights(folder)  # before the data: it says at once what is wrong
        corpus = self._corpus(settings)
        if self.first:
            tokenizer = corpus.tokenizer_path
            if folder is not None and self.run.keeps_tokenizer:
                tokenizer = folder  # with all of its files
            keep_companions(self.directory.companions, folder, tokenizer)
        vocab = self.run.model.vocab or corpus.vocab
        engine = Engine(self.run, settings, vocab, weights=weights)
        self.bad = BadSteps(self.run.recovery)
        packing = self._packing(settings, corpus, cursor)
        now = stage_conditions(self.run, cursor.stage, self.machine, corpus, engine.choice)
        stage = OpenStage(cursor.stage, settings, plan, corpus, packing, engine, now)
        if self.promise is None:
            self.promise = self._promise(stage, cursor, checkpoint)
        if checkpoint is not None:
            inside = cursor.stage_step > 0
            self._restore_recovery(checkpoint, engine, inside)
            if inside:
                refuse_other_rope(checkpoint, settings.rope)
            begun, optimizer = time.monotonic(), inside or settings.carry_optimizer
            new = load_state(engine, StoredState(checkpoint.files), optimizer=optimizer)
            where = Path(str(checkpoint.files))
            self.observer.restored(cursor.step, where, time.monotonic() - begun)
            if new and inside:
                raise CheckpointError(
                    f"checkpoint {checkpoint.files} lacks {new[0]}, which its own stage has",
                    "resume with the recipe that it was written with",
                )
            if new:
                self.observer.message(
                    f"stage {settings.name} adds {len(new)} parameter tensors to those of "
                    f"{checkpoint.name}: they start from the seed, with moments of zero"
                )
        return stage

    def _promise(self, stage: OpenStage, cursor: Cursor, checkpoint: Checkpoint | None) -> Promise:
        """What the run promises: at its start, or after a resume, which is told and may be refused.

        Raises:
            RunError: The resume would be less exact than it may be.
        """
        if checkpoint is None:
            level, _ = declared(self.machine["device"])
            return Promise(level, level)
        inside = cursor.stage_step > 0
        # A rewind may have moved the run's cursor behind data that the checkpoint never saw.
        resume = go_on(
            checkpoint.manifest.info,
            stage.conditions_at(checkpoint.cursor if inside else cursor),
            inside=inside,
            setting=self.run.checkpoint.exactness,
            checkpoint=checkpoint.name,
            run=str(self.directory),
        )
        words = f"going on from {checkpoint.name}, stage {stage.settings.name}: {resume.words}"
        self.observer.message(words)
        return resume.promise

    def _packing(self, settings: StageSettings, corpus: Corpus, cursor: Cursor) -> Packing:
        """The order of a stage's data; more of them than the steps need where some are left out."""
        plan = self.plans[cursor.stage]
        left = (plan.steps - cursor.stage_step) * plan.sequences_per_step
        return Packing(
            corpus.train.lengths,
            settings.length,
            seed=self.run.seed,
            stage=settings.name,
            sequences=cursor.next_sample + left,
        )

    def _restore_recovery(self, checkpoint: Checkpoint, engine: Engine, inside: bool) -> None:
        """What was skipped, and within a stage the steps that the next ones are compared with."""
        state, spikes = checkpoint.manifest.info, engine.spikes
        self.loss = state.get("loss")
        self.bad = BadSteps(self.run.recovery, state.get("skipped", ()))
        if spikes is None or not inside or not state.get("spikes"):
            return
        try:
            spikes.load(state["spikes"])
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {checkpoint.files} has other spikes than its recipe: {error}",
                "resume with the recipe that it was written with",
            ) from error

    def _corpus(self, settings: StageSettings) -> Corpus:
        """The stage's documents. Rank 0 comes first, so that it is the one that shows progress."""
        if not self.first:
            barrier()
        corpus = prepare_corpus(
            settings.data,
            self.run.tokenizer,
            tokenizer_data=tuple(other.data for other in self.run.stages),
            cache=default_cache(),
            progress=self.first,
        )
        if self.first:
            barrier()
        return corpus

    def _train_stage(self, stage: OpenStage, cursor: Cursor) -> StageEnd:
        settings, plan = stage.settings, stage.plan
        self.observer.stage_started(settings.name, stage.index, stage.about())
        loop = StageLoop(
            self.run,
            settings,
            plan,
            steps=self.steps,
            engine=stage.engine,
            samples=TrainingSamples(stage.corpus.train, stage.packing),
            observer=self.observer,
            stop=self.stop,
            bad=self.bad,
            beat=self.beat,
            save=lambda at, wait: self._save(stage, at, wait),
            poll=self.saves.poll,
            evaluate=lambda at: self._evaluate(stage, at),
        )
        end = loop.train(cursor)
        if end.cursor.stage_step == plan.steps and end.bad is None:
            if end.cursor.step > cursor.step:
                self.loss = end.loss
            self._save(stage, end.cursor, wait=True)
        return end

    def _save(self, stage: OpenStage, cursor: Cursor, wait: bool) -> None:
        """Begin to save, or save."""
        self.beat.enter("save", cursor.step)
        assert self.promise is not None
        engine, spikes = stage.engine, stage.engine.spikes
        info = {
            "stage_name": stage.settings.name,
            "ranks": dist.get_world_size(),
            "parallel": stage.settings.parallel.model_dump(),
            "rope": stage.settings.rope.model_dump(mode="json"),
            "attention": stage.settings.attention.model_dump(mode="json"),
            "model": self.run.model.model_dump(mode="json"),
            "vocab": engine.model.real_vocab,
            "length": stage.settings.length,
            "precision": self.run.precision,
            "recipe": settings_hash(self.run),
            "conditions": stage.conditions_at(cursor).record(),
            "exactness": self.promise.record(),
            "spikes": None if spikes is None else spikes.state(),
            "skipped": self.bad.in_a_row,
            "tracking": identity(self.directory),
            "loss": self.loss,
        }
        self.saves.save(engine, cursor, info, wait=wait)

    def _evaluate(self, stage: OpenStage, cursor: Cursor) -> float:
        """Held-out loss of the live weights."""
        self.beat.enter("evaluation", cursor.step)
        begun = time.monotonic()
        held_out = HeldOutSamples(stage.corpus.held_out, stage.settings.length)
        count = min(len(held_out), self.run.evaluation.sequences)
        loss = held_out_loss(stage.engine, [held_out[number] for number in range(count)])
        values = {"loss": loss, "sequences": count}
        self.observer.evaluated("held_out", cursor.step, values, time.monotonic() - begun)
        return loss

    def _report_path(self, index: int) -> Path:
        return self.directory.evaluations / f"{self.run.stages[index].name}.json"

    def _closed(self, cursor: Cursor) -> bool:
        """Whether rank 0 has the final report of a stage that is trained to its end."""
        ended = cursor.stage_step == self.plans[cursor.stage].steps
        found = [self._report_path(cursor.stage).is_file()]
        dist.broadcast_object_list(found)
        return ended and found[0]

    def _close_stage(self, stage: OpenStage, cursor: Cursor) -> None:
        """Evaluate a stage at its end and leave its report."""
        held_out = self._evaluate(stage, cursor)
        report: dict[str, Any] = {
            "name": stage.settings.name,
            "length": stage.settings.length,
            "steps": self.plans[stage.index].steps,
            "tokens": self.plans[stage.index].sequences_per_step
            * self.plans[stage.index].steps
            * stage.settings.length,
            "loss": self.loss,
            "held_out_loss": held_out,
        }
        if stage.index + 1 == len(self.run.stages) and self.run.evaluation.documents:
            report["context"] = self._prove(stage, cursor)
        if self.first:
            write_atomically(self._report_path(stage.index), json.dumps(report, indent=2) + "\n")

    def _prove(self, stage: OpenStage, cursor: Cursor) -> dict[str, Any] | None:
        """The proof of context, or None with a warning where the data have no long documents."""
        settings, wanted = self.run.evaluation, self.run.evaluation.documents
        long = LongDocuments(stage.corpus.held_out, stage.settings.length, wanted)
        if not len(long):
            self.observer.warning(
                f"no held-out document is longer than {stage.settings.length} tokens, so the run "
                "ends without a proof of context; raise held_out or add longer documents"
            )
            return None
        self.beat.enter("proof", cursor.step)
        begun = time.monotonic()
        samples = [long[number] for number in range(len(long))]
        proof = context_proof(stage.engine, samples, settings.visible)
        seconds = time.monotonic() - begun
        told = {**proof["gain"], "buckets": proof["buckets"]}
        self.observer.evaluated("context", cursor.step, told, seconds)
        return proof

    def _finish(self, stage: OpenStage, cursor: Cursor, seconds: float, speed: float) -> None:
        if not self.first:
            return
        reports = [
            json.loads(self._report_path(index).read_text()) for index in range(len(self.plans))
        ]
        proof = reports[-1].get("context")
        summary = {
            "steps": cursor.step,
            "tokens": cursor.tokens,
            "wall_s": seconds,
            "tokens_per_s": speed,
            "parameters": stage.engine.parameters,
            "checkpoint": self.saves.last,
            "stages": reports,
            "evaluations": [{"name": "held-out documents", **proof}] if proof else [],
            "exactness": self.promise.record() if self.promise else None,
            "goodput": goodput_so_far(self.directory.events).as_dict(),
        }
        self.directory.mark_complete(summary)
        self.observer.finished(summary)

    def _info(self) -> dict[str, Any]:
        stages = [
            {"name": stage.name, "steps": plan.steps, "tokens": stage.tokens}
            for stage, plan in zip(self.run.stages, self.plans, strict=True)
        ]
        level, reason = declared(self.machine["device"])
        return {
            "stages": stages,
            "steps": self.steps,
            "ranks": dist.get_world_size(),
            "machine": self.machine,
            "exactness": {"level": level, "meaning": described(level), "reason": reason},
        }
