"""Cross-field rules: every recipe here is well-formed and cannot run."""

from pathlib import Path

import pytest
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.trainer.devices import Machine

TWO_STAGES = str(Path(__file__).parent / "two_stages.yaml")
CPU = Machine(gpus=0, cores=64)
MOE = "model.moe={experts: 4}"


def problems(*overrides: str, machine: Machine = CPU) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(TWO_STAGES, overrides), machine)
    found = caught.value.problems
    assert len({p.path for p in found}) == len(found)
    return {p.path: f"{p.value}; {p.expected}; {p.fix}" for p in found}


def stage(change: str) -> str:
    return f"stages.1.{change}"


# Overrides of two_stages.yaml, the path that is named, and a part of the message.
CASES = {
    "heads do not divide hidden": (["model.hidden=200"], "model.hidden", "hidden: 204"),
    "odd head": (["model.head_dim=31"], "model.head_dim", "even"),
    "odd implicit head": (["model.hidden=198"], "model.head_dim", "33 (hidden / heads)"),
    "groups": (["model.query_groups=4"], "model.query_groups", "1 or 2 or 3 or 6"),
    "top_k": (
        ["model.moe={experts: 4, top_k: 5}"],
        "model.moe.top_k",
        "at most model.moe.experts (4)",
    ),
    "one expert of weight 1": (
        ["model.moe={experts: 4, top_k: 1}"],
        "model.moe.normalize",
        "normalize: false",
    ),
    "tensor": (
        ["ranks=3", "stages.0.parallel.tensor=3", "stages.1.parallel.context=1"],
        "stages.0.parallel.tensor",
        "tensor: 1 or 2",
    ),
    "pipeline": (
        ["ranks=6", "stages.0.parallel.pipeline=3"],
        "stages.0.parallel.pipeline",
        "pipeline: 1 or 2 or 4",
    ),
    "sequence without tensor": (
        [stage("parallel.sequence=true")],
        "stages.1.parallel.sequence",
        "tensor 1",
    ),
    "experts over tensor ranks": (
        [MOE, "stages.0.parallel.tensor=2"],
        "stages.0.parallel.sequence",
        "sequence: true",
    ),
    "expert without experts": (
        [stage("parallel.expert=2")],
        "stages.1.parallel.expert",
        "the model has no experts",
    ),
    "expert divides experts": (
        ["model.moe={experts: 3}", stage("parallel.expert=2")],
        "stages.1.parallel.expert",
        "expert: 1 or 3",
    ),
    "expert divides replicas": (
        [MOE, stage("parallel.expert=4")],
        "stages.1.parallel.expert",
        "data x context ranks (2)",
    ),
    "a context rank without a token": (
        [
            "ranks=4",
            stage("length=3"),
            stage("batch_tokens=3072"),
            stage("parallel.context=4"),
            "evaluation.documents=0",
        ],
        "stages.1.length",
        "at least 4: every one of the context ranks needs a token; length: 4, or",
    ),
    "batch and length": (
        [stage("batch_tokens=10000")],
        "stages.1.batch_tokens",
        "batch_tokens: 8192 or 12288",
    ),
    "batch and data ranks": (
        ["stages.0.batch_tokens=36K"],
        "stages.0.batch_tokens",
        "micro_batch 4 x 2 data-parallel ranks",
    ),
    "nodes that do not divide context": (
        ["ranks=6", stage("parallel={context: 6, exchange: double_ring, inner: 4}")],
        "stages.1.parallel.inner",
        "a divisor of context (6) between 1 and 6; inner: 2 or 3",
    ),
    "two dimensions without nodes": (
        ["ranks=4", stage("parallel={context: 4, exchange: two_d}")],
        "stages.1.parallel.inner",
        "nothing; a divisor of context (4) between 1 and 4; inner: 2",
    ),
    "no room for two dimensions": (
        [stage("parallel={context: 2, exchange: two_d, inner: 2}")],
        "stages.1.parallel.inner",
        "exchange: ring or fetch",
    ),
    "nodes of a ring": (
        [stage("parallel={context: 2, exchange: ring, inner: 2}")],
        "stages.1.parallel.inner",
        "no such setting: exchange ring knows no nodes",
    ),
    "nodes that auto finds": (
        [stage("parallel={context: 2, inner: 2}")],
        "stages.1.parallel.inner",
        "no such setting: exchange auto chooses it",
    ),
    "between the nodes of a ring": (
        [stage("parallel={context: 2, exchange: ring, across: ring}")],
        "stages.1.parallel.across",
        "exchange: two_d",
    ),
    "more ranks than heads": (
        [
            "ranks=8",
            "stages.0.parallel.context=8",
            stage("parallel={context: 8, exchange: ulysses}"),
        ],
        "stages.1.parallel.context",
        "at most the 6 query heads of a tensor rank, which ulysses divides; context: 6 or less",
    ),
    "what ulysses keeps anyway": (
        [stage("parallel={context: 2, exchange: ulysses, keep_keys: true}")],
        "stages.1.parallel.keep_keys",
        "ulysses always keeps",
    ),
    "ranks": (["ranks=3"], "stages.1.parallel", "context 2 = 2 ranks; a divisor of"),
    "no decay": (
        [stage("optimizer.decay=0.5")],
        "stages.1.optimizer.decay",
        "schedule: wsd",
    ),
    "warmup and decay": (
        ["stages.0.optimizer={schedule: wsd, warmup: 0.6, decay: 0.5}"],
        "stages.0.optimizer.decay",
        "(0.4)",
    ),
    "warmup and the usual decay": (
        ["stages.0.optimizer={schedule: wsd, warmup: 0.9}"],
        "stages.0.optimizer.decay",
        "0.2 (the default)",
    ),
    "min_lr above lr": ([stage("optimizer.min_lr=1")], "stages.1.optimizer.min_lr", "at most lr"),
    "constant min_lr": (
        [stage("optimizer.schedule=constant")],
        "stages.1.optimizer.min_lr",
        "does not decay",
    ),
    "same name": ([stage("name=base")], "stages.1.name", "stages.0"),
    "carry at the start": (
        ["stages.0.carry_optimizer=false"],
        "stages.0.carry_optimizer",
        "no stage before",
    ),
    "unused exchange": (
        [stage("parallel={exchange: ring}")],
        "stages.1.parallel.exchange",
        "no effect",
    ),
    "unused canary": (
        [stage("parallel={canary: false}")],
        "stages.1.parallel.canary",
        "no effect",
    ),
    "unused layout": (
        ["defaults.parallel.layout=balanced", stage("parallel.context=1")],
        "defaults.parallel.layout",
        "no effect",
    ),
    "induction with QK-norm": (
        ["model.init=induction", "model.qkv_bias=true", "model.qk_norm=true"],
        "model.qk_norm",
        "model.init induction needs",
    ),
    "induction in narrow heads": (
        ["model.init=induction", "model.qkv_bias=true", "model.head_dim=8"],
        "model.head_dim",
        "from 16 to hidden",
    ),
    "induction without RoPE at the start": (
        ["model.init=induction", "model.qkv_bias=true", "stages.0.rope.nope_layers=[0, 2]"],
        "stages.0.rope.nope_layers",
        "0, 2; no layer 0, whose RoPE model.init induction needs",
    ),
    "induction in a part of the channels": (
        ["model.init=induction", "model.qkv_bias=true", "defaults.rope.rotary_share=0.5"],
        "defaults.rope.rotary_share",
        "rotary_share: 1, or model.init: random",
    ),
    "visible": (["evaluation.visible=4K"], "evaluation.visible", "last stage's length (4096)"),
    "held_out grows": (
        ["stages.1.data={held_out: 0.2}"],
        "stages.1.data.held_out",
        "trained on",
    ),
    "missing file": (
        ["defaults.data.sources=[{kind: text, paths: [nowhere.txt]}]"],
        "defaults.data.sources.0.paths.0",
        "nowhere.txt",
    ),
    "missing tokenizer": (
        ["tokenizer={kind: hf, path: nowhere}"],
        "tokenizer.path",
        "tokenizer.json",
    ),
}


YARN = "{kind: yarn, factor: 4, original_length: 1K}"
LONGROPE = "{kind: longrope, original_length: 1K, short_factors: [1, 2], long_factors: [4]}"
LLAMA3 = "{kind: llama3, factor: 1, low_freq_factor: 1, high_freq_factor: 4, original_length: 1K}"
# The same for the RoPE of the second stage, whose heads have 32 channels.
ROPES = {
    "odd share": (["rotary_share=0.6"], "rotary_share", "0.6 (19 channels); a share that makes"),
    "no channels": (["rotary_share=0.01"], "rotary_share", "rotary_share: 0.0625"),
    "layers beyond": (["nope_layers=[4, 0, 7]"], "nope_layers", "4, 7; layers from 0 to 3"),
    "ntk of one pair": (
        ["rotary_share=0.0625", "scaling={kind: ntk, factor: 2}"],
        "scaling.kind",
        "2 channels turn",
    ),
    "dynamic up to its length": (
        ["scaling={kind: dynamic, factor: 2, original_length: 4K}"],
        "scaling.original_length",
        "4096; less than the stage's length (4096)",
    ),
    "linear by 1": (["scaling={kind: linear, factor: 1}"], "scaling", "linear, which changes"),
    "ntk by 1": (["scaling={kind: ntk, factor: 1}"], "scaling", "ntk, which changes nothing"),
    "yarn by 1": (
        ["scaling={kind: yarn, factor: 1, original_length: 1K}"],
        "scaling",
        "yarn, which changes nothing",
    ),
    "llama3 by 1": ([f"scaling={LLAMA3}"], "scaling", "llama3, which changes nothing"),
    "no layer turns": (
        [f"scaling={YARN}", "nope_layers=[0, 1, 2, 3]"],
        "scaling",
        "yarn, which changes nothing",
    ),
}


@pytest.mark.parametrize(("overrides", "path", "part"), ROPES.values(), ids=ROPES.keys())
def test_rope_rule(overrides, path, part):
    found = problems(*(stage(f"rope.{change}") for change in overrides))
    assert list(found) == [f"stages.1.rope.{path}"]
    assert part in found[f"stages.1.rope.{path}"]


def test_longrope_has_a_factor_for_each_pair():
    found = problems(stage(f"rope.scaling={LONGROPE}"))
    assert found == {
        "stages.1.rope.scaling.short_factors": "2 factors; 16: one per pair; ",
        "stages.1.rope.scaling.long_factors": "1 factors; 16: one per pair; ",
    }


@pytest.mark.parametrize("head_dim", [34, 96, 120])
@pytest.mark.parametrize("share", [0.001, 0.11, 0.29, 0.7])
def test_the_share_that_is_proposed_works(head_dim, share):
    def changes(share: str) -> list[str]:
        return [f"model.head_dim={head_dim}", stage(f"rope.rotary_share={share}")]

    try:
        check_recipe(load_recipe(TWO_STAGES, changes(str(share))), CPU)
    except RecipeError as error:
        (problem,) = error.problems
        fixed = problem.fix.removeprefix("rotary_share: ")
        check_recipe(load_recipe(TWO_STAGES, changes(fixed)), CPU)


@pytest.mark.parametrize(("overrides", "path", "part"), CASES.values(), ids=CASES.keys())
def test_rule(overrides, path, part):
    found = problems(*overrides)
    assert list(found) == [path]
    assert part in found[path]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["ranks=null"],
        ["ranks=4"],
        ["stages.0.parallel.tensor=2"],
        ["stages.1.parallel.layout=striped", "stages.1.length=4097", "evaluation.documents=0",
         "stages.1.batch_tokens=16388"],
        ["ranks=4", "stages.1.parallel={tensor: 2, sequence: true, context: 2, layout: balanced}",
         "stages.1.length=4099", "stages.1.batch_tokens=16396"],
        [MOE, "stages.1.parallel.expert=2"],
        [MOE, "stages.0.parallel={tensor: 2, sequence: true}"],
        ["evaluation={documents: 0, visible: 4K}"],
        ["stages.1.data={held_out: 0.05}"],
        ["model.head_dim=30", "model.hidden=200"],
        # A stage may be shorter than what its scaling started from.
        [f"stages.0.rope.scaling={YARN}", "stages.0.rope.scaling.original_length=8K"],
        ["stages.1.rope.scaling={kind: dynamic, factor: 1, original_length: 4095}"],
        ["stages.1.rope={rotary_share: 0.5, nope_layers: [3]}"],
        ["model.init=induction", "model.qkv_bias=true", "stages.1.rope.nope_layers=[0]"],
    ],
)  # fmt: skip
def test_what_works_is_let_through(overrides):
    assert check_recipe(load_recipe(TWO_STAGES, overrides), CPU).warnings == ()


def test_everything_at_once():
    found = problems("model.hidden=200", "ranks=3", "evaluation.visible=8K", "stages.1.name=base",
                     "stages.1.batch_tokens=5K")  # fmt: skip
    assert set(found) == {
        "model.hidden",
        "stages.1.parallel",
        "stages.1.name",
        "stages.1.batch_tokens",
        "evaluation.visible",
    }


def test_a_problem_of_the_defaults_is_told_once():
    found = problems("defaults.optimizer.decay=0.5", "stages.0.optimizer.schedule=cosine")
    assert list(found) == ["defaults.optimizer.decay"]


def test_more_ranks_than_gpus():
    found = problems("ranks=4", machine=Machine(gpus=2, cores=64))
    assert list(found) == ["ranks"] and "at most the 2 GPUs" in found["ranks"]


def test_one_rank_per_gpu_unless_said_otherwise():
    machine = Machine(gpus=4, cores=64)
    auto = load_recipe(TWO_STAGES, ["ranks=null"])
    assert check_recipe(auto, machine).ranks == 4
    assert check_recipe(load_recipe(TWO_STAGES), machine).ranks == 2
    found = problems("ranks=null", machine=Machine(gpus=3, cores=64))
    assert "3 ranks (one per GPU)" in found["stages.1.parallel"]


def test_torchrun_decides_the_ranks():
    machine = Machine(gpus=2, cores=64, world=4, local=2)
    recipe = load_recipe(TWO_STAGES, ["ranks=null"])
    assert check_recipe(recipe, machine).ranks == 4


def test_on_a_cpu_the_layouts_decide_the_ranks():
    changes = ["ranks=null", "stages.0.parallel.tensor=2", "stages.1.parallel.context=3",
               "stages.1.length=4098", "stages.1.batch_tokens=8196"]  # fmt: skip
    assert check_recipe(load_recipe(TWO_STAGES, changes), CPU).ranks == 6


def test_warnings():
    few = Machine(gpus=0, cores=1)
    changes = ["precision=bf16", "stages.1.batch_tokens=4K", "stages.1.parallel={pipeline: 2}"]
    slow, precise, idle = check_recipe(load_recipe(TWO_STAGES, changes), few).warnings
    assert "2 ranks share 1 CPU core" in slow
    assert "bf16" in precise
    assert "stretch: 1 micro-batch per step for 2 pipeline ranks" in idle
    assert check_recipe(load_recipe(TWO_STAGES), Machine(gpus=2, cores=1)).warnings == ()
