"""`longspan import`, a run from what it made, and `longspan export`, as a user types them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.settings import RopeSettings
from longspan.errors import ConversionError
from longspan.trainer.convert.attention import exported_attention
from longspan.trainer.convert.families import family_for
from longspan.trainer.convert.hf_config import read_config
from longspan.trainer.convert.parity import compare, report
from longspan.trainer.convert.weights import FolderWeights
from longspan.trainer.data.tokenizer import train_tokenizer
from longspan.trainer.observe.events import read_events
from longspan.trainer.settings import ModelSettings
from support.hugging_face import VOCAB, save_tiny, their_logits

RECIPE = """
base: smoke
model: {from: "hf:in"}
checkpoint: {every: 100}
evaluation: {sequences: 2, visible: 16, documents: 2}
stages:
  - {name: short, length: 64, tokens: 512, batch_tokens: 256, optimizer: {lr: 1e-2}}
  - name: long
    length: 128
    tokens: 512
    batch_tokens: 256
    optimizer: {lr: 1e-2}
    rope: {base: 50000}
    parallel: {context: 2}
"""


def longspan(folder, *arguments):
    environment = {**os.environ, "LONGSPAN_CACHE": str(folder / "cache"), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "longspan.cli", *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, its tokenizer and a recipe."""
    folder = tmp_path_factory.mktemp("home")
    train_tokenizer(["def f(x):\n    return x\n"] * 3, 300).save(folder / "hf")
    save_tiny("llama", folder / "hf", vocab_size=300, eos_token_id=0)
    (folder / "mine.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def imported(home):
    done = longspan(home, "import", "hf", "in", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(home, imported):
    done = longspan(home, "train", "mine.yaml", "--run-dir", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "run"


def test_an_import_says_what_it_is_and_that_the_logits_agree(home, imported):
    assert "llama: 4 layers, hidden 32" in imported and "the models are equal" in imported
    assert "greedy continuation: 32 of 32" in imported
    assert (home / "in" / "tokenizer.json").read_bytes() == (
        home / "hf" / "tokenizer.json"
    ).read_bytes()


def test_a_run_starts_from_the_weights_and_its_export_is_what_it_trained(home, trained):
    first = next(e for e in read_events(trained / "events.jsonl") if e["event"] == "step")
    assert first["step"] == 1
    done = longspan(home, "export", "run", "out", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the models are equal" in done.stdout
    config = json.loads((home / "out" / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 50000
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (128, 0)
    card = (home / "out" / "README.md").read_text()
    for part in (
        "recipe\n`mine`",
        "| long | 128 | 512 | dense | base 50,000",
        "python-stdlib",
        "attempt",
    ):
        assert part in card
    tokens_T = torch.arange(20)
    difference = their_logits(home / "out", tokens_T) - their_logits(home / "hf", tokens_T)
    assert difference.abs().max() > 1e-2, "training changed nothing"


def test_an_export_needs_neither_the_first_model_nor_the_cache(home, trained):
    for name in ("in", "cache"):
        (home / name).rename(home / f"{name}.away")
    try:
        checkpoint = next((trained / "checkpoints").glob("step-*4"))
        done = longspan(home, "export", checkpoint, "again", "--dtype", "bf16")
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads((home / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    finally:
        for name in ("in", "cache"):
            (home / f"{name}.away").rename(home / name)


BAD = {
    "no model": (["import", "nowhere", "new"], "nowhere has no config.json"),
    "an import over something": (["import", "hf", "in"], "in exists already and is not empty"),
    "an export over something": (["export", "run", "in"], "in exists already and is not empty"),
    "no run": (["export", "hf", "new"], "holds no run"),
    "no checkpoint": (["export", "empty", "new"], "no complete checkpoint"),
    "a dtype": (["export", "run", "new", "--dtype", "fp8"], "--dtype: got fp8"),
    "text alone": (["import", "hf", "new", "--text", "hf"], "--text has no effect"),
    "no text": (["import", "hf", "new", "--verify", "--text", "hf"], "--text: hf cannot be read"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD.values(), ids=BAD.keys())
def test_what_is_wrong_is_said_and_nothing_is_written(home, trained, arguments, part):
    (home / "empty").mkdir(exist_ok=True)
    (home / "empty" / "recipe.yaml").write_bytes((trained / "recipe.yaml").read_bytes())
    before = sorted(path.name for path in home.iterdir())
    done = longspan(home, *arguments)
    assert done.returncode == 2 and part in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in home.iterdir()) == before


def test_parity_finds_the_place_of_the_largest_difference():
    def ours(tokens_T):
        return torch.nn.functional.one_hot(tokens_T, VOCAB).float()

    def theirs(tokens_T):
        logits = ours(tokens_T)
        if len(tokens_T) > 7:
            logits[7, 5] += 3.0
        return logits

    parity = compare(ours, theirs, torch.arange(40), 4)
    assert (parity.position, parity.token, parity.largest) == (7, 5, 3.0)
    assert parity.agreed == parity.continued == 4 and not parity.holds(1e-4)
    assert "NOT equal" in report(parity, 1e-4)[-1]
    assert compare(ours, ours, torch.arange(40), 4).holds(1e-4)


def test_the_family_of_a_model_is_kept_where_it_computes_the_same():
    shape = {"hidden": 32, "layers": 2, "heads": 2, "ffn_hidden": 48}
    plain, biased = (ModelSettings(**shape, qkv_bias=bias) for bias in (False, True))
    assert family_for(plain, RopeSettings(), "mistral").name == "mistral"
    assert family_for(biased, RopeSettings(), "mistral").name == "qwen2"
    assert family_for(plain, RopeSettings(nope_layers=(1,))).name == "smollm3"
    odd = ModelSettings(**{**shape, "hidden": 33, "head_dim": 16})
    assert family_for(odd, RopeSettings()).name == "mistral"
    with pytest.raises(ConversionError, match="only a share"):
        family_for(plain, RopeSettings(rotary_share=0.5))


def test_a_partial_rotation_that_transformers_ignores_is_refused(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    save_tiny("llama", tmp_path / "hf", rope_parameters=rope)
    with pytest.raises(ConversionError, match=r"partial_rotary_factor: got 0\.5"):
        read_config(tmp_path / "hf")


def test_a_comparison_picks_the_rope_that_the_text_asks_for(home):
    """The text is shorter than the original length, the model's own length is not."""
    longrope = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0}
    longrope |= {"original_max_position_embeddings": 2048, "short_factor": [1.0] * 4}
    longrope |= {"long_factor": [1.0, 2.0, 4.0, 8.0]}
    save_tiny("llama", home / "longrope", rope_parameters=longrope, max_position_embeddings=8192)
    done = longspan(home, "import", "longrope", "imported-longrope", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the models are equal" in done.stdout


def test_rounded_weights_are_compared_rounded(home):
    done = longspan(home, "import", "hf", "imported-bf16", "--dtype", "bf16", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((home / "imported-bf16" / "config.json").read_text())
    assert (config["dtype"], config["bos_token_id"]) == ("bfloat16", 1)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(home):
    save_tiny("llama", home / "small", vocab_size=200, eos_token_id=0)
    (home / "small" / "tokenizer.json").write_bytes((home / "hf" / "tokenizer.json").read_bytes())
    (home / "small" / "tokenizer_config.json").write_bytes(
        (home / "hf" / "tokenizer_config.json").read_bytes()
    )
    done = longspan(home, "import", "small", "imported-small")
    assert done.returncode == 2 and "the model's embedding 200" in done.stderr
    assert not (home / "imported-small").exists()


MALFORMED = {
    "rope_scaling": 8,
    "num_hidden_layers": "2",
    "rope_theta": "1e6",
    "head_dim": 0,
    "rope_parameters": {"rope_type": ["linear"]},
    "no_rope_layer_interval": "4",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_config_is_named(tmp_path, name):
    save_tiny("smollm3" if "no_rope" in name else "llama", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: MALFORMED[name]}))
    with pytest.raises(ConversionError, match=name):
        read_config(tmp_path / "hf")


def test_two_sets_of_weights_are_refused(tmp_path):
    save_tiny("llama", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match="has both"):
        FolderWeights(tmp_path / "hf")


def attention(**changes):
    return AttentionSettings.model_validate(changes)


def test_attention_that_transformers_does_not_have_is_refused_or_told():
    assert exported_attention(attention(), 4) is None
    moba = attention(mechanism={"kind": "moba"})
    assert exported_attention(moba, 4) == "trained with moba 3 x 512; transformers attends densely"
    seer = exported_attention(attention(mechanism={"kind": "seer"}), 4)
    assert seer.endswith("and what selects keys is not exported")
    changes = {"output_gate": "head", "sinks": True, "log_scale_from": 64}
    with pytest.raises(ConversionError, match="nsa, output_gate head, sinks, log_scale_from"):
        exported_attention(attention(mechanism={"kind": "nsa"}, **changes), 4)
