"""What cannot be imported is refused with its name and a fix, and nothing is half-written."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from longspan.attention.settings import RopeSettings
from longspan.errors import CheckpointError, ConversionError
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.convert import convert
from longspan.trainer.convert.convert import checkpoint_model, export_checkpoint, import_checkpoint
from longspan.trainer.convert.families import family_for
from longspan.trainer.convert.hf_config import read_config
from longspan.trainer.convert.safetensors_folder import INDEX, SINGLE
from longspan.trainer.convert.weights import FolderWeights
from longspan.trainer.settings import ModelSettings
from safetensors.torch import load_file, save_file
from support.hugging_face import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model of a family, as transformers saves it; do not change it."""
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return folders[name]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """A copy that may be broken, with fields of its config.json changed or removed (None)."""

    def get(name: str = "llama", **changes: object) -> Path:
        folder = shutil.copytree(saved(name), tmp_path / "hf")
        path = folder / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
        return folder

    return get


def refused(folder: Path) -> str:
    """The message; whatever is refused leaves nothing behind."""
    out = folder.parent / "out"
    with pytest.raises(ConversionError) as caught:
        import_checkpoint(folder, out)
    assert caught.value.fix
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return str(caught.value)


CONFIGS = {
    "architecture": ("llama", {"model_type": "gpt2"}, "gpt2"),
    "another head": ("llama", {"architectures": ["LlamaForTokenClassification"]}, "TokenClass"),
    "own code": ("llama", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "never run"),
    "own code of a known type": ("llama", {"auto_map": {"AutoConfig": "x.X"}}, "auto_map"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "unknown field": ("llama", {"logit_scale": 0.5}, "logit_scale: got 0.5"),
    "activation": ("llama", {"hidden_act": "gelu"}, 'hidden_act: got "gelu"'),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias: got true"),
    "window": ("mistral", {"sliding_window": 128}, "sliding_window: got 128"),
    "window by default": ("mistral", {"sliding_window": ...}, "left out"),
    "window in use": ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    "layer types": ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    "one expert": ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    "no number": ("llama", {"hidden_size": "wide"}, 'hidden_size: got "wide"'),
    "negative": ("llama", {"num_hidden_layers": -1}, "num_hidden_layers: got -1"),
    "nothing": ("llama", {"hidden_size": ...}, "hidden_size: got nothing"),
    "heads": ("llama", {"num_key_value_heads": 3}, "no multiple of 3"),
    "sizes": ("llama", {"intermediate_size": 64}, "has shape [48, 32], expected [64, 32]"),
    "vocabulary": ("llama", {"vocab_size": 99}, "has shape [101, 32], expected [99, 32]"),
    "fewer layers": ("llama", {"num_hidden_layers": 3}, "no place in this model: model.layers.3"),
    "more layers": ("llama", {"num_hidden_layers": 5}, "missing: model.layers.4"),
    "norms": ("qwen3", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "q_norm"),
    "tied and not": ("llama", {"tie_word_embeddings": True}, "lm_head.weight is not model.embed"),
    "untied and not": ("qwen2", {"tie_word_embeddings": False}, "missing: lm_head.weight"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_imported_is_refused_by_name(copy, case):
    name, changes, part = CONFIGS[case]
    assert part in refused(copy(name, **changes))


def test_all_unsupported_fields_are_named_at_once(copy):
    message = refused(copy(logit_scale=0.5, mlp_bias=True, hidden_act="relu"))
    assert all(name in message for name in ("logit_scale", "mlp_bias", "hidden_act"))


def test_a_missing_field_has_the_default_of_its_family(copy):
    folder = copy("qwen2", num_key_value_heads=None, tie_word_embeddings=True, rms_norm_eps=...)
    hf = read_config(folder)
    assert (hf.model.kv_heads, hf.model.norm_epsilon) == (4, 1e-6)


def test_a_shard_that_is_not_there(copy):
    folder = copy()
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refused(folder)


def test_a_shard_that_is_cut_short(copy):
    folder = copy()
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in refused(folder)


def test_an_index_that_points_outside(copy):
    folder = copy()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../../secret.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "no plain file name" in refused(folder)


def test_an_index_of_another_model(copy):
    folder = copy()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert "lm_head.weight" in refused(folder)


def only(folder: Path, content: bytes) -> Path:
    """The folder with `content` as its only weights."""
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / SINGLE).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"", "no usable safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", "longer than the file"),
        (struct.pack("<Q", 2) + b"[]", "no usable safetensors"),
        (struct.pack("<Q", 2) + b"{}", "tensors are missing"),
    ],
    ids=["pointer", "empty", "header", "list", "nothing"],
)
def test_a_file_that_is_no_safetensors(copy, content, part):
    assert part in refused(only(copy(), content))


def test_pickles_are_not_opened(copy):
    folder = only(copy(), b"")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    message = refused(folder)
    assert "pytorch_model.bin" in message
    assert "safetensors version" in message


def test_dtypes_that_no_run_trains_in(saved, tmp_path):
    half = save_tiny("llama", tmp_path / "hf", torch.float16)
    assert "fp32 is exact" in refused(half)
    import_checkpoint(half, tmp_path / "out", dtype="fp32")
    whole = load_file(tmp_path / "out" / SINGLE)
    assert {tensor.dtype for tensor in whole.values()} == {torch.float32}
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in whole.items()}, tmp_path / "out" / SINGLE)
    with pytest.raises(ConversionError, match="neither BF16, F16 nor F32"):
        FolderWeights(tmp_path / "out")


def test_surplus_that_is_harmless_is_left_out(copy, tmp_path):
    folder = copy("qwen2")
    whole = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    whole["lm_head.weight"] = whole["model.embed_tokens.weight"].clone()
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    only(folder, b"")
    save_file(whole, folder / SINGLE)
    import_checkpoint(folder, tmp_path / "out")
    assert whole.keys() - load_file(tmp_path / "out" / SINGLE).keys() == {
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    }


def test_what_is_there_is_not_overwritten(saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConversionError, match="not empty"):
        import_checkpoint(saved("llama"), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (tmp_path / "out" / "mine").unlink()
    import_checkpoint(saved("llama"), tmp_path / "out")


def test_a_write_that_fails_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_atomically", full)
    with pytest.raises(ConversionError, match="No space left"):
        import_checkpoint(saved("llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_model_than_the_weights(saved):
    weights = FolderWeights(saved("llama"))
    other = weights.hf.model.model_copy(update={"norm_epsilon": 1e-6, "init_std": 1.0})
    with pytest.raises(ConversionError) as caught:
        weights.check_model(other, 100)
    assert "model.norm_epsilon is 1e-06" in str(caught.value)
    assert "100 tokens" in str(caught.value)
    assert "init_std" not in str(caught.value)
    weights.check_model(weights.hf.model, weights.hf.vocab)


MODEL = {"hidden": 32, "layers": 2, "heads": 4, "ffn_hidden": 48}


@pytest.mark.parametrize(
    ("change", "family"),
    [
        ({}, "llama"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "moe": {"experts": 4}}, "qwen3_moe"),
        ({"moe": {"experts": 4}}, None),
        ({"qk_norm": True, "qkv_bias": True}, None),
    ],
    ids=str,
)
def test_the_family_of_a_run_that_started_from_random_weights(change, family):
    model = ModelSettings.model_validate(MODEL | change)
    if family is None:
        with pytest.raises(ConversionError, match="no Hugging Face family has"):
            family_for(model, RopeSettings())
    else:
        assert family_for(model, RopeSettings()).name == family


def test_a_checkpoint_that_is_none(saved, tmp_path):
    with pytest.raises(CheckpointError, match="does not say what model"):
        checkpoint_model(CheckpointFiles.of(tmp_path))
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_checkpoint(
            CheckpointFiles.of(tmp_path), tmp_path / "out", hf=read_config(saved("llama"))
        )
    assert not list(tmp_path.iterdir())
