"""Megatron's distributed AdamW with a clip and a non-finite guard that stay on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from ..settings import OptimizerSettings
from .hooks import mend_optimizer


@dataclass(frozen=True)
class StepSums:
    """Sums over all ranks after a step, still on the device.

    Attributes:
        loss: Weighted sum of the losses.
        tokens: Sum of the loss weights.
        square_norm: Squared norm of the mean loss's gradient, before clipping.
        stop: How many ranks were asked to stop.
        skipped: 1.0 if the step was not applied because a gradient or the loss was not finite.
    """

    loss: torch.Tensor
    tokens: torch.Tensor
    square_norm: torch.Tensor
    stop: torch.Tensor
    skipped: torch.Tensor

    def on_host(self) -> dict[str, float]:
        """All sums as numbers; waits for the device."""
        names = ("loss", "tokens", "square_norm", "stop", "skipped")
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        return dict(zip(names, values, strict=True))


class Optimizer:
    """AdamW over this rank's shard of the parameters.

    A step makes one small all-reduce over the world, from which every rank learns the same global
    norm and whether anything was not finite; torch's fused AdamW takes the clip factor and the
    skip flag as device tensors, so that no rank waits for its device here.
    """

    def __init__(self, settings: OptimizerSettings, model: DistributedDataParallel) -> None:
        mend_optimizer()
        self.settings = settings
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

    def own_steps(self) -> None:
        """Give every parameter a step count of its own.

        megatron's load puts one tensor in all of them, and each update then advances it once per
        parameter (trap S1).
        """
        for inner in (part.optimizer for part in self._parts):
            for state in inner.state.values():
                state["step"] = state["step"].clone()

    def step(
        self, lr: float, loss: torch.Tensor, tokens: torch.Tensor, stop: torch.Tensor
    ) -> StepSums:
        """Apply the gradients of a finished forward-backward, unless one is not finite.

        Args:
            lr: Learning rate.
            loss: This rank's share of the weighted sum of losses, fp32 scalar on the device.
            tokens: Its share of the loss weights.
            stop: 1.0 if this rank was asked to stop.

        Returns:
            The global sums.
        """
        self.megatron.prepare_grads()
        local = torch.stack([x.double() for x in (loss, tokens, self._square_norm(), stop)])
        dist.all_reduce(local)
        sums = local.float()
        skipped = (~torch.isfinite(sums[0] + sums[2])).float()
        self._set_device_flags(sums[2].sqrt(), skipped)
        for group in self.megatron.param_groups:
            group["lr"] = lr * group["lr_mult"]
        self.megatron.step_with_ready_grads()
        return StepSums(local[0], local[1], local[2], local[3], skipped)

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
