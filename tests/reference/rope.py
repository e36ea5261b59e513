"""The specification of RoPE in float64: channel pairs as complex numbers. Read by tests only.

Shapes: T tokens, H heads, D head dim, P channel pairs that turn.
"""

import math

import torch
from longspan.attention.settings import RopeSettings
from torch import Tensor


def naive_rope(x_THD: Tensor, positions_T: Tensor, rope: RopeSettings, length: int) -> Tensor:
    """Turns the pair (i, i + P) of each head by its frequency times the position, and scales it."""
    turns_P, gain = naive_turns(rope, x_THD.shape[-1], length)
    pairs = len(turns_P)
    x = torch.complex(x_THD[..., :pairs].double(), x_THD[..., pairs : 2 * pairs].double())
    angle_TP = positions_T[:, None].double() * turns_P
    turned = x * torch.polar(torch.full_like(angle_TP, gain), angle_TP)[:, None]
    return torch.cat([turned.real, turned.imag, x_THD[..., 2 * pairs :].double()], dim=-1)


def naive_turns(rope: RopeSettings, head_dim: int, length: int) -> tuple[Tensor, float]:
    """Radians per token of each pair, and the attention factor, one pair at a time."""
    s, dim, gain, turns = rope.scaling, int(head_dim * rope.rotary_share), 1.0, []
    kind, base = s.kind if s else "default", rope.base
    if kind == "ntk":
        base *= s.factor ** (dim / (dim - 2))
    if kind == "dynamic" and length > s.original_length:
        base *= (s.factor * length / s.original_length - s.factor + 1) ** (dim / (dim - 2))
    for pair in range(dim // 2):
        turn = 1 / base ** (2 * pair / dim)
        wavelength = 2 * math.pi / turn
        if kind == "linear":
            turn = turn / s.factor
        if kind == "llama3" and wavelength > s.original_length / s.low_freq_factor:
            turn = turn / s.factor
        elif kind == "llama3" and wavelength > s.original_length / s.high_freq_factor:
            width = s.high_freq_factor - s.low_freq_factor
            smooth = (s.original_length / wavelength - s.low_freq_factor) / width
            turn = (1 - smooth) * turn / s.factor + smooth * turn
        if kind == "longrope":
            turn /= (s.long_factors if length > s.original_length else s.short_factors)[pair]
        if kind == "yarn":
            ends = [
                dim * math.log(s.original_length / (beta * 2 * math.pi)) / (2 * math.log(base))
                for beta in (s.beta_fast, s.beta_slow)
            ]
            low, high = (math.floor(ends[0]), math.ceil(ends[1])) if s.truncate else ends
            low, high = max(low, 0), min(high, dim - 1)
            ramp = min(1.0, max(0.0, (pair - low) / (high - low if high != low else 0.001)))
            turn = turn * (1 - ramp) + turn / s.factor * ramp
        turns.append(turn)
    if kind == "yarn":
        grown = [0.1 * m * math.log(s.factor) + 1 for m in (s.mscale or 1, s.mscale_all_dim or 1)]
        gain = s.attention_factor or (grown[0] / grown[1] if s.mscale else grown[0])
    if kind == "longrope":
        factor = s.factor or max(1, length / s.original_length)
        gain = s.attention_factor or math.sqrt(1 + math.log(factor, s.original_length))
    return torch.tensor(turns, dtype=torch.float64), gain
