"""Tiny random models of transformers, and what the ranks of a test world do with their folders."""

from pathlib import Path
from typing import Any

import torch
from longspan.trainer.data.samples import Sample, join
from longspan.trainer.settings import RunSettings
from support.tiny import tiny_run

TEXT = 48
GREEDY = 64
VOCAB = 101
"""Of all tiny models: padded for any layout."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 4}),
    "llama_tied_wide_heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, **MOE}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "qwen3_moe_shares": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": False, **MOE}),
}


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a tiny model whose every parameter, norms and biases included, is random."""
    import transformers

    family, own = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **own, **changes})
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    return folder


def text_of(seed: int = 3, length: int = TEXT) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def as_sample(tokens_T: torch.Tensor) -> Sample:
    """One document that predicts its next token."""
    weights_T = torch.ones(len(tokens_T))
    weights_T[-1] = 0
    bounds = torch.tensor([0, len(tokens_T)], dtype=torch.int32)
    return Sample(tokens_T, tokens_T.roll(-1), weights_T, bounds)


def their_logits(folder: Path, tokens_T: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] that transformers computes from a folder, in fp32."""
    with torch.no_grad():
        return _load(folder)(tokens_T[None]).logits[0]


def their_greedy(folder: Path) -> list[int]:
    """The continuation of the text that transformers finds most likely."""
    model, text_T = _load(folder), text_of()
    with torch.no_grad():
        found = model.generate(text_T[None], max_new_tokens=GREEDY, do_sample=False)
    return found[0, TEXT:].tolist()


def _load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run_of(folder: Path, **changes: Any) -> RunSettings:
    """A run of the model in a folder."""
    from longspan.trainer.convert.hf_config import read_config

    hf = read_config(folder)
    options = {
        "stage__length": TEXT,
        "stage__batch_tokens": TEXT * 4,
        "stage__rope": hf.rope.model_dump(),
        **changes,
    }
    run = tiny_run(**options)
    return run.model_copy(update={"model": hf.model})


def engine_of(folder: Path, run: RunSettings) -> Any:
    """An engine with the folder's weights."""
    from longspan.trainer.convert.weights import FolderWeights
    from longspan.trainer.engine.engine import Engine

    weights = FolderWeights(folder)
    return Engine(run, run.stages[0], weights.hf.vocab, weights=weights)


def train_and_save(engine: Any, steps: int, lr: float, out: Path) -> None:
    """Take steps on random text and write a checkpoint."""
    from longspan.trainer.engine.checkpoint import save_engine

    for step in range(steps):
        samples = [join([as_sample(text_of(100 * step + number))]) for number in range(4)]
        mine = samples[engine.data_rank :: engine.groups.dp.size()]
        engine.train_step(mine, lr, False, ("test", step)).on_host()
    if torch.distributed.get_rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    save_engine(engine, out)


def our_logits(engine: Any, tokens_T: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of one rank."""
    with torch.no_grad():
        return engine.model.logits(engine.build(as_sample(tokens_T)))


def logits_of(folder: Path) -> torch.Tensor:
    """Logits [T, vocabulary] of the text, on one rank."""
    return our_logits(engine_of(folder, run_of(folder)), text_of())


Said = tuple[torch.Tensor, list[int]]
"""Logits of the text, and the greedy continuation."""


def whole_story(folder: Path, out: Path) -> tuple[Said, Said]:
    """On one rank: what the model says, and what it says after 5 steps that are saved to `out`."""
    engine = engine_of(folder, run_of(folder))
    before = our_logits(engine, text_of()), _our_greedy(engine)
    train_and_save(engine, 5, 1e-2, out)
    return before, (our_logits(engine, text_of()), _our_greedy(engine))


def greedy_of(folder: Path) -> list[int]:
    """Our continuation of the text by the model in a folder, on one rank."""
    return _our_greedy(engine_of(folder, run_of(folder)))


def _our_greedy(engine: Any) -> list[int]:
    tokens_T = torch.cat([text_of(), torch.zeros(GREEDY, dtype=torch.int64)])
    for place in range(TEXT, TEXT + GREEDY):  # later tokens reach no earlier position
        tokens_T[place] = our_logits(engine, tokens_T)[place - 1].argmax()
    return tokens_T[TEXT:].tolist()


def losses_and_training(
    folder: Path, parallel: dict[str, Any], out: Path
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """On any layout without context ranks: the text's losses before and after 5 saved steps."""
    engine = engine_of(folder, run_of(folder, stage__parallel=parallel))
    before = engine.losses(as_sample(text_of()))
    train_and_save(engine, 5, 1e-2, out)
    return before, engine.losses(as_sample(text_of()))


def unchanged(folder: Path, parallel: dict[str, Any], out: Path) -> None:
    """Save the weights in bf16 as they came: the optimizer's state needs a step, of rate 0."""
    run = run_of(folder, stage__parallel=parallel, precision="bf16")
    train_and_save(engine_of(folder, run), 1, 0.0, out)
