"""Tokens per second of one rank's training step beside Hugging Face transformers, in one run.

Both sides train the same Llama from the same weights on the same tokens with AdamW in fp32; steps
alternate, so that both meet the same machine. Run: python benchmarks/trainer.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from longspan.trainer.data.samples import Sample
from longspan.trainer.engine.engine import Engine
from longspan.trainer.settings import RunSettings

VOCAB = 32_768


def settings(length: int, batch: int) -> RunSettings:
    """Hidden 512, 8 layers, untied embeddings."""
    return RunSettings.model_validate(
        {
            "precision": "fp32",
            "model": {
                "hidden": 512,
                "layers": 8,
                "heads": 8,
                "query_groups": 4,
                "ffn_hidden": 1408,
                "tied_embeddings": False,
            },
            "tokenizer": {"kind": "train", "vocab": VOCAB},
            "stages": [
                {
                    "name": "benchmark",
                    "length": length,
                    "tokens": length * batch,
                    "batch_tokens": length * batch,
                    "optimizer": {"lr": 1e-4, "schedule": "constant", "warmup": 0},
                    "data": {"sources": [{"kind": "python-stdlib"}]},
                }
            ],
        }
    )


def hugging_face_twin(run: RunSettings, engine: Engine) -> torch.nn.Module:
    """transformers' Llama with the engine's weights."""
    m = run.model
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=m.hidden,
        intermediate_size=m.ffn_hidden,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        rms_norm_eps=m.norm_epsilon,
        tie_word_embeddings=False,
        max_position_embeddings=run.stages[0].length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    twin = transformers.LlamaForCausalLM(config).float()
    ours = dict(engine.model.named_parameters())
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "lm_head.weight": ours["output_layer.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
    }
    per_group, width = m.heads // m.kv_heads, m.head_width
    for layer in range(m.layers):
        old, new = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = ours[f"{old}self_attention.linear_qkv.weight"]
        parts = qkv.view(m.kv_heads, per_group + 2, width, m.hidden)
        for name, part in (("q", parts[:, :-2]), ("k", parts[:, -2]), ("v", parts[:, -1])):
            theirs[f"{new}self_attn.{name}_proj.weight"] = part.reshape(-1, m.hidden)
        theirs[f"{new}self_attn.o_proj.weight"] = ours[f"{old}self_attention.linear_proj.weight"]
        gate, up = ours[f"{old}mlp.linear_fc1.weight"].chunk(2)
        theirs |= {f"{new}mlp.gate_proj.weight": gate, f"{new}mlp.up_proj.weight": up}
        theirs[f"{new}mlp.down_proj.weight"] = ours[f"{old}mlp.linear_fc2.weight"]
        theirs[f"{new}input_layernorm.weight"] = ours[f"{old}input_layernorm.weight"]
        theirs[f"{new}post_attention_layernorm.weight"] = ours[f"{old}pre_mlp_layernorm.weight"]
    twin.load_state_dict({name: weight.detach().clone() for name, weight in theirs.items()})
    return twin


def their_step(twin: torch.nn.Module) -> Callable[[torch.Tensor], float]:
    """A step as users write it: one forward and backward per sequence, clip, fused AdamW."""
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(twin.parameters(), fused=True, **options)

    def step(tokens_BT: torch.Tensor) -> float:
        optimizer.zero_grad()
        total = 0.0
        for row in tokens_BT:
            loss = twin(input_ids=row[None], labels=row[None]).loss / len(tokens_BT)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        return total

    return step


def our_step(engine: Engine) -> Callable[[torch.Tensor], float]:
    """The engine's step on the same tokens, one document per sequence."""

    def sample(row: torch.Tensor) -> Sample:
        weights = torch.ones(len(row))
        weights[-1] = 0
        bounds = torch.tensor([0, len(row)], dtype=torch.int32)
        return Sample(row, row.roll(-1), weights, bounds)

    def step(tokens_BT: torch.Tensor) -> float:
        samples = [sample(row) for row in tokens_BT]
        sums = engine.train_step(samples, 1e-4, False, ("benchmark",)).on_host()
        return sums["loss"] / sums["tokens"]

    return step


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn."""
    run = settings(args.length, args.batch)
    engine = Engine(run, run.stages[0], VOCAB)
    sides = {
        "transformers": their_step(hugging_face_twin(run, engine)),
        "longspan": our_step(engine),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}
    random = torch.Generator().manual_seed(0)
    for number in range(args.steps + 1):
        tokens_BT = torch.randint(0, VOCAB, (args.batch, args.length), generator=random)
        for name, step in sides.items():
            begun = time.perf_counter()
            losses[name].append(step(tokens_BT))
            if number:  # the first step warms up
                seconds[name].append(time.perf_counter() - begun)
    drift = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    assert drift < 1e-3, f"the two sides do not train the same model: {losses}"
    tokens = args.length * args.batch
    median = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)]
    return {
        "tokens_per_s": median,
        "ratio": median["longspan"] / median["transformers"],
        "ratio_of_each_step": ratios,
        "largest_loss_difference": drift,
        "parameters": engine.parameters,
    }


def main() -> None:
    """Measure, print and write the result with what it ran on."""
    args = arguments()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    result = measure(args) | {
        "length": args.length,
        "batch": args.batch,
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
