"""Attend: exact softmax attention of queries over the keys that reach and blocks let them see.

Shapes: T query rows, S keys, H query heads, G key-value heads (H is a multiple of G), D key dim,
V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import choose
from .blocks import Blocks
from .precision import finite, wide_dtype
from .reach import Reach
from .request import Request
from .scoring import Gradients, Scoring, delta


@torch.no_grad()
def attend(
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    reach: Reach,
    blocks: Blocks | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    key_bias_SH: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention and its natural-log normaliser. Not differentiable; see `attend_backward`.

    Args:
        q_THD: Queries.
        k_SGD: Keys; query heads h * H / G to (h + 1) * H / G - 1 share key-value head h.
        v_SGV: Values; V may differ from D.
        reach: The keys that each query sees.
        blocks: The blocks that each query chose; it sees their keys within its reach. None for
            all that it reaches.
        scale: Of the scores.
        softcap: Bounds the scaled scores by softcap * tanh(score / softcap).
        sink_H: The score of one more key per head, with value 0 (learnable attention sinks).
        key_bias_SH: Added to every score of a key, after the cap.
        out_dtype: Of the output; the queries' when left out.

    Returns:
        The output [T, H, V] and the lse [T, H] in fp32 (fp64 for fp64 inputs). The lse counts the
        sink. A query that sees nothing has output 0 and lse -inf (with a sink: the sink). Keys and
        values that no query sees must be finite as well where they lie in a chosen block or
        between keys that neighbouring queries see.

    Raises:
        ValueError: Shapes, dtypes, devices or counts that contradict each other.
    """
    scoring = Scoring(scale, softcap, key_bias_SH)
    request = Request.of(q_THD, k_SGD, v_SGV, reach, blocks, scoring)
    out_dtype = out_dtype or q_THD.dtype
    compute = choose(request).forward
    if sink_H is None:
        return compute(q_THD, k_SGD, v_SGV, reach, blocks, scoring, out_dtype)
    wide = wide_dtype(q_THD)
    out_THV, lse_TH = compute(q_THD, k_SGD, v_SGV, reach, blocks, scoring, wide)
    total_TH = torch.logaddexp(lse_TH, _sink(sink_H, q_THD).to(lse_TH.dtype))
    out_THV = out_THV * (lse_TH - finite(total_TH)).exp().unsqueeze(-1)
    return out_THV.to(out_dtype), total_TH


@torch.no_grad()
def attend_backward(
    dout_THV: Tensor,
    q_THD: Tensor,
    k_SGD: Tensor,
    v_SGV: Tensor,
    out_THV: Tensor,
    lse_TH: Tensor,
    reach: Reach,
    blocks: Blocks | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    key_bias_SH: Tensor | None = None,
    dlse_TH: Tensor | None = None,
) -> Gradients:
    """Gradients of `attend` with respect to queries, keys and values, sinks and biases.

    Keys may be a shard of those that the queries see: with the output and lse over all shards,
    the dq of the shards add up, and each shard's dk, dv and dkey_bias are complete. (dsink comes
    with every call and is to be counted once.)

    Args:
        dout_THV: Gradient of the output.
        q_THD: Queries.
        k_SGD: Keys of this shard.
        v_SGV: Values of this shard.
        out_THV: Output over all keys.
        lse_TH: Natural-log lse over all keys.
        reach: The keys of this shard that each query sees.
        blocks: The choices, over the keys of this shard.
        scale: See `attend`, like the options that follow.
        softcap: Of `attend`.
        sink_H: Of `attend`.
        key_bias_SH: Of `attend`, for the keys of this shard.
        dlse_TH: Gradient of the lse; None for zero.

    Returns:
        Gradients in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: Shapes, dtypes, devices or counts that contradict each other.
    """
    scoring = Scoring(scale, softcap, key_bias_SH)
    dlse = dlse_TH is not None
    request = Request.of(q_THD, k_SGD, v_SGV, reach, blocks, scoring, dlse)
    grads = choose(request).backward(
        dout_THV, q_THD, k_SGD, v_SGV, out_THV, lse_TH, dlse_TH, reach, blocks, scoring
    )
    if sink_H is None:
        return grads
    weight_TH = (_sink(sink_H, q_THD).to(lse_TH.dtype) - finite(lse_TH)).exp()
    # The sink's value is 0: its score has the gradient weight * (0 - dout . out + dlse).
    delta_TH = delta(dout_THV.to(lse_TH.dtype), out_THV.to(lse_TH.dtype), dlse_TH)
    return grads._replace(dsink_H=-(weight_TH * delta_TH).sum(0))


def _sink(sink_H: Tensor, q_THD: Tensor) -> Tensor:
    if sink_H.shape != q_THD.shape[1:2]:
        raise ValueError(f"one sink per query head: {q_THD.shape[1]}, not {list(sink_H.shape)}")
    return sink_H
