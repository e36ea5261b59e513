"""Every family with every RoPE type: the logits that transformers computes."""

import pytest
from support.hugging_face import logits_of, save_tiny, text_of, their_logits

ORIGINAL = 16  # shorter than the text, so that what depends on the length is at work
TYPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_theta": 500.0, "factor": 4.0},
    "dynamic": {"rope_theta": 500.0, "factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 8.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {"original_max_position_embeddings": ORIGINAL, "factor": 16.0},
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3"]
WIDTH = {"llama": 8, "qwen2": 8, "smollm3": 8}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(worlds, tmp_path, family, kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **TYPES[kind]}
    changes = {}
    if kind == "dynamic":
        changes["max_position_embeddings"] = ORIGINAL
    if kind == "longrope":
        pairs = WIDTH.get(family, 16) // 2
        rope |= {
            "short_factor": [1.0] * pairs,
            "long_factor": [1.0 + 0.5 * pair for pair in range(pairs)],
        }
    folder = save_tiny(family, tmp_path / "hf", rope_parameters=rope, **changes)
    ours = worlds(1).run(logits_of, folder)[0]
    assert (ours - their_logits(folder, text_of())).abs().max() < 1e-4
