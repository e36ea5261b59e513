"""The whole model in plain float64: explicit document mask, complex rotations, mean loss."""

import torch
from longspan.trainer.settings import ModelSettings
from reference.rope import naive_rope


def naive_logits(weights, model: ModelSettings, tokens_T, cu_seqlens, rope):
    """Logits [T, V] from float64 weights named as in LongModel; T is the stage's length."""
    document_T = torch.bucketize(torch.arange(len(tokens_T)), cu_seqlens[1:].long(), right=True)
    position_T = torch.arange(len(tokens_T)) - cu_seqlens.long()[document_T]
    same_TT = document_T[:, None] == document_T[None]
    mask_TT = same_TT & torch.ones_like(same_TT).tril()
    hidden = weights["embedding.word_embeddings.weight"][tokens_T]
    for layer in range(model.layers):
        w = {
            name.removeprefix(f"decoder.layers.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        normed = _norm(hidden, w["input_layernorm.weight"], model)
        turning = None if layer in rope.nope_layers else rope
        hidden = hidden + _attention(normed, w, model, mask_TT, position_T, turning)
        normed = _norm(hidden, w["pre_mlp_layernorm.weight"], model)
        gate, up = (normed @ w["mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ w["mlp.linear_fc2.weight"].T
    hidden = _norm(hidden, weights["decoder.final_layernorm.weight"], model)
    head = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
    return hidden @ head.T


def naive_loss(logits_TV, labels_T, weights_T):
    """Mean cross-entropy over the weighted tokens."""
    losses_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
    return (losses_T * weights_T).sum() / weights_T.sum()


def _norm(x, weight, model):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.norm_epsilon) * weight


def _attention(x_TE, w, model, mask_TT, position_T, rope):
    tokens, width, per_group = len(x_TE), model.head_width, model.heads // model.kv_heads
    bias = w.get("self_attention.linear_qkv.bias", 0.0)
    qkv = x_TE @ w["self_attention.linear_qkv.weight"].T + bias
    qkv = qkv.view(tokens, -1, per_group + 2, width)
    q, k, v = qkv[:, :, :-2].reshape(tokens, -1, width), qkv[:, :, -2], qkv[:, :, -1]
    if model.qk_norm:
        q = _norm(q, w["self_attention.q_layernorm.weight"], model)
        k = _norm(k, w["self_attention.k_layernorm.weight"], model)
    if rope is not None:
        q, k = (naive_rope(y, position_T, rope, tokens) for y in (q, k))
    k, v = (y.repeat_interleave(per_group, dim=1) for y in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * width**-0.5
    scores = scores.masked_fill(~mask_TT, -torch.inf).softmax(-1)
    out = torch.einsum("hts,shd->thd", scores, v).reshape(tokens, -1)
    return out @ w["self_attention.linear_proj.weight"].T
