"""What `longspan check` prints, and the schema that editors read."""

from pathlib import Path

import pytest
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.recipes.outline import exact, outline, rough
from longspan.recipes.schema import recipe_schema
from longspan.trainer.devices import Machine
from longspan.trainer.settings import ParallelSettings, StageSettings
from rich.console import Console

TWO_STAGES = str(Path(__file__).parent / "two_stages.yaml")


def rows(*overrides: str, machine: Machine, width: int = 120) -> tuple[str, dict[str, list[str]]]:
    """The whole text, and the table's cells by the name of their row."""
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(outline(check_recipe(load_recipe(TWO_STAGES, overrides), machine)))
    text = capture.get()
    cells = [
        [cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.split("\n")
    ]
    return text, {row[0]: row[1:] for row in cells if len(row) == 3}


def test_stages_as_columns():
    text, table = rows(machine=Machine(gpus=0, cores=2))
    assert table["length"] == ["1K", "4K"]
    assert table["steps"] == ["31", "31"]
    assert table["tokens"] == ["1.52M", "1.52M"]
    assert table["tokens per step"] == ["48K", "48K"]
    assert table["sequences per step"] == ["48", "12"]
    assert table["micro-batches"] == ["6 x 4 sequences", "12 x 1 sequence"]
    assert table["attention"] == ["dense", "dense"]
    assert table["added parameters"] == ["-", "-"]
    assert table["RoPE"] == ["base 10,000", "base 100,000"]
    assert table["learning rate"] == ["0.003 to 0, wsd", "0.001 to 1e-05, cosine"]
    assert table["layout"] == ["DP2", "CP2"]
    assert table["exchange"] == ["-", "all_gather, zigzag"]
    assert "2.36M parameters" in text and "ranks: 2 on 2 CPU cores, fp32" in text


def test_layouts_warnings_and_one_rank():
    changes = ["ranks=4", "recompute=full", "stages.0.parallel={tensor: 2, sequence: true}"]
    text, table = rows(*changes, machine=Machine(gpus=0, cores=1))
    assert table["layout"] == ["DP2 TP2 SP", "DP2 CP2"]
    assert "full recompute" in text and "warning: 4 ranks share 1 CPU core" in text
    changes = ["ranks=null", "stages.1.parallel.context=1"]
    text, table = rows(*changes, machine=Machine(gpus=1, cores=1))
    assert table["layout"] == ["one rank", "one rank"]
    assert "ranks: 1 on 1 GPU" in text


def test_rope_in_words():
    yarn = "{kind: yarn, factor: 4, original_length: 1K}"
    changes = ["stages.0.rope={rotary_share: 0.5, nope_layers: [0, 3]}"]
    _, table = rows(*changes, f"stages.1.rope.scaling={yarn}", machine=Machine(gpus=0, cores=2))
    assert table["RoPE"] == [
        "base 10,000, 50% of channels, none in layers 0, 3",
        "base 100,000, yarn x4 from 1,024 tokens",
    ]


def test_attention_in_words():
    nsa = "{mechanism: {kind: nsa}, layers: [{every: 2, mechanism: {kind: dense}}]}"
    indexer = "{mechanism: {kind: indexer, heads: 1, dim: 8, count: 256}}"
    changes = [f"stages.0.attention={nsa}", f"stages.1.attention={indexer}",
               "stages.1.trainable=selection", "stages.1.parallel.context=1"]  # fmt: skip
    text, table = rows(*changes, machine=Machine(gpus=0, cores=2), width=240)
    # Of 2 layers: 3 gates of 6 heads, and for 2 key-value heads an mlp for keys and one for values.
    compressed = 2 * 2 * (32 * 32 * 64 + 64 * 32) + 2 * 32 * 32
    assert 2 * (compressed + 3 * 6 * 192) == 551_680
    assert table["attention"] == [
        "nsa 16 x 64 of 32/16, window 512; dense in 2 of 4 layers",
        "indexer 256 tokens; trains the selection only",
    ]
    assert table["added parameters"] == ["552K", "12.4K"] and "2.36M parameters" in text
    assert "warning: stage base: nsa never chooses" in text


@pytest.mark.parametrize(
    ("number", "text"), [(65536, "64K"), (1000, "1,000"), (3 * 2**20, "3M"), (1536, "1,536")]
)
def test_exact(number, text):
    assert exact(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1_572_864, "1.57M"), (5e9, "5B"), (2e13, "20T")]
)
def test_rough(number, text):
    assert rough(number) == text


def test_schema_knows_every_setting_and_requires_only_kinds():
    schema = recipe_schema()
    assert {"base", "defaults", "stages", "name"} <= schema["properties"].keys()
    stage = schema["$defs"]["StageSettings"]
    assert stage["properties"].keys() == StageSettings.model_fields.keys()
    parallel = schema["$defs"]["ParallelSettings"]
    assert parallel["properties"].keys() == ParallelSettings.model_fields.keys()
    assert parallel["additionalProperties"] is False
    assert {"type": "string"} in stage["properties"]["length"]["anyOf"]
    assert stage["properties"]["length"]["description"]
    required = {key for block in schema["$defs"].values() for key in block["required"]}
    assert required == {"kind"} and schema["required"] == []
