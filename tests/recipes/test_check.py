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
    "zigzag chunks": (
        [stage("length=4094"), stage("batch_tokens=16376")],
        "stages.1.length",
        "length: 4092 or 4096",
    ),
    "sequence parallelism": (
        [
            "ranks=4",
            stage("parallel={tensor: 2, sequence: true, context: 2, layout: contiguous}"),
            stage("length=4098"),
            stage("batch_tokens=16392"),
        ],
        "stages.1.length",
        "a multiple of 4",
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
    "unused layout": (
        ["defaults.parallel.layout=contiguous", stage("parallel.context=1")],
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
        ["stages.1.parallel.layout=contiguous", "stages.1.length=4098", "evaluation.documents=0",
         "stages.1.batch_tokens=16392"],
        [MOE, "stages.1.parallel.expert=2"],
        [MOE, "stages.0.parallel={tensor: 2, sequence: true}"],
        ["evaluation={documents: 0, visible: 4K}"],
        ["stages.1.data={held_out: 0.05}"],
        ["model.head_dim=30", "model.hidden=200"],
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
