"""Whether a recipe can run on this machine: every problem at once, before any process starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError, Problem, RecipeError
from ..redact import credentials
from ..trainer.data.settings import LocalTokenizer
from ..trainer.devices import Machine, this_machine
from ..trainer.exactness import declared
from ..trainer.plan import model_ranks, plan_stage, run_ranks
from ..trainer.settings import ModelSettings
from .check_attention import warn_of_attention
from .check_checkpoint import check_checkpoint
from .check_hand_over import check_hand_over, warn_of_hand_over
from .check_least_ranks import check_least_ranks
from .check_recovery import check_recovery
from .check_rope import check_induction_rope
from .check_stage import check_stage
from .check_tracking import check_tracking
from .recipe import Recipe


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe that can run here.

    Attributes:
        recipe: The recipe.
        ranks: Processes over all nodes.
        machine: Where it was checked.
        vocab: Size of the vocabulary; of a tokenizer that is trained, the size it may reach.
        warnings: What works, but may not be wanted.
    """

    recipe: Recipe
    ranks: int
    machine: Machine
    vocab: int
    warnings: tuple[str, ...]


def check_recipe(recipe: Recipe, machine: Machine | None = None) -> CheckedRecipe:
    """Check everything that can be known without training.

    Args:
        recipe: A recipe whose structure is valid.
        machine: Where it shall run; this machine when left out.

    Raises:
        RecipeError: All problems of the recipe.
    """
    machine = machine or this_machine()
    ranks = machine.world or run_ranks(recipe, machine.gpus)
    problems = [
        *_check_credentials(recipe),
        *_check_model(recipe),
        *_check_ranks(recipe, ranks, machine),
        *check_least_ranks(recipe),
    ]
    for index, stage in enumerate(recipe.stages):
        problems += check_stage(recipe, stage, index, ranks)
    problems += [*check_hand_over(recipe.stages, recipe.model.layers)]
    problems += [*_check_run(recipe), *_check_exactness(recipe, machine), *_check_data(recipe)]
    problems += [*check_checkpoint(recipe.checkpoint), *check_recovery(recipe)]
    problems += [*check_tracking(recipe.tracking)]
    vocab, tokenizer_problems = _vocabulary(recipe)
    problems += [*tokenizer_problems, *_check_vocabulary(recipe, vocab)]
    if problems:
        written = [Problem(recipe.where(p.path), p.value, p.expected, p.fix) for p in problems]
        raise RecipeError(recipe.name, list(dict.fromkeys(written)))
    return CheckedRecipe(recipe, ranks, machine, vocab, tuple(_warnings(recipe, ranks, machine)))


def _check_credentials(recipe: Recipe) -> Iterator[Problem]:
    """A recipe is copied into the run, its logs, model cards and Weights & Biases as it is."""
    for path, shown in credentials(recipe.model_dump(mode="json", by_alias=True)):
        fix = "put it in the environment, or in the configuration file of the store it belongs to"
        yield Problem(path, shown, "no credential: a recipe is kept with every run of it", fix)


def _check_model(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    if model.head_dim is None and model.hidden % model.heads:
        fix = f"hidden: {-(-model.hidden // model.heads) * model.heads}, or set model.head_dim"
        expected = f"a multiple of model.heads ({model.heads})"
        yield Problem("model.hidden", str(model.hidden), expected, fix)
    elif model.head_width % 2:
        own = f"{model.head_width}" + ("" if model.head_dim else " (hidden / heads)")
        yield Problem("model.head_dim", own, "an even number: RoPE turns channels in pairs")
    if model.heads % model.kv_heads:
        works = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        fix = f"query_groups: {' or '.join(map(str, works))}"
        expected = f"a divisor of model.heads ({model.heads})"
        yield Problem("model.query_groups", str(model.kv_heads), expected, fix)
    if model.moe and model.moe.top_k > model.moe.experts:
        expected = f"at most model.moe.experts ({model.moe.experts})"
        yield Problem("model.moe.top_k", str(model.moe.top_k), expected)
    if model.moe and model.moe.top_k == 1 and model.moe.normalize:
        expected = "false with top_k 1: a single weight of 1 teaches the router nothing"
        yield Problem("model.moe.normalize", "true", expected, "normalize: false, or top_k: 2")
    if model.init == "induction":
        yield from _check_induction(model)
        yield from check_induction_rope(recipe.stages[0].rope, "stages.0.rope")


def _check_induction(model: ModelSettings) -> Iterator[Problem]:
    """Two heads of two layers start by hand; they need biases, and embeddings that are tied."""
    needs = {
        "layers": ("at least 2", model.layers >= 2),
        "head_dim": (f"from 16 to hidden ({model.hidden})", 16 <= model.head_width <= model.hidden),
        "qkv_bias": ("true", model.qkv_bias),
        "qk_norm": ("false", not model.qk_norm),
        "tied_embeddings": ("true", model.tied_embeddings),
    }
    for name, (needed, met) in needs.items():
        if not met:
            value = model.head_width if name == "head_dim" else getattr(model, name)
            expected = f"{needed}, which model.init induction needs"
            fix = f"{name}: {needed}, or model.init: random"
            yield Problem(f"model.{name}", str(value).lower(), expected, fix)


def _check_ranks(recipe: Recipe, ranks: int, machine: Machine) -> Iterator[Problem]:
    local = machine.local or ranks
    if 0 < machine.gpus < local:
        fix = (
            f"ranks: {machine.gpus} and smaller parallel degrees, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
        expected = f"at most the {count(machine.gpus, 'GPU')} that this machine shows"
        yield Problem("ranks", str(local), expected, fix)
    needed = math.lcm(*map(model_ranks, recipe.stages))
    if ranks % needed == 0:
        return
    source = "" if recipe.ranks else f" (one per {'process' if machine.world else 'GPU'})"
    for index, stage in enumerate(recipe.stages):
        if ranks % model_ranks(stage):
            parallel = stage.parallel
            got = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
            got += f" x context {parallel.context} = {count(model_ranks(stage), 'rank')}"
            expected = f"a divisor of the run's {count(ranks, 'rank')}{source}"
            fix = f"set ranks: {-(-ranks // needed) * needed}, or other degrees"
            yield Problem(f"stages.{index}.parallel", got, expected, fix)


def _check_run(recipe: Recipe) -> Iterator[Problem]:
    """What concerns several stages."""
    stages = recipe.stages
    names: dict[str, int] = {}
    for index, stage in enumerate(stages):
        if stage.name in names:
            expected = f"a name that stages.{names[stage.name]} does not have"
            yield Problem(f"stages.{index}.name", stage.name, expected)
        names.setdefault(stage.name, index)
    for index, stage in enumerate(stages[1:], 1):
        least = min(before.data.held_out for before in stages[:index])
        if stage.data.held_out > least:
            expected = f"at most {least}: earlier stages trained on the documents beyond that share"
            path = f"stages.{index}.data.held_out"
            yield Problem(path, str(stage.data.held_out), expected, "one held_out for all stages")
    if not stages[0].carry_optimizer:
        expected = "nothing: there is no stage before the first"
        path = "stages.0.carry_optimizer"
        yield Problem(path, "false", expected, "remove it from the first stage")
    if max(stage.parallel.context for stage in stages) == 1:
        yield from _unused_context(recipe)
    proof, length = recipe.evaluation, stages[-1].length
    if proof.documents and proof.visible >= length:
        fix = f"evaluation.visible: {max(1, length // 4)}, or evaluation.documents: 0 for no proof"
        expected = f"less than the last stage's length ({length})"
        yield Problem("evaluation.visible", str(proof.visible), expected, fix)


def _check_exactness(recipe: Recipe, machine: Machine) -> Iterator[Problem]:
    """A level that no resume can have would only be found out at the first one."""
    asked = recipe.checkpoint.exactness
    best, reason = declared("cuda" if machine.gpus else "cpu")
    if asked is not None and asked > best:
        fix = f"exactness: {best}, or left out"
        yield Problem("checkpoint.exactness", asked, f"at most {best}: {reason}", fix)


def _unused_context(recipe: Recipe) -> Iterator[Problem]:
    for index, stage in enumerate(recipe.stages):
        for name, field in type(stage.parallel).model_fields.items():
            value = getattr(stage.parallel, name)
            unused = ("exchange", "inner", "across", "keep_keys", "layout", "canary")
            if name in unused and value != field.default:
                path, given = f"stages.{index}.parallel.{name}", str(value).lower()
                expected = "no such setting: with context 1 in every stage it has no effect"
                yield Problem(path, given, expected, "set context, or remove the setting")


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    # Reading sources needs more modules than a recipe that is wrong anyway should load.
    from ..trainer.data.sources import check_sources

    checked = []
    for index, stage in enumerate(recipe.stages):
        if stage.data.sources in checked:
            continue
        checked.append(stage.data.sources)
        for problem in check_sources(stage.data.sources):
            path = f"stages.{index}.data.{problem.path}"
            yield Problem(path, problem.value, problem.expected, problem.fix)


def _vocabulary(recipe: Recipe) -> tuple[int, list[Problem]]:
    """The size of the vocabulary; an existing tokenizer is loaded, which also proves it."""
    tokenizer = recipe.tokenizer
    if not isinstance(tokenizer, LocalTokenizer):
        return tokenizer.vocab, []
    from ..trainer.data.tokenizer import TextTokenizer

    try:
        return TextTokenizer.load(Path(tokenizer.path)).vocab, []
    except DataError as error:
        got = f"{tokenizer.path} ({error.what})"
        return 0, [Problem("tokenizer.path", got, "a tokenizer that can be loaded", error.fix)]


def _check_vocabulary(recipe: Recipe, vocab: int) -> Iterator[Problem]:
    known = recipe.model.vocab
    if known is not None and known < vocab:
        expected = f"at least the tokenizer's {vocab:,} tokens"
        fix = "the tokenizer that the model was trained with, or model.vocab left out"
        yield Problem("model.vocab", f"{known}", expected, fix)


def _warnings(recipe: Recipe, ranks: int, machine: Machine) -> Iterator[str]:
    local = machine.local or ranks
    if not machine.gpus and local > machine.cores:
        cores = count(machine.cores, "CPU core")
        yield f"{count(local, 'rank')} share {cores}: it works, slowly"
    if not machine.gpus and recipe.precision == "bf16":
        yield "precision bf16 is slow on most CPUs; fp32 is the better choice without a GPU"
    yield from warn_of_attention(recipe.model, recipe.stages)
    yield from warn_of_hand_over(recipe.stages, recipe.model.layers)
    for stage in recipe.stages:
        batches, pipeline = plan_stage(stage, ranks).micro_batches, stage.parallel.pipeline
        if batches < pipeline:
            yield (
                f"stage {stage.name}: {count(batches, 'micro-batch', 'micro-batches')} per step "
                f"for {pipeline} pipeline ranks leaves some of them idle; raise batch_tokens"
            )


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 rank`, `2 ranks`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
