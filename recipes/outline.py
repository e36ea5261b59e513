"""What a recipe will run, for people: its model, ranks, and a column per stage."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..attention.catalogue import words
from ..trainer.data.settings import LocalTokenizer
from ..trainer.exchange_choice import ExchangeChoice, choose_exchange
from ..trainer.gang_sizes import gang_sizes
from ..trainer.parameters import attention_parameters, count_parameters
from ..trainer.plan import plan_stage
from ..trainer.recovery_settings import HangSettings, RecoverySettings, RetrySettings
from ..trainer.settings import ModelSettings, OptimizerSettings, RunSettings, StageSettings
from .check import CheckedRecipe, count

_BINARY = ((2**30, "G"), (2**20, "M"), (2**10, "K"))
_DECIMAL = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


def outline(checked: CheckedRecipe) -> RenderableType:
    """The run's stages, model, ranks and warnings."""
    recipe = checked.recipe
    title = Text(recipe.name, style="bold")
    if recipe.summary:
        title.append(f"  {recipe.summary}", style="not bold")
    warnings = [Text(f"warning: {text}", style="yellow") for text in checked.warnings]
    lines = [Text(line(checked)) for line in (_model, _tokenizer, _ranks)]
    lines += map(Text, _on_a_cluster(recipe))
    return Group(title, *lines, Text(), _stages(checked), *_reasons(checked), *warnings)


def exact(number: int) -> str:
    """Tokens in a sequence or a batch: 65536 is 64K, 1000 stays 1,000."""
    for size, unit in _BINARY:
        if number % size == 0:
            return f"{number // size:,}{unit}"
    return f"{number:,}"


def rough(number: float) -> str:
    """A budget or a count in three digits: 1572864 is 1.57M."""
    for size, unit in _DECIMAL:
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _model(checked: CheckedRecipe) -> str:
    model = checked.recipe.model
    vocab = model.vocab or checked.vocab
    start = f", weights of {model.weights}" if model.weights else ""
    experts = f", {model.moe.experts} experts (top {model.moe.top_k})" if model.moe else ""
    return (
        f"model: {rough(count_parameters(model, vocab))} parameters, "
        f"{model.layers} layers, hidden {model.hidden}, "
        f"heads {model.heads} ({model.kv_heads} key-value){experts}{start}"
    )


def _tokenizer(checked: CheckedRecipe) -> str:
    if isinstance(checked.recipe.tokenizer, LocalTokenizer):
        return f"tokenizer: {checked.recipe.tokenizer.path}, {checked.vocab:,} tokens"
    return f"tokenizer: trained on the data, up to {checked.vocab:,} tokens"


def _ranks(checked: CheckedRecipe) -> str:
    machine, recompute = checked.machine, checked.recipe.recompute
    where = count(machine.gpus, "GPU") if machine.gpus else count(machine.cores, "CPU core")
    return (
        f"ranks: {checked.ranks} on {where}, {checked.recipe.precision}"
        f"{', full recompute' if recompute == 'full' else ''}"
    )


def _on_a_cluster(run: RunSettings) -> Iterator[str]:
    """What binds there only, where a recipe says something of it."""
    parts = []
    if run.ranks_at_least is not None:
        parts.append(f"goes on with {' or '.join(map(str, gang_sizes(run)))} ranks")
    recovery, retries = run.recovery, run.recovery.retries
    if retries != RetrySettings():
        lost = count(retries.infrastructure, "new start")
        parts.append(f"{lost} after lost nodes and dead or hanging ranks")
        taken = "as many as it takes"
        if retries.preemption is not None:
            taken = count(retries.preemption, "new start")
        parts.append(f"{taken} after preemptions")
    if recovery.wait != RecoverySettings.model_fields["wait"].default:
        parts.append(f"waits {recovery.wait:g} s for nodes")
    if (hang := recovery.hang) != HangSettings():
        limits = f"{hang.least:g} s, {hang.first:g} s the first time, {hang.data:g} s for data"
        parts.append(f"hangs are told after {limits}")
    if parts:
        yield f"on a cluster only: {', '.join(parts)}"


def _stages(checked: CheckedRecipe) -> Table:
    """One column per stage."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    columns = [_column(checked, stage) for stage in checked.recipe.stages]
    for heading in ("", *(stage.name for stage in checked.recipe.stages)):
        table.add_column(heading, overflow="fold")
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    return table


def _column(checked: CheckedRecipe, stage: StageSettings) -> dict[str, str]:
    plan, model = plan_stage(stage, checked.ranks), checked.recipe.model
    tokens = stage.batch_tokens
    added = attention_parameters(model, stage.attention)
    return {
        "length": exact(stage.length),
        "tokens": rough(plan.steps * tokens),
        "steps": f"{plan.steps:,}",
        "tokens per step": exact(tokens),
        "sequences per step": f"{plan.sequences_per_step:,}",
        "micro-batches": f"{plan.micro_batches:,} x {count(stage.micro_batch, 'sequence')}",
        "attention": _attention(model, stage),
        "added parameters": rough(added) if added else "-",
        "RoPE": stage.rope.words,
        "learning rate": _rate(stage.optimizer),
        "layout": _layout(stage, plan.data),
        "exchange": _exchange(checked, stage),
    }


def _attention(model: ModelSettings, stage: StageSettings) -> str:
    """Mechanisms and options, and whether nothing but their selection learns."""
    parts = words(stage.attention, model.layers)
    return parts + ("; trains the selection only" if stage.trainable == "selection" else "")


def _rate(optimizer: OptimizerSettings) -> str:
    if optimizer.schedule == "constant":
        return f"{optimizer.lr:g} constant"
    return f"{optimizer.lr:g} to {optimizer.min_lr:g}, {optimizer.schedule}"


def _choice(checked: CheckedRecipe, stage: StageSettings) -> ExchangeChoice:
    """How keys meet queries of other context ranks, and where that was chosen, why."""
    machine, wire = checked.machine, 2 if checked.recipe.precision == "bf16" else 4
    return choose_exchange(
        checked.recipe.model,
        stage,
        node=machine.local or checked.ranks,
        gpu=machine.gpus > 0,
        wire=wire,
    )


def _exchange(checked: CheckedRecipe, stage: StageSettings) -> str:
    if stage.parallel.context == 1:
        return "-"
    return f"{_choice(checked, stage).words}, {stage.parallel.layout}"


def _reasons(checked: CheckedRecipe) -> list[Text]:
    """Why an exchange was chosen, for each stage that leaves it open."""
    return [
        Text(f"exchange of {stage.name}: auto, {_choice(checked, stage).reason}")
        for stage in checked.recipe.stages
        if stage.parallel.context > 1 and stage.parallel.exchange == "auto"
    ]


def _layout(stage: StageSettings, data: int) -> str:
    """Degrees above 1: `DP2 TP2 SP CP4`."""
    parallel = stage.parallel
    degrees = {
        "DP": data,
        "TP": parallel.tensor,
        "PP": parallel.pipeline,
        "CP": parallel.context,
        "EP": parallel.expert,
    }
    words = [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]
    return " ".join([*words, *(["SP"] if parallel.sequence else [])]) or "one rank"
