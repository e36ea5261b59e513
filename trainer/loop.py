"""A run: its stages one after the other, from wherever the newest checkpoint left off."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..attention.catalogue import words
from ..cache import default_cache
from ..errors import CheckpointError
from .checkpoint.cursor import Cursor
from .checkpoint.folders import FolderName
from .checkpoint.loader import Checkpoint, newest, refuse_damaged, refuse_other_rope
from .checkpoint.saver import Outcome, Saver, State
from .checkpoint.store import open_store
from .checkpoint.stored import StoredState
from .conditions import machine_conditions, order, stage_conditions
from .context_proof import context_proof
from .convert.companions import keep_companions
from .convert.weights import FolderWeights
from .data.corpus import Corpus, prepare_corpus
from .data.packing import Packing
from .data.samples import HeldOutSamples, LongDocuments, TrainingSamples
from .engine.checkpoint import load_state, model_dtype, state_pieces, state_steps
from .engine.engine import Engine
from .evaluation import held_out_loss
from .exactness import Conditions, Promise, declared, described, go_on
from .observe.observer import Observer
from .plan import plan_stage
from .run_directory import RunDirectory, settings_hash, write_atomically
from .settings import RunSettings, StageSettings
from .stage_loop import StageEnd, StageLoop
from .stopping import StopRequest


@dataclass
class _Stage:
    """A stage at work: its settings, documents and their order, engine and conditions."""

    index: int
    settings: StageSettings
    corpus: Corpus
    packing: Packing
    engine: Engine
    conditions: Conditions


class Run:
    """One attempt at a run on this rank.

    Args:
        directory: The run's folder.
        run: Its settings.
        observer: Told what happens; silent on ranks other than 0.
        stop: Set by a signal.
    """

    def __init__(
        self, directory: RunDirectory, run: RunSettings, observer: Observer, stop: StopRequest
    ) -> None:
        self.directory, self.run, self.observer, self.stop = directory, run, observer, stop
        self.plans = [plan_stage(stage, dist.get_world_size()) for stage in run.stages]
        self.steps = sum(plan.steps for plan in self.plans)
        self.first = dist.get_rank() == 0
        self.store = open_store(run.checkpoint.where, directory.path)
        self.saver = Saver(self.store, run.checkpoint)
        self.machine = machine_conditions(run)
        self.promise: Promise | None = None
        """None until the first stage of this attempt is open."""

    def train(self) -> bool:
        """Train what is left. Returns whether the run is complete (else it was asked to stop)."""
        begun = time.monotonic()
        self.observer.run_started(self._info())
        checkpoint = self._found()
        cursor = Cursor() if checkpoint is None else checkpoint.cursor
        done_before = cursor.tokens
        while True:
            last = cursor.stage + 1 == len(self.run.stages)
            if not last and self._closed(cursor):
                cursor = replace(cursor, stage=cursor.stage + 1, stage_step=0, next_sample=0)
                continue
            stage = self._open_stage(cursor, checkpoint)
            end = self._train_stage(stage, cursor)
            cursor = end.cursor
            if end.stopped:
                self.observer.stopped(cursor.step, "asked to stop")
                return False
            self._close_stage(stage, cursor, end.loss)
            if last:
                seconds = time.monotonic() - begun
                self._finish(stage, cursor, seconds, (cursor.tokens - done_before) / seconds)
                return True
            checkpoint = newest(self.store)
            del stage
            gc.collect()

    def _found(self) -> Checkpoint | None:
        """The newest checkpoint, every byte of which is what was written.

        What an attempt left half-written that was killed is removed.
        """
        checkpoint = newest(self.store)
        if checkpoint is not None:
            refuse_damaged(checkpoint)
            self.saver.committed = checkpoint.cursor.step
        if self.first:
            for folder in self.store.unfinished():
                self.store.remove(folder)
        return checkpoint

    def _open_stage(self, cursor: Cursor, checkpoint: Checkpoint | None) -> _Stage:
        """Build the stage's engine and load the newest checkpoint into it."""
        settings, folder = self.run.stages[cursor.stage], self.run.model.folder
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
        packing = self._packing(settings, corpus, cursor.stage)
        now = stage_conditions(self.run, cursor.stage, self.machine, corpus, engine.choice)
        stage = _Stage(cursor.stage, settings, corpus, packing, engine, now)
        if self.promise is None:
            self.promise = self._promise(stage, cursor, checkpoint)
        if checkpoint is not None:
            inside = cursor.stage_step > 0
            if inside:
                refuse_other_rope(checkpoint, settings.rope)
            optimizer = inside or settings.carry_optimizer
            new = load_state(engine, StoredState(checkpoint.files), optimizer=optimizer)
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

    def _promise(self, stage: _Stage, cursor: Cursor, checkpoint: Checkpoint | None) -> Promise:
        """What the run promises: at its start, or after a resume, which is told and may be refused.

        Raises:
            RunError: The resume would be less exact than it may be.
        """
        if checkpoint is None:
            level, _ = declared(self.machine["device"])
            return Promise(level, level)
        resume = go_on(
            checkpoint.manifest.info,
            _at(stage, cursor),
            inside=cursor.stage_step > 0,
            setting=self.run.checkpoint.exactness,
            checkpoint=checkpoint.name,
            run=str(self.directory),
        )
        words = f"going on from {checkpoint.name}, stage {stage.settings.name}: {resume.words}"
        self.observer.message(words)
        return resume.promise

    def _packing(self, settings: StageSettings, corpus: Corpus, index: int) -> Packing:
        """The order of a stage's data."""
        plan = self.plans[index]
        return Packing(
            corpus.train.lengths,
            settings.length,
            seed=self.run.seed,
            stage=settings.name,
            sequences=plan.steps * plan.sequences_per_step,
        )

    def _corpus(self, settings: StageSettings) -> Corpus:
        """The stage's documents. Rank 0 comes first, so that it is the one that shows progress."""
        if not self.first:
            dist.barrier()
        corpus = prepare_corpus(
            settings.data,
            self.run.tokenizer,
            tokenizer_data=tuple(other.data for other in self.run.stages),
            cache=default_cache(),
            progress=self.first,
        )
        if self.first:
            dist.barrier()
        return corpus

    def _train_stage(self, stage: _Stage, cursor: Cursor) -> StageEnd:
        settings, plan = stage.settings, self.plans[stage.index]
        self.observer.stage_started(settings.name, stage.index, self._stage_info(stage))
        loop = StageLoop(
            self.run,
            settings,
            plan,
            steps=self.steps,
            engine=stage.engine,
            samples=TrainingSamples(stage.corpus.train, stage.packing),
            observer=self.observer,
            stop=self.stop,
            save=lambda at, wait: self._save(stage, at, wait),
            poll=self._poll,
            evaluate=lambda at: self._evaluate(stage, at),
        )
        end = loop.train(cursor)
        if end.cursor.stage_step == plan.steps:
            self._save(stage, end.cursor, wait=True)
        return end

    def _save(self, stage: _Stage, cursor: Cursor, wait: bool) -> None:
        """Begin to save, or save; tell how the save before it ended."""
        engine = stage.engine
        assert self.promise is not None
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
            "conditions": _at(stage, cursor).record(),
            "exactness": self.promise.record(),
        }

        def state() -> State:
            return State(state_pieces(engine), model_dtype(engine), state_steps(engine))

        self._tell(self.saver.save(state, cursor, info, wait=wait))
        if not wait:
            return
        done = self.saver.wait()
        self._tell(done)
        if done is not None and done.error is not None:
            raise done.error

    def _poll(self) -> None:
        """Tell how the save in flight ended, if it has."""
        self._tell(self.saver.poll())

    def _tell(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        step = outcome.cursor.step
        if outcome.error is not None:
            self.observer.alarm("checkpoint", step, f"not saved: {outcome.error}")
            return
        where = Path(self.store.root) / str(outcome.name)
        self.observer.saved(step, where, outcome.seconds)
        if outcome.warning:
            self.observer.warning(f"after the checkpoint of step {step}: {outcome.warning}")

    def _evaluate(self, stage: _Stage, cursor: Cursor) -> float:
        """Held-out loss of the live weights."""
        held_out = HeldOutSamples(stage.corpus.held_out, stage.settings.length)
        count = min(len(held_out), self.run.evaluation.sequences)
        loss = held_out_loss(stage.engine, [held_out[number] for number in range(count)])
        self.observer.evaluated("held_out", cursor.step, {"loss": loss, "sequences": count})
        return loss

    def _report_path(self, index: int) -> Path:
        return self.directory.evaluations / f"{self.run.stages[index].name}.json"

    def _closed(self, cursor: Cursor) -> bool:
        """Whether rank 0 has the final report of a stage that is trained to its end."""
        ended = cursor.stage_step == self.plans[cursor.stage].steps
        found = [self._report_path(cursor.stage).is_file()]
        dist.broadcast_object_list(found)
        return ended and found[0]

    def _close_stage(self, stage: _Stage, cursor: Cursor, loss: float) -> None:
        """Evaluate a stage at its end and leave its report."""
        held_out = self._evaluate(stage, cursor)
        report: dict[str, Any] = {
            "name": stage.settings.name,
            "length": stage.settings.length,
            "steps": self.plans[stage.index].steps,
            "tokens": self.plans[stage.index].sequences_per_step
            * self.plans[stage.index].steps
            * stage.settings.length,
            "loss": loss,
            "held_out_loss": held_out,
        }
        if stage.index + 1 == len(self.run.stages) and self.run.evaluation.documents:
            report["context"] = self._prove(stage, cursor)
        if self.first:
            write_atomically(self._report_path(stage.index), json.dumps(report, indent=2) + "\n")

    def _prove(self, stage: _Stage, cursor: Cursor) -> dict[str, Any] | None:
        """The proof of context, or None with a warning where the data have no long documents."""
        settings, wanted = self.run.evaluation, self.run.evaluation.documents
        long = LongDocuments(stage.corpus.held_out, stage.settings.length, wanted)
        if not len(long):
            self.observer.warning(
                f"no held-out document is longer than {stage.settings.length} tokens, so the run "
                "ends without a proof of context; raise held_out or add longer documents"
            )
            return None
        samples = [long[number] for number in range(len(long))]
        proof = context_proof(stage.engine, samples, settings.visible)
        self.observer.evaluated("context", cursor.step, proof["gain"])
        return proof

    def _finish(self, stage: _Stage, cursor: Cursor, seconds: float, speed: float) -> None:
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
            "checkpoint": f"{self.store}/{FolderName(cursor.step)}",
            "stages": reports,
            "evaluations": [{"name": "held-out documents", **proof}] if proof else [],
            "exactness": self.promise.record() if self.promise else None,
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

    def _stage_info(self, stage: _Stage) -> dict[str, Any]:
        settings, plan = stage.settings, self.plans[stage.index]
        parallel = settings.parallel
        return {
            "length": settings.length,
            "steps": plan.steps,
            "tokens_per_step": plan.sequences_per_step * settings.length,
            "rope": settings.rope.words,
            "attention": words(settings.attention, self.run.model.layers),
            "parallel": parallel.model_dump() | {"data": plan.data},
            "exchange": stage.engine.choice.words if parallel.context > 1 else None,
            "parameters": stage.engine.parameters,
            "data": stage.corpus.info,
        }


def _at(stage: _Stage, cursor: Cursor) -> Conditions:
    """The stage's conditions with the order of its data up to the cursor."""
    sequences = order(stage.packing, cursor.next_sample)
    return replace(stage.conditions, data={**stage.conditions.data, **sequences})
