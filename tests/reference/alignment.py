"""The specification of the alignment of two outputs: torch's own loss. Read by tests only."""

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss


def naive_align(
    a_THV: Tensor, b_THV: Tensor, weight_T: Tensor, beta: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by automatic differentiation."""
    a, b = (x.detach().to(dtype).requires_grad_() for x in (a_THV, b_THV))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        how = {"reduction": "none"}
        each = smooth_l1_loss(x, y, beta=beta, **how) if beta else l1_loss(x, y, **how)
        return (each.flatten(1).mean(1) * weight_T.to(dtype)).sum()

    total = loss(a, b.detach()) + loss(b, a.detach())
    return total.detach(), *torch.autograd.grad(total, [a, b])
