"""Output layer and cross-entropy in one, a chunk of tokens at a time: no logits of the sequence.

Shapes: T tokens of this rank, E hidden width, V vocabulary rows of this tensor rank, C tokens of
one chunk.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist

_CHUNK_BYTES = 64 * 2**20


def linear_cross_entropy(
    hidden_TE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_T: torch.Tensor,
    weights_T: torch.Tensor,
    *,
    first: int,
    valid: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the cross-entropies of `hidden @ weight.T`, over a split vocabulary.

    The gradients are computed along with the loss, chunk by chunk, so nothing is computed twice;
    the backward only scales them. Under tensor parallelism the gradient of `hidden` is this rank's
    part of the sum.

    Args:
        hidden_TE: Final hidden states [T, E].
        weight_VE: This rank's rows of the output matrix [V, E].
        labels_T: Target ids [T], int64, global.
        weights_T: Loss weights [T], fp32; 0 where there is nothing to predict.
        first: Global id of this rank's first row.
        valid: This rank's rows that are real vocabulary; the rest is padding.
        group: Tensor-parallel group, or None.

    Returns:
        The weighted sum (fp32 scalar) and the unweighted losses [T] (fp32, no gradient).
    """
    if group is not None and group.size() == 1:
        group = None
    result = _LinearCrossEntropy.apply(
        hidden_TE, weight_VE, labels_T, weights_T, first, valid, group
    )
    return cast(tuple[torch.Tensor, torch.Tensor], result)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TE: torch.Tensor,
        weight_VE: torch.Tensor,
        labels_T: torch.Tensor,
        weights_T: torch.Tensor,
        first: int,
        valid: int,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with_grad = hidden_TE.requires_grad or weight_VE.requires_grad
        rows_VE = weight_VE[:valid]
        losses_T = torch.empty_like(weights_T)
        d_hidden_TE = torch.empty_like(hidden_TE) if with_grad else None
        d_weight_VE = torch.empty_like(weight_VE, dtype=torch.float32) if with_grad else None
        chunk = max(16, _CHUNK_BYTES // (4 * max(1, valid)))
        for start in range(0, hidden_TE.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_CE = hidden_TE[part]
            logits_CV = (hidden_CE @ rows_VE.T).float()
            losses_T[part] = _losses(logits_CV, labels_T[part] - first, group)
            if d_hidden_TE is None or d_weight_VE is None:
                continue
            # _losses left the probabilities in place of the logits.
            d_logits_CV = logits_CV
            _subtract_targets(d_logits_CV, labels_T[part] - first)
            d_logits_CV = d_logits_CV.mul_(weights_T[part, None]).to(hidden_TE.dtype)
            torch.mm(d_logits_CV, rows_VE, out=d_hidden_TE[part])
            _accumulate(d_weight_VE[:valid], d_logits_CV.T, hidden_CE, first=start == 0)
        if d_weight_VE is not None:
            d_weight_VE[valid:] = 0
            ctx.save_for_backward(d_hidden_TE, d_weight_VE.to(weight_VE.dtype))
        ctx.mark_non_differentiable(losses_T)
        return (losses_T * weights_T).sum(), losses_T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_hidden_TE, d_weight_VE = ctx.saved_tensors
        scale = grads[0]
        if scale.is_cuda or scale.item() != 1:  # on a CPU, reading it is free
            d_hidden_TE, d_weight_VE = d_hidden_TE * scale, d_weight_VE * scale
        return d_hidden_TE, d_weight_VE, None, None, None, None, None


def _accumulate(
    sum_VE: torch.Tensor, left_VC: torch.Tensor, right_CE: torch.Tensor, *, first: bool
) -> None:
    """Add a product to an fp32 sum, or begin the sum with it."""
    if left_VC.dtype != sum_VE.dtype:
        product_VE = left_VC @ right_CE
        _ = sum_VE.copy_(product_VE) if first else sum_VE.add_(product_VE)
    elif first:
        torch.mm(left_VC, right_CE, out=sum_VE)
    else:
        sum_VE.addmm_(left_VC, right_CE)


def _losses(
    logits_CV: torch.Tensor, local_C: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Losses [C] of a chunk; overwrites the logits with this rank's probabilities."""
    columns = logits_CV.shape[1]
    inside_C = (local_C >= 0) & (local_C < columns)
    if columns:
        top_C = logits_CV.amax(dim=1)
        target_C = logits_CV.gather(1, local_C.clamp(0, columns - 1)[:, None])[:, 0]
    else:
        top_C = logits_CV.new_full((logits_CV.shape[0],), -torch.inf)
        target_C = torch.zeros_like(top_C)
    if group is not None:
        dist.all_reduce(top_C, op=dist.ReduceOp.MAX, group=group)
    logits_CV.sub_(top_C[:, None]).exp_()
    both_2C = torch.stack([logits_CV.sum(dim=1), torch.where(inside_C, target_C - top_C, 0.0)])
    if group is not None:
        dist.all_reduce(both_2C, group=group)
    logits_CV.div_(both_2C[0][:, None])
    return both_2C[0].log() - both_2C[1]


def _subtract_targets(probabilities_CV: torch.Tensor, local_C: torch.Tensor) -> None:
    """Subtract 1 at each token's target, where it lies in this rank's columns."""
    columns = probabilities_CV.shape[1]
    if columns:
        inside_C = ((local_C >= 0) & (local_C < columns)).to(probabilities_CV.dtype)
        index_C1 = local_C.clamp(0, columns - 1)[:, None]
        probabilities_CV.scatter_add_(1, index_C1, -inside_C[:, None])
