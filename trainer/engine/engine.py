"""One stage's model, optimizer and schedule on this rank: train a step, evaluate, count."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from ...attention.layer_settings import auxiliary_losses
from ...attention.notes import Notes
from ...attention.pairs import prefix_pairs
from ...attention.probe import Probe
from ...attention.rope import Rope
from ...parallel.traffic import CountedTransport, Traffic
from ...parallel.transport import DistributedTransport
from ..data.samples import Sample
from ..exchange_choice import ExchangeChoice, choose_exchange
from ..flops import peak_flops
from ..own_time import OwnTime
from ..parameters import count_parameters, layer_shape
from ..platform import device
from ..settings import RunSettings, StageSettings
from .groups import build_groups, is_reporting_rank, seed_step
from .microbatch import BatchBuilder, MicroBatch
from .model import LongModel, Weights
from .optimizer import Optimizer, StepSums
from .place import Place, Places
from .spikes import Spikes


class Engine:
    """Builds megatron's groups, model, DDP and optimizer for one stage.

    Args:
        run: The run's settings.
        stage: The stage's settings.
        vocab: Vocabulary size of the tokenizer.
        train: Whether an optimizer is wanted; without one the engine only evaluates.
        weights: Where the weights come from, in the place of random ones.
    """

    def __init__(
        self,
        run: RunSettings,
        stage: StageSettings,
        vocab: int,
        *,
        train: bool = True,
        weights: Weights | None = None,
    ) -> None:
        self.run, self.stage = run, stage
        self.device = device()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.groups = build_groups(stage.parallel)
        seed_step(self.groups, run.seed, "start")
        self.model = LongModel(run, stage, vocab, self.groups, weights).to(self.device)
        self.config = self.model.config
        self.own_time = OwnTime(self.device)
        self.config.finalize_model_grads_func = self._finalize
        self.reporting = is_reporting_rank(self.groups)
        self.tokens_per_batch = stage.length * stage.micro_batch
        self.traffic = Traffic()
        self.choice = self._choose()
        self.build = self._builder()
        self.chunk: Any = self.model
        self.optimizer: Optimizer | None = None
        self.spikes: Spikes | None = None
        if train:
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=False,
            )
            self.chunk = DistributedDataParallel(self.config, ddp, self.model)
            self.chunk.broadcast_params()
            _keep_whole_parameters(self.chunk)
            frozen = stage.trainable == "selection"
            self.spikes = self._spikes()
            learns = _selects if frozen else lambda parameter: True
            self.optimizer = Optimizer(stage.optimizer, self.chunk, learns, self.spikes)

    @property
    def data_rank(self) -> int:
        """This rank's place among the data-parallel replicas."""
        return self.groups.dp.rank()

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; vocabulary padding not counted."""
        return count_parameters(self.run.model, self.model.real_vocab, self.stage.attention)

    @property
    def peak_flops(self) -> float | None:
        """What the GPUs of all ranks could do at most; None on a CPU, or where it is not known."""
        if self.device.type != "cuda" or self.run.precision != "bf16":
            return None
        peak = peak_flops(torch.cuda.get_device_name(self.device))
        return None if peak is None else peak * dist.get_world_size()

    @property
    def peak_memory(self) -> int | None:
        """Most bytes that tensors took on this rank's GPU in this stage; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self.device)

    def place(self, sample: Sample) -> Place:
        """Which of a sample's tokens this context rank has."""
        return self.build.places.of(sample.cu_seqlens)

    def train_step(
        self,
        samples: Sequence[Sample],
        lr: float,
        stop: bool,
        key: tuple[object, ...],
        probe: Probe | None = None,
        *,
        save: bool = False,
    ) -> StepSums:
        """One optimizer step over this rank's micro-batches.

        Args:
            samples: This data rank's micro-batches, joined to `tokens_per_batch` tokens each.
            lr: Learning rate.
            stop: Whether this rank was asked to stop; every rank learns of it.
            key: What the step's random numbers are drawn from.
            probe: Measures the first micro-batch; afterwards it has the sums over all ranks.
            save: Whether this rank was asked to save and go on; likewise.
        """
        assert self.optimizer is not None
        seed_step(self.groups, *key)
        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.own_time.begin()
        notes = Notes()
        batches = (
            replace(self.build(sample, notes), probe=None if number else probe)
            for number, sample in enumerate(samples)
        )
        reports = self.accumulate(batches, len(samples))
        if probe is not None:
            dist.all_reduce(probe.sums)
        zero = torch.zeros((), device=self.device)
        loss, tokens = zero, zero
        if self.reporting:
            loss = torch.stack([report[0] for report in reports]).sum()
            tokens = torch.stack([report[1] for report in reports]).sum()
        # Filled there: a copy from the host might wait.
        asked = torch.stack([torch.full_like(zero, float(flag)) for flag in (stop, save)])
        return self.optimizer.step(lr, loss, tokens, asked, self.shares(notes))

    def accumulate(
        self, batches: Iterator[MicroBatch], count: int, tokens: int | None = None
    ) -> list[Any]:
        """Leaves the finished gradients of micro-batches in the buffers.

        Args:
            batches: They and no others.
            count: Of them.
            tokens: Of each over all context ranks; None for those of a step.

        Returns:
            On the last pipeline rank the loss sum, weight sum and losses of each.
        """
        if self.stage.trainable == "selection":
            return self._selection_only(batches, count, tokens)
        return self._forward_backward(batches, count, forward_only=False, tokens=tokens)

    @torch.no_grad()
    def _selection_only(
        self, batches: Iterator[MicroBatch], count: int, length: int | None
    ) -> list[Any]:
        """Forward passes, in which indexers and gates learn by themselves; no backward."""
        reports = self._forward_backward(batches, count, forward_only=True, tokens=length)
        tokens = torch.zeros((), dtype=torch.int32, device=self.device)
        for report in reports:
            tokens += report[1].to(torch.int32)
        self._finalize([self.chunk], tokens, pg_collection=self.groups)
        return reports

    def _finalize(self, *given: Any, **named: Any) -> None:
        """Sum gradients over ranks: here they wait for each other."""
        self.own_time.meet()
        finalize_model_grads(*given, **named)

    def shares(self, notes: Notes) -> dict[str, torch.Tensor]:
        """This rank's share of each note, so that a sum over all ranks counts everything once.

        All ranks name the same ones, whatever layers they have.
        """
        shares, first = {}, self.groups.tp.rank() == 0
        for name in auxiliary_losses(self.stage.attention, self.run.model.layers):
            pair = notes.share(name, first)
            if pair is None:
                pair = torch.zeros(2, dtype=torch.float64, device=self.device)
            shares[name] = pair
        return shares

    @torch.no_grad()
    def losses(self, sample: Sample) -> torch.Tensor | None:
        """Losses [T] of a sample's tokens on this context rank, in its local order.

        Returns None on ranks before the last pipeline rank.
        """
        batch = self.build(sample)
        self.chunk.eval()
        reports = self._forward_backward(
            iter([batch]), 1, forward_only=True, tokens=len(sample.tokens_T)
        )
        self.chunk.train()
        return batch.own(reports[0][2]) if reports else None

    def _choose(self) -> ExchangeChoice:
        """The exchange of the context ranks, the same one on all of them."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        smallest = torch.tensor(local, device=self.device)
        dist.all_reduce(smallest, dist.ReduceOp.MIN)
        gpu, wire = self.device.type == "cuda", self.config.params_dtype.itemsize
        return choose_exchange(self.run.model, self.stage, node=int(smallest), gpu=gpu, wire=wire)

    def _spikes(self) -> Spikes | None:
        recovery = self.run.recovery
        if recovery.spike == "none":
            return None
        return Spikes(recovery.window, recovery.sigma, self.device)

    def _builder(self) -> BatchBuilder:
        """What makes this rank's micro-batches."""
        run, stage, group = self.run, self.stage, self.groups.cp
        mechanisms, shape = stage.attention.mechanisms(run.model.layers), layer_shape(run.model)
        places = Places(
            stage.parallel,
            self.choice,
            group.rank(),
            CountedTransport(DistributedTransport(group), self.traffic),
            prefix_pairs(mechanisms, shape.heads, shape.groups),
        )
        rope = Rope(stage.rope, stage.length)
        return BatchBuilder(places, rope, self.device, (run.seed, stage.name))

    def _forward_backward(
        self,
        batches: Iterator[MicroBatch],
        count: int,
        *,
        forward_only: bool,
        tokens: int | None = None,
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Run megatron's schedule; loss sum, weight sum and losses per micro-batch (last stage)."""
        rows = self.build.places.rows(tokens or self.tokens_per_batch)
        return get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=[self.chunk],
            num_microbatches=count,
            # Divided by the context ranks, it is the rows of each one's buffers.
            seq_length=rows * self.stage.parallel.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _selects(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter belongs to what selects keys, and learns by a loss of its own."""
    return bool(getattr(parameter, "selects", False))


def _keep_whole_parameters(chunk: DistributedDataParallel) -> None:
    """No gathering of parameters that this rank has all of.

    Besides the time: gloo would copy them with threads of its own, and OpenMP, which then knows of
    more threads than cores, wakes its threads six times as slowly from there on.
    """
    for buckets in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        if buckets.intra_distributed_optimizer_instance_size == 1:
            buckets.start_param_sync = _nothing


def _nothing(force_sync: bool = False) -> None:
    """In the place of a gathering."""


def _forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Any, Any]:
    batch = next(batches)
    return chunk(batch), partial(_report, batch)


def _report(
    batch: MicroBatch, output: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The 3-tuple that megatron normalises by global tokens (a 2-tuple it scales by CP: trap S2).

    megatron adds up token counts as int32.
    """
    loss, losses_R = output
    tokens = batch.weights_R.sum()
    return loss, tokens.to(torch.int32), (loss.detach(), tokens, losses_R)
