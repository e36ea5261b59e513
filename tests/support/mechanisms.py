"""A mechanism alone: where it works, a micro-batch for it, its output and all of its gradients."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from longspan.attention.context import Context
from longspan.attention.documents import Documents
from longspan.attention.layer import Attention
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.notes import Notes
from longspan.attention.rope import Rope, RotaryTable
from longspan.attention.settings import RopeSettings
from longspan.attention.site import Site
from longspan.parallel.exchange import Exchange, Local
from torch import Tensor

ROPE = RopeSettings(base=500.0)
LENGTH = 512


def site(heads=4, groups=2, dim=8, hidden=12, dtype=torch.float64, **changes) -> Site:
    """The only rank's, in the first of two layers."""
    whole = {"first_head": 0, "all_heads": heads}
    return Site(0, 2, hidden, heads, groups, dim, dtype=dtype, **(whole | changes))


def positions_of(cu) -> Tensor:
    """Position of each token within its document."""
    return torch.cat([torch.arange(b - a) for a, b in pairwise(cu)])


def context(cu, rows=None, turns=True, **changes) -> Context:
    """A micro-batch on one rank; `rows` are the queries if they are not all tokens."""
    positions = positions_of(cu)
    rows_T = positions if rows is None else positions[rows]
    fields = {
        "weights_T": torch.ones(len(rows_T)),
        "notes": Notes(),
        "draw": lambda name: 0.0,
    }
    return Context(
        Exchange(Local()),
        Documents(cu, rows),
        Rope(ROPE, LENGTH, turns),
        rows_T,
        positions if rows is not None else rows_T,
        **(fields | changes),
    )


def turned(x, positions, turns=True, share=1.0) -> Tensor:
    """`x` [N, heads, dim] turned by its positions, as the stage's RoPE says; for twins."""
    if not turns:
        return x
    rope = ROPE.model_copy(update={"rotary_share": share})
    return RotaryTable.build(positions, rope, x.shape[-1], LENGTH).apply(x)


def make(settings: dict, where: Site, seed=0, **options) -> Attention:
    """The attention of a layer with random parameters, also where they start as constants."""
    stage = AttentionSettings.model_validate({"mechanism": settings, **options})
    layer = Attention(stage, stage.mechanism, where)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.copy_(0.3 * noise + (parameter.start or 0.0))
    return layer


@dataclass
class Inputs:
    """What a layer hands to its attention, and the gradient of the output."""

    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def leaves(self) -> list[Tensor]:
        """Fresh leaves of hidden, q, k and v."""
        return [x.detach().clone().requires_grad_() for x in (self.hidden, self.q, self.k, self.v)]


def inputs(tokens, where: Site, seed=1, dtype=torch.float64) -> Inputs:
    """Random ones."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [
        (tokens, where.hidden),
        (tokens, where.heads, where.dim),
        (tokens, where.groups, where.dim),
        (tokens, where.groups, where.dim),
        (tokens, where.heads, where.dim),
    ]
    return Inputs(*(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes))


def gradients(out: Tensor, dout: Tensor, leaves) -> list[Tensor]:
    """Of leaves and parameters; zeros where something has no part in the output."""
    grads = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]


def run(layer: Attention, given: Inputs, ctx: Context) -> tuple[Tensor, list[Tensor]]:
    """The output, and gradients of hidden, q, k, v and then all parameters."""
    leaves = given.leaves()
    out = layer(leaves[0], *leaves[1:], ctx)
    return out.detach(), gradients(out, given.dout, [*leaves, *layer.parameters()])


def halves(where: Site, given: Inputs) -> list[tuple[Site, Inputs]]:
    """Two tensor ranks: where each works, and its heads of what goes in."""
    heads, groups = where.heads // 2, where.groups // 2
    found = []
    for rank in range(2):
        at, group = (
            slice(rank * heads, (rank + 1) * heads),
            slice(rank * groups, (rank + 1) * groups),
        )
        own = {"first_head": rank * heads, "all_heads": where.heads}
        half = site(heads, groups, where.dim, where.hidden, where.dtype, **own)
        q, k, v = given.q[:, at], given.k[:, group], given.v[:, group]
        found.append((half, Inputs(given.hidden, q, k, v, given.dout[:, at])))
    return found


def assert_all_close(got, want, atol=1e-9) -> None:
    """Tensors are as expected one by one, and there are some."""
    assert len(got) == len(want) > 0 and not any(x is None for x in [*got, *want])
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)
