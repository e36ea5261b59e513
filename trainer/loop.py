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
from . import checkpoints
from .checkpoints import Cursor
from .context_proof import context_proof
from .convert.companions import keep_companions
from .convert.weights import FolderWeights
from .data.corpus import Corpus, prepare_corpus
from .data.packing import Packing
from .data.samples import HeldOutSamples, LongDocuments, TrainingSamples
from .engine.engine import Engine
from .evaluation import held_out_loss
from .observe.goodput import goodput_so_far
from .observe.observer import Observer
from .plan import plan_stage
from .run_directory import RunDirectory, settings_hash, write_atomically
from .settings import RunSettings, StageSettings
from .stage_loop import StageEnd, StageLoop
from .stopping import StopRequest


@dataclass
class _Stage:
    """A stage at work: its settings, documents and engine."""

    index: int
    settings: StageSettings
    corpus: Corpus
    engine: Engine


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

    def train(self) -> bool:
        """Train what is left. Returns whether the run is complete (else it was asked to stop)."""
        begun = time.monotonic()
        self.observer.run_started(self._info())
        newest = checkpoints.newest(self.directory.checkpoints)
        cursor = Cursor() if newest is None else checkpoints.read_cursor(newest)
        done_before = cursor.tokens
        if newest is not None:
            self.observer.message(f"going on from {newest.name}, stage {cursor.stage}")
        while True:
            last = cursor.stage + 1 == len(self.run.stages)
            if not last and self._closed(cursor):
                cursor = replace(cursor, stage=cursor.stage + 1, stage_step=0, next_sample=0)
                continue
            stage = self._open_stage(cursor, newest)
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
            newest = checkpoints.newest(self.directory.checkpoints)
            del stage
            gc.collect()

    def _open_stage(self, cursor: Cursor, newest: Path | None) -> _Stage:
        """Build the stage's engine and load the newest checkpoint into it."""
        settings, folder = self.run.stages[cursor.stage], self.run.model.folder
        weights = None
        if newest is None and folder is not None:
            weights = FolderWeights(folder)  # before the data: it says at once what is wrong
        corpus = self._corpus(settings)
        if self.first:
            tokenizer = corpus.tokenizer_path
            if folder is not None and self.run.keeps_tokenizer:
                tokenizer = folder  # with all of its files
            keep_companions(self.directory.companions, folder, tokenizer)
        vocab = self.run.model.vocab or corpus.vocab
        engine = Engine(self.run, settings, vocab, weights=weights)
        if newest is not None:
            inside = cursor.stage_step > 0
            if inside:
                checkpoints.refuse_other_rope(newest, settings.rope)
            begun = time.monotonic()
            new = checkpoints.load(newest, engine, optimizer=inside or settings.carry_optimizer)
            self.observer.restored(cursor.step, newest, time.monotonic() - begun)
            if new and inside:
                raise CheckpointError(
                    f"checkpoint {newest} lacks parameters that its own stage has: {new[0]}",
                    "resume with the recipe that it was written with",
                )
            if new:
                self.observer.message(
                    f"stage {settings.name} adds {len(new)} parameter tensors to those of "
                    f"{newest.name}: they start from the seed, with moments of zero"
                )
        return _Stage(cursor.stage, settings, corpus, engine)

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
        packing = Packing(
            stage.corpus.train.lengths,
            settings.length,
            seed=self.run.seed,
            stage=settings.name,
            sequences=plan.steps * plan.sequences_per_step,
        )
        self.observer.stage_started(settings.name, stage.index, self._stage_info(stage))
        loop = StageLoop(
            self.run,
            settings,
            plan,
            steps=self.steps,
            engine=stage.engine,
            samples=TrainingSamples(stage.corpus.train, packing),
            observer=self.observer,
            stop=self.stop,
            save=lambda at: self._save(stage, at),
            evaluate=lambda at: self._evaluate(stage, at),
        )
        end = loop.train(cursor)
        if end.cursor.stage_step == plan.steps:
            self._save(stage, end.cursor)
        return end

    def _save(self, stage: _Stage, cursor: Cursor) -> None:
        begun = time.monotonic()
        info = {
            "stage_name": stage.settings.name,
            "ranks": dist.get_world_size(),
            "parallel": stage.settings.parallel.model_dump(),
            "rope": stage.settings.rope.model_dump(mode="json"),
            "attention": stage.settings.attention.model_dump(mode="json"),
            "model": self.run.model.model_dump(mode="json"),
            "vocab": stage.engine.model.real_vocab,
            "length": stage.settings.length,
            "precision": self.run.precision,
            "recipe": settings_hash(self.run),
        }
        path = checkpoints.save(
            self.directory.checkpoints,
            stage.engine,
            cursor,
            keep=self.run.checkpoint.keep,
            info=info,
        )
        seconds = time.monotonic() - begun
        self.observer.saved(cursor.step, path, seconds, stall_s=seconds)

    def _evaluate(self, stage: _Stage, cursor: Cursor) -> float:
        """Held-out loss of the live weights."""
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
        begun = time.monotonic()
        samples = [long[number] for number in range(len(long))]
        proof = context_proof(stage.engine, samples, settings.visible)
        seconds = time.monotonic() - begun
        self.observer.evaluated("context", cursor.step, proof["gain"], seconds)
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
            "checkpoint": str(self.directory.checkpoints / checkpoints.name(cursor)),
            "stages": reports,
            "evaluations": [{"name": "held-out documents", **proof}] if proof else [],
            "goodput": goodput_so_far(self.directory.events).as_dict(),
        }
        self.directory.mark_complete(summary)
        self.observer.finished(summary)

    def _info(self) -> dict[str, Any]:
        stages = [
            {"name": stage.name, "steps": plan.steps, "tokens": stage.tokens}
            for stage, plan in zip(self.run.stages, self.plans, strict=True)
        ]
        return {"stages": stages, "steps": self.steps, "ranks": dist.get_world_size()}

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
