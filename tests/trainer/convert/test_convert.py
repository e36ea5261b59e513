"""Every family in and out: transformers' own classes are the oracle."""

import json
from pathlib import Path

import pytest
import torch
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.convert.convert import export_checkpoint, import_checkpoint
from longspan.trainer.convert.hf_config import read_config
from safetensors import safe_open
from support.hugging_face import (
    MODELS,
    greedy_of,
    losses_and_training,
    save_tiny,
    text_of,
    their_greedy,
    their_logits,
    unchanged,
    whole_story,
)


@pytest.mark.parametrize("name", MODELS)
def test_in_train_and_out_is_what_transformers_computes(worlds, tmp_path, name):
    theirs = save_tiny(name, tmp_path / "hf")
    import_checkpoint(theirs, tmp_path / "in")
    (before, greedy), (after, continued) = worlds(1).run(
        whole_story, tmp_path / "in", tmp_path / "step"
    )[0]
    assert (before - their_logits(theirs, text_of())).abs().max() < 1e-4
    assert greedy == their_greedy(theirs)
    assert (before - after).abs().max() > 1e-2, "training changed nothing"
    hf = export_checkpoint(
        CheckpointFiles.of(tmp_path / "step"), tmp_path / "out", hf=read_config(theirs)
    )
    assert hf.dtype == "fp32"
    assert (after - their_logits(tmp_path / "out", text_of())).abs().max() < 1e-4
    assert continued == their_greedy(tmp_path / "out")


SPLIT = {"tensor": 2, "pipeline": 2}
LAYOUTS = {
    "llama": ("llama", SPLIT),
    "mistral": ("mistral", SPLIT),
    "qwen2_sp": ("qwen2", SPLIT | {"sequence": True}),
    "qwen3": ("qwen3", SPLIT),
    "qwen3_moe_sp": ("qwen3_moe", SPLIT | {"sequence": True}),
    "qwen3_moe_ep2": ("qwen3_moe", {"expert": 2, "pipeline": 2}),
    "smollm3": ("smollm3", SPLIT),
}


def their_losses(folder: Path) -> torch.Tensor:
    tokens_T = text_of()
    logits = their_logits(folder, tokens_T).log_softmax(-1)
    return -logits.gather(1, tokens_T.roll(-1)[:, None])[:-1, 0]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_layout_reads_and_leaves_the_same_model(worlds, tmp_path, name, layout):
    theirs = save_tiny(name, tmp_path / "hf")
    found = worlds(4).run(losses_and_training, theirs, layout, tmp_path / "step")
    before, after = found[-1]
    assert (before[:-1] - their_losses(theirs)).abs().max() < 1e-4
    assert (before - after).abs().max() > 1e-2
    export_checkpoint(
        CheckpointFiles.of(tmp_path / "step"), tmp_path / "out", hf=read_config(theirs)
    )
    assert (after[:-1] - their_losses(tmp_path / "out")).abs().max() < 1e-4
    assert worlds(1).run(greedy_of, tmp_path / "out")[0] == their_greedy(tmp_path / "out")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe"])
def test_there_and_back_in_bf16_is_equal_byte_by_byte(worlds, tmp_path, name):
    theirs = save_tiny(name, tmp_path / "hf", torch.bfloat16)
    hf = import_checkpoint(theirs, tmp_path / "in")
    assert hf.dtype == "bf16"
    parallel = {} if name == "qwen2" else {"expert": 2} if "moe" in name else {"tensor": 2}
    worlds(2).run(unchanged, tmp_path / "in", parallel, tmp_path / "step")
    export_checkpoint(
        CheckpointFiles.of(tmp_path / "step"), tmp_path / "out", hf=hf, shard_bytes=30_000
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    expected = tensors(theirs)
    for folder in ("in", "out"):
        found = tensors(tmp_path / folder)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == torch.bfloat16
            assert torch.equal(found[key].view(torch.int16), tensor.view(torch.int16)), key
    for field in ("bos_token_id", "num_attention_heads", "head_dim"):
        said = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", theirs)]
        assert said[0][field] == said[1].get(field, said[0][field])
