"""Megatron's distributed AdamW with a clip and a non-finite guard that stay on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from ..settings import OptimizerSettings
from .hooks import mend_optimizer
from .spikes import Spikes


@dataclass(frozen=True)
class StepSums:
    """Sums over all ranks after a step, still on the device.

    Attributes:
        loss: Weighted sum of the losses.
        tokens: Sum of the loss weights.
        square_norm: Squared norm of the mean loss's gradient, before clipping.
        stop: How many ranks were asked to stop.
        save: How many were asked to save and go on.
        skipped: 1.0 if the step was not applied: the loss or a gradient was not finite, or a spike.
        spike: 1.0 if it was not applied although all was finite.
        notes: Sums and weights of what layers noted, fp64 [2] by name.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    square_norm: torch.Tensor
    stop: torch.Tensor
    save: torch.Tensor
    skipped: torch.Tensor
    spike: torch.Tensor
    notes: dict[str, torch.Tensor] = field(default_factory=dict)

    def on_host(self) -> dict[str, float]:
        """All sums as numbers; waits for the device."""
        names = ("loss", "tokens", "square_norm", "stop", "save", "skipped", "spike")
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))

    def noted(self) -> dict[str, float]:
        """The mean of each note, as numbers; waits for the device."""
        return {name: total / weight for name, (total, weight) in self._pairs() if weight}

    def _pairs(self) -> list[tuple[str, list[float]]]:
        if not self.notes:
            return []
        return list(zip(self.notes, torch.stack(list(self.notes.values())).tolist(), strict=True))


class Optimizer:
    """AdamW over this rank's shard of the parameters.

    A step makes one small all-reduce over the world, from which every rank learns the same global
    norm and whether anything was not finite or spiked; torch's fused AdamW takes the clip factor
    and the skip flag as device tensors, so that no rank waits for its device here.

    Args:
        settings: Of the stage.
        model: The wrapped model.
        learns: Which parameters learn. The others keep their values, moments and step counts, and
            are in every checkpoint all the same.
        spikes: Finds steps that stand out, which are not applied; None applies all finite ones.
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        model: DistributedDataParallel,
        learns: Callable[[torch.nn.Parameter], bool] = lambda parameter: True,
        spikes: Spikes | None = None,
    ) -> None:
        mend_optimizer()
        self.settings, self.spikes = settings, spikes
        config = OptimizerConfig(
            optimizer="adam",
            # Every step sets the rate. megatron 0.19 tells parameter groups apart by these two and
            # would not find a group of a stage with other ones.
            lr=1.0,
            min_lr=0.0,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=0.0,
            bf16=model.config.bf16,
            use_distributed_optimizer=True,
        )
        self.megatron = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
        self._parts: list[Any] = [
            part for part in _chained(self.megatron) if not part.is_stub_optimizer
        ]
        for part in self._parts:
            # Set after construction: megatron offers no way to ask for the fused kernel.
            part.optimizer._step_supports_amp_scaling = True
        self._frozen = {id(main) for model, main, _, _ in self.shards() if not learns(model)}
        self.apply_settings()

    def apply_settings(self) -> None:
        """Give every parameter group this stage's hyper-parameters (a load brings the old ones)."""
        s = self.settings
        for group in self.megatron.param_groups:
            group["betas"], group["eps"] = (s.beta1, s.beta2), s.eps
            group["weight_decay"] = s.weight_decay * group["wd_mult"]
            group["fused"], group["foreach"] = True, False

    def create_state(self) -> None:
        """Zero moments and step counts of its own for every parameter, where there are none yet."""
        for inner in (part.optimizer for part in self._parts):
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def shards(
        self,
    ) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, dict[str, Any], int]]:
        """What this rank updates of the model's parameters.

        Yields:
            The parameter, the fp32 main copy of this rank's elements of it, their state, and the
            first of them, counted row by row.
        """
        for part in self._parts:
            for model, (group, order) in part.model_param_group_index_map.items():
                main = part.optimizer.param_groups[group]["params"][order]
                first = part._get_model_param_range_map(model)["param"].start
                yield model, main, part.optimizer.state[main], first

    def steps(self) -> dict[torch.nn.Parameter, int]:
        """How often each parameter that this rank has a shard of was updated."""
        shards = [(model, state["step"]) for model, _, state, _ in self.shards() if state]
        if not shards:
            return {}
        counts = torch.stack([step.float() for _, step in shards]).tolist()
        return {model: int(n) for (model, _), n in zip(shards, counts, strict=True)}

    def set_steps(self, count: Callable[[torch.nn.Parameter], int]) -> None:
        """Give every parameter a step count of its own, and a tensor of its own for it.

        They are not equally old: some joined later, or stood still.
        """
        for model, _, state, _ in self.shards():
            if state:
                state["step"] = torch.full_like(state["step"], float(count(model)))

    def step(
        self,
        lr: float,
        loss: torch.Tensor,
        tokens: torch.Tensor,
        asked: torch.Tensor,
        notes: dict[str, torch.Tensor],
    ) -> StepSums:
        """Apply the gradients of a finished forward-backward, unless one is not finite or spikes.

        Args:
            lr: Learning rate.
            loss: This rank's share of the weighted sum of losses, fp32 scalar on the device.
            tokens: Its share of the loss weights.
            asked: Whether this rank was asked to stop, and to save: 1.0 or 0.0 each, [2].
            notes: Its share of the sums and weights of notes, of the same names on all ranks.

        Returns:
            The global sums.
        """
        self.megatron.prepare_grads()
        local = torch.stack([x.double() for x in (loss, tokens, self._square_norm())])
        local = torch.cat([local, asked.double(), *notes.values()])
        dist.all_reduce(local)
        sums = local[:3].float()
        finite = torch.isfinite(sums[0] + sums[2])
        spike = torch.zeros_like(finite)
        if self.spikes is not None:
            values = torch.stack([local[0] / local[1], local[2].sqrt()])
            spike = self.spikes.judge(values, finite)
        skipped = (~finite | spike).float()
        self._set_device_flags(sums[2].sqrt(), skipped)
        for group in self.megatron.param_groups:
            group["lr"] = lr * group["lr_mult"]
        with self._only_what_learns():
            self.megatron.step_with_ready_grads()
        noted = dict(zip(notes, local[5:].view(-1, 2), strict=True))
        stop, save = local[3], local[4]
        return StepSums(local[0], local[1], local[2], stop, save, skipped, spike.float(), noted)

    def gradients(self) -> list[torch.Tensor]:
        """The finished gradients that this rank alone counts; see `_square_norm`.

        They may be overwritten by the next forward-backward.
        """
        self.megatron.prepare_grads()
        return [grad for part in self._parts for grad in _counted_gradients(part)]

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.megatron.zero_grad()

    def _square_norm(self) -> torch.Tensor:
        """Squared norm of the gradients that this rank alone counts.

        Every element of every gradient is counted by exactly one rank of the world: optimizer
        shards are disjoint over data and context ranks, megatron leaves out what tensor ranks and
        tied embeddings hold twice.
        """
        grads = [grad for part in self._parts for grad in _counted_gradients(part)]
        if not grads:
            return torch.zeros((), device=self._device())
        return torch.stack([torch.linalg.vector_norm(g) for g in grads]).square().sum()

    def _set_device_flags(self, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        """Hand the fused kernel the divisor of the gradients and the skip flag."""
        clip = self.settings.clip
        divisor = ((norm + 1e-6) / clip).clamp(min=1.0) if clip else torch.ones_like(norm)
        for part in self._parts:
            part.optimizer.grad_scale = divisor
            part.optimizer.found_inf = skipped

    @contextmanager
    def _only_what_learns(self) -> Iterator[None]:
        """Leaves the others out of the update: values, moments and step counts."""
        if not self._frozen:
            yield
            return
        groups = [group for part in self._parts for group in part.optimizer.param_groups]
        whole = [group["params"] for group in groups]
        for group in groups:
            group["params"] = [main for main in group["params"] if id(main) not in self._frozen]
        try:
            yield
        finally:
            for group, params in zip(groups, whole, strict=True):
                group["params"] = params

    def _device(self) -> torch.device:
        return self.megatron.get_loss_scale().device


def _counted_gradients(part: Any) -> list[torch.Tensor]:
    """The gradients that count towards the norm; megatron-core 0.19 shortened the name."""
    if hasattr(part, "get_main_grads_for_grad_norm"):
        return part.get_main_grads_for_grad_norm()
    return part.get_grads_for_grad_norm()


def _chained(megatron: Any) -> list[Any]:
    """The distributed optimizers behind megatron's one: dense parameters, then experts."""
    return list(getattr(megatron, "chained_optimizers", [megatron]))
