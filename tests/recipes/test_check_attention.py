"""Rules of a stage's attention: what here is well-formed and cannot run, or is warned of."""

from pathlib import Path

import pytest
from longspan.attention.catalogue import ENTRIES
from longspan.attention.layer_settings import AttentionSettings
from longspan.attention.mechanism_settings import HisaSettings
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.check_mechanism import check_mechanism
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine

TWO_STAGES = str(Path(__file__).parent / "two_stages.yaml")
CPU = Machine(0, 64)
# The second stage: 4,096 tokens, 4 layers, 6 query heads and 2 key-value heads of 32 channels.
BASE = "stages.1.parallel.context=1"
LEARNS = "stages.1.trainable=selection"


def stage(*changes: str):
    return [BASE, *(f"stages.1.attention.{change}" for change in changes)]


def check(*overrides: str):
    return check_recipe(load_recipe(TWO_STAGES, overrides), CPU)


def problems(*overrides: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        check(*overrides)
    found = caught.value.problems
    assert len({p.path for p in found}) == len(found)
    at = "stages.1."
    return {p.path.removeprefix(at): f"{p.value}; {p.expected}; {p.fix}" for p in found}


def layers(*rules: str) -> str:
    return f"layers=[{', '.join(rules)}]"


MOBA = "{kind: moba, block: 64}"
SEER = "{kind: seer}"
HISA = HisaSettings()
KINDS = {entry.kind: {"kind": entry.kind} for entry in ENTRIES}
KINDS["window"]["window"] = 64
# Changes of the attention, the path that is named from there, and a part of the message.
RULES = {
    "layer that is not there": (
        [layers(f"{{layers: [1, 4, 7], mechanism: {MOBA}}}")],
        "layers.0.layers",
        "4, 7; layers from 0 to 3 (model.layers is 4)",
    ),
    "only layers that are not there": (
        [layers(f"{{layers: [4], mechanism: {MOBA}}}")],
        "layers.0.layers",
        "4; layers from 0 to 3",
    ),
    "a layer twice": (
        [layers(f"{{layers: [1, 1], mechanism: {MOBA}}}")],
        "layers.0.layers",
        "1; each layer once",
    ),
    "no layer": ([layers(f"{{layers: [], mechanism: {MOBA}}}")], "layers.0.layers", "at least one"),
    "every fifth of four": (
        [layers(f"{{every: 5, mechanism: {MOBA}}}")],
        "layers.0.every",
        "5; at most model.layers (4)",
    ),
    "last five of four": (
        [layers(f"{{last: 5, mechanism: {MOBA}}}")],
        "layers.0.last",
        "5; at most model.layers (4)",
    ),
    "overridden rule": (
        [
            layers(
                f"{{layers: [1], mechanism: {MOBA}}}",
                "{first: 2, mechanism: {kind: window, window: 64}}",
            )
        ],
        "layers.0",
        "moba; a rule that changes a layer; later rules override it; remove the rule",
    ),
    "what the default says": (
        [f"mechanism={MOBA}", layers(f"{{first: 2, mechanism: {MOBA}}}")],
        "layers.0",
        "moba; a rule that changes a layer; its layers have that mechanism anyway",
    ),
    "one of two equal rules": (
        [layers(*[f"{{first: 2, mechanism: {MOBA}}}"] * 2)],
        "layers.0",
        "later rules override it",
    ),
    "unused default": (
        ["mechanism={kind: window, window: 64}", layers(f"{{first: 4, mechanism: {MOBA}}}")],
        "mechanism",
        "window; left out: a rule names every layer",
    ),
    "a rule's own numbers": (
        [layers("{first: 2, mechanism: {kind: window, window: 4K}}")],
        "layers.0.mechanism.window",
        "4096; less than the stage's length (4096)",
    ),
    "two output gates": (
        ["output_gate=head", layers("{first: 1, mechanism: {kind: ssa}}")],
        "output_gate",
        "ssa has an output gate of its own",
    ),
    "growth beyond the length": (
        ["log_scale_from=4K"],
        "log_scale_from",
        "4096; less than the stage's length (4096)",
    ),
}

# Kind, changes of its defaults, the setting that is named, and a part of the message.
MECHANISMS = {
    "window": ("window", {"window": 4096}, "window", "kind: dense"),
    "nsa block": (
        "nsa",
        {"block": 72},
        "block",
        "72; a multiple of compress_stride (16); block: 64 or 80",
    ),
    "nsa stride": ("nsa", {"compress_length": 24}, "compress_length", "compress_length: 16 or 32"),
    "nothing compressed": (
        "nsa",
        {"compress_length": 4112},
        "compress_length",
        "at most the stage's length (4096)",
    ),
    "more forced than chosen": (
        "nsa",
        {"initial": 3, "local": 14},
        "count",
        "16; at least initial (3) + local (14)",
    ),
    "infllm block": ("infllm_v2", {"block": 56}, "block", "block: 48 or 64"),
    "infllm stride": ("infllm_v2", {"compress_length": 40}, "compress_length", "32 or 48"),
    "dense below the window": (
        "infllm_v2",
        {"dense_below": 2047},
        "dense_below",
        "the tokens of the local blocks (2048), which are always seen; dense_below: 0 or 2048",
    ),
    "beta of nothing": ("ssa", {"align": 0.0, "beta": 2.0}, "beta", "2; no such setting: with"),
    "count of the full stream": (
        "ssa",
        {"evaluate": "full", "evaluate_count": 32},
        "evaluate_count",
        "evaluate: sparse",
    ),
    "never sparse": (
        "ssa",
        {"align": 0.0, "sparse_share": 0.0, "evaluate": "full"},
        "sparse_share",
        "nothing would be sparse",
    ),
    "too few query heads": (
        "sharded_heads",
        {},
        "stride",
        "8; at most model.heads (6): other blocks no head would see; stride: 6 or less, or "
        "model.heads: 8 or more",
    ),
    "too few key-value heads": (
        "sharded_heads",
        {"stride": 6, "shard_by": "kv_head"},
        "stride",
        "stride: 2 or less, or shard_by: query_head, or model.query_groups: 6 or more",
    ),
    "no threshold": ("seer", {"evaluate": "threshold"}, "threshold", "threshold: 0.0005"),
    "unused threshold": ("seer", {"threshold": 0.1}, "threshold", "evaluate: threshold"),
    "unused count": ("seer", {"evaluate": "dense", "count": 8}, "count", "evaluate: budget"),
    "odd gate": ("seer", {"dim": 65}, "dim", "65; an even number"),
    "local tokens": ("indexer", {"local": 1}, "local", "1; 0 with block 1"),
    "local beyond count": (
        "indexer",
        {"block": 128, "count": 2, "local": 3},
        "local",
        "at most count (2)",
    ),
    "odd index": ("indexer", {"dim": 31}, "dim", "dim: 30 or 32"),
    "odd turning index": (
        "indexer",
        {"dim": 30},
        "rotary_share",
        "0.5 (15 channels); a share that makes an even number of 30 channels; rotary_share: 0.4667",
    ),
    "no turning index": ("indexer", {"rotary_share": 0.01}, "rotary_share", "rotary_share: 0.0157"),
    "hisa of blocks": ("indexer", {"block": 128, "hisa": HISA}, "hisa", "it chooses tokens"),
    "hisa that chooses nothing": ("indexer", {"attend": "dense", "hisa": HISA}, "hisa", "dense"),
    "hisa of too few": (
        "indexer",
        {"count": 1000, "hisa": HisaSettings(budget=7)},
        "hisa.budget",
        "7; at least 8: blocks that hold count (1000) tokens",
    ),
}


@pytest.mark.parametrize(("changes", "path", "part"), RULES.values(), ids=RULES.keys())
def test_rule_of_a_stage(changes, path, part):
    found = problems(*stage(*changes))
    assert list(found) == [f"attention.{path}"]
    assert part in found[f"attention.{path}"]


@pytest.mark.parametrize("case", MECHANISMS.values(), ids=MECHANISMS.keys())
def test_rule_of_a_mechanism(case):
    kind, changes, path, part = case
    settings = AttentionSettings.model_validate({"mechanism": KINDS[kind]}).mechanism
    recipe = load_recipe(TWO_STAGES)
    stage = recipe.stages[1].model_copy(update={"trainable": "selection"})
    # A copy is not validated: the settings themselves may refuse some of this.
    settings = settings.model_copy(update=changes)
    (found,) = check_mechanism(recipe.model, stage, settings, [0, 1], "at")
    assert found.path == f"at.{path}"
    assert part in f"{found.value}; {found.expected}; {found.fix}"


def test_mechanisms_are_checked_where_they_stand():
    found = problems(
        *stage(
            "mechanism={kind: infllm_v2, count: 1, dense_below: 2047}",
            layers("{first: 2, mechanism: {kind: sharded_heads}}"),
        )
    )
    at = "attention."
    assert set(found) == {f"{at}mechanism.dense_below", f"{at}layers.0.mechanism.stride"}


def test_keys_cannot_turn_first_where_nothing_turns():
    nsa = "mechanism={kind: nsa, compress_after_rope: true}"
    nowhere, somewhere = "nope_layers=[0, 1, 2, 3]", "nope_layers=[0, 1, 2]"
    found = problems(*stage(nsa), f"stages.1.rope.{nowhere}")
    assert list(found) == ["attention.mechanism.compress_after_rope"]
    check(*stage(nsa), f"stages.1.rope.{somewhere}")


def test_the_gate_of_seer_learns_alone():
    found = problems(*stage(f"mechanism={SEER}"))
    assert list(found) == ["trainable"]
    assert found["trainable"].startswith("all; selection: the gate of seer")
    found = problems(*stage(layers("{first: 1, mechanism: {kind: seer, form: block}}")))
    assert list(found) == ["trainable"]


def test_a_selection_that_learns_nothing():
    found = problems(*stage(f"mechanism={MOBA}"), LEARNS)
    assert list(found) == ["trainable"] and "seer or indexer" in found["trainable"]
    # The rule decides nothing where another one holds.
    check(*stage(layers("{last: 1, mechanism: {kind: indexer, count: 64}}")), LEARNS)


LONGROPE = (
    "stages.1.rope.scaling={kind: longrope, original_length: 1K, "
    f"short_factors: {[1] * 16}, long_factors: {[4] * 16}}}"
)


def test_an_index_turns_in_as_many_pairs_as_longrope_has_factors():
    index = "mechanism={kind: indexer, count: 64, dim: %d, rotary_share: %s}"
    found = problems(*stage(index % (128, 0.5)), LONGROPE)
    path = "attention.mechanism.rotary_share"
    assert list(found) == [path]
    assert "0.5 (64 channels); 32 channels that turn" in found[path]
    check(*stage(index % (128, found[path].split("rotary_share: ")[1])), LONGROPE)
    # Too narrow for 16 pairs, so that no share mends it.
    assert problems(*stage(index % (16, 1)), LONGROPE)[path].endswith("; ")
    check(*stage(index % (32, 1)), LONGROPE)


def test_an_index_of_one_pair_cannot_be_stretched_by_ntk():
    index = "mechanism={kind: indexer, count: 64, dim: 4, rotary_share: %s}"
    scaling = "stages.1.rope.scaling={kind: ntk, factor: 4}"
    found = problems(*stage(index % 0.5), scaling)
    assert "at least 4 channels" in found["attention.mechanism.rotary_share"]
    check(*stage(index % 1), scaling)
    check(*stage(index % 0.5), scaling.replace("ntk", "linear"))
    # Where nothing turns there is nothing to stretch; in the one layer without an index it does.
    rule = layers("{first: 1, mechanism: {kind: indexer, count: 64, dim: 4}}")
    check(*stage(rule), scaling, "stages.1.rope.nope_layers=[0]")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.kind)
def test_over_context_ranks_the_catalogue_is_right(entry):
    settings = {"window": "{kind: window, window: 64, first: 4}"}.get(
        entry.kind, f"{{kind: {entry.kind}}}"
    )
    changes = [f"stages.1.attention.mechanism={settings}", "stages.1.attention.output_gate=head"]
    if entry.kind in ("ssa", "seer", "indexer"):
        changes.pop()
    changes += [LEARNS] if entry.kind in ("seer", "indexer") else []
    changes += ["model.heads=12", "model.query_groups=4"]
    check(*changes)
    if entry.context != "yes":
        assert entry.context == "form token"
        found = problems(*changes, "stages.1.attention.mechanism.form=block")
        assert "token: the queries of a block" in found["attention.mechanism.form"]


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        (["defaults.attention.log_scale_from=1K", BASE], "defaults.attention.log_scale_from"),
        (
            ["defaults.attention.mechanism={kind: infllm_v2, dense_below: 64}", BASE],
            "defaults.attention.mechanism.dense_below",
        ),
    ],
)
def test_problems_of_the_defaults_are_told_there(changes, path):
    assert path in problems(*changes)


@pytest.mark.parametrize(
    "changes",
    [
        ["mechanism={kind: window, window: 64, first: 64}"],
        ["mechanism={kind: nsa, compress: mean, encode_position: keys_and_values}"],
        ["mechanism={kind: nsa, preset: fla}"],
        ["mechanism={kind: nsa, branch_kv: independent}", "output_gate=channel"],
        ["mechanism={kind: infllm_v2, count: 4, local: 4, dense_below: 0}"],
        ["mechanism={kind: infllm_v2, count: 4, local: 4, dense_below: 256, coarse: 0}"],
        ["mechanism={kind: ssa, align: 0}", "sinks=true"],
        ["mechanism={kind: ssa, evaluate: full, sparse_share: 0}"],
        ["mechanism={kind: sharded_heads, stride: 6, local: 4}"],
        ["mechanism={kind: sharded_heads, stride: 2, local: 4, shard_by: kv_head}"],
        ["mechanism={kind: indexer, count: 1024, hisa: {budget: 8}}", "sinks=true"],
        ["mechanism={kind: indexer, block: 128, count: 16, local: 1, share: kv_head, heads: 1}"],
        ["mechanism={kind: indexer, attend: dense}"],
        [f"mechanism={MOBA}", layers("{every: 2, mechanism: {kind: dense}}"), "scale=0.2"],
        [
            layers(
                f"{{first: 3, mechanism: {MOBA}}}",
                "{layers: [1], mechanism: {kind: nsa}}",
                "{last: 2, mechanism: {kind: dense}}",
            )
        ],
        ["output_gate=head", "log_scale_from=4095", "scale=0.17677669529663687"],
    ],
)
def test_what_works_is_let_through(changes):
    cold = [text for text in check(*stage(*changes)).warnings if "learned anything" in text]
    assert check(*stage(*changes)).warnings == tuple(cold)


@pytest.mark.parametrize(
    ("settings", "length", "never"),
    [
        ("{kind: nsa}", 1024, True),
        ("{kind: nsa}", 1026, False),
        ("{kind: infllm_v2}", 4096, True),
        ("{kind: infllm_v2, dense_below: 4096}", 6144, True),
        ("{kind: infllm_v2, dense_below: 4096}", 6146, False),
        ("{kind: infllm_v2, count: 1, local: 1, dense_below: 4096}", 4094, True),
        ("{kind: infllm_v2, count: 1, local: 1, dense_below: 4096}", 4096, False),
        ("{kind: ssa}", 256, True),
        ("{kind: ssa}", 258, False),
        ("{kind: moba}", 1536, True),
        ("{kind: moba}", 1538, False),
        ("{kind: sharded_heads, stride: 6}", 1024, True),
        ("{kind: sharded_heads, stride: 6}", 1026, False),
        ("{kind: indexer}", 2048, True),
        ("{kind: indexer}", 2050, False),
        ("{kind: indexer, attend: dense}", 2048, False),
        ("{kind: seer}", 4096, True),
        ("{kind: seer}", 4098, False),
        ("{kind: seer, evaluate: threshold, threshold: 0.1}", 4096, False),
    ],
)
def test_a_choice_that_never_leaves_anything_out_is_warned_of(settings, length, never):
    changes = [f"stages.1.length={length}", f"stages.1.batch_tokens={length * 2}"]
    changes += ["evaluation.documents=0", *stage(f"mechanism={settings}")]
    changes += [LEARNS] if "seer" in settings else []
    found = [text for text in check(*changes).warnings if "never chooses" in text]
    assert len(found) == never
    assert all(text.startswith("stage stretch: ") for text in found)


def test_other_warnings():
    block = stage("mechanism={kind: seer, form: block, count: 8}")
    assert "not a language model's" in check(*block, LEARNS).warnings[0]
    assert check(*block, "stages.1.attention.mechanism.evaluate=dense",
                 "stages.1.attention.mechanism.count=64", LEARNS).warnings == ()  # fmt: skip
    early = "stages.0.attention.mechanism={kind: indexer, count: 64}"
    warnings = check(early, BASE, "stages.0.trainable=selection").warnings
    assert "random weights" in warnings[0]
