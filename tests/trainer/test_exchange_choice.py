"""Which exchange a stage gets, and that everybody is told the same."""

from io import StringIO

import pytest
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.recipes.outline import outline
from longspan.trainer.devices import Machine
from longspan.trainer.exchange_choice import choose_exchange
from longspan.trainer.settings import ModelSettings, StageSettings
from rich.console import Console

MODEL = ModelSettings.model_validate(
    {"hidden": 4096, "layers": 4, "heads": 32, "query_groups": 8, "ffn_hidden": 128}
)
WINDOW, CHOSEN = {"kind": "window", "window": 4096}, {"kind": "infllm_v2"}


def stage(length, parallel, mechanism=None):
    return StageSettings.model_validate(
        {
            "name": "x",
            "length": length,
            "tokens": length,
            "batch_tokens": length,
            "optimizer": {"lr": 1e-4},
            "attention": {"mechanism": mechanism or {"kind": "dense"}},
            "parallel": parallel,
            "data": {"sources": [{"kind": "python-stdlib"}]},
        }
    )


def chosen(*given, node=8):
    found = choose_exchange(MODEL, stage(*given), node=node, gpu=True, wire=2)
    return found.kind, found.inner


@pytest.mark.parametrize(
    ("length", "parallel", "mechanism", "want"),
    [
        # All layouts but contiguous share the pairs of one long document evenly.
        (2**17, {"context": 8}, None, ("all_gather", 1)),
        (2**17, {"context": 8, "layout": "contiguous"}, None, ("ulysses", 1)),
        # A window of a sixteenth of a rank's tokens.
        (2**20, {"context": 16}, WINDOW, ("fetch", 1)),
        # Packed documents.
        (2**19, {"context": 64, "layout": "balanced"}, None, ("fetch", 1)),
        # Choices would be sorted again for each part, and 64 ranks have not heads enough.
        (2**20, {"context": 64}, CHOSEN, ("two_d", 8)),
        # Named ones are taken as they are.
        (2**17, {"context": 8, "exchange": "ring"}, None, ("ring", 1)),
        (2**17, {"context": 8, "exchange": "two_d", "inner": 2}, None, ("two_d", 2)),
    ],
)
def test_what_is_chosen(length, parallel, mechanism, want):
    assert chosen(length, parallel, mechanism) == want


def test_nodes_are_of_context_ranks():
    # Of 8 GPUs 2 tensor ranks each leave 4 context ranks.
    parallel = {"context": 64, "tensor": 2}
    assert chosen(2**20, parallel, CHOSEN) == ("two_d", 4)


def test_the_reason_names_the_fastest_with_their_times():
    found = choose_exchange(MODEL, stage(2**17, {"context": 8}), node=8, gpu=True, wire=2)
    kind, *rest = found.reason.removeprefix("predicted per layer on GPUs: ").split(", ")
    assert kind.startswith(f"{found.kind} ") and len(rest) == 2
    assert choose_exchange(MODEL, stage(64, {"context": 1}), node=8, gpu=True, wire=2).reason == ""


@pytest.mark.parametrize("gpus", [0, 8])
def test_check_tells_what_the_run_takes(gpus):
    recipe = load_recipe("quickstart", ["stages.1.parallel={context: 2, layout: contiguous}"])
    console = Console(width=200, file=StringIO())
    console.print(outline(check_recipe(recipe, Machine(gpus=gpus, cores=8))))
    said = console.file.getvalue()
    long = recipe.stages[1]
    # The run's ranks are all on this machine.
    taken = choose_exchange(recipe.model, long, node=recipe.ranks or 2, gpu=gpus > 0, wire=4)
    assert f"exchange of {long.name}: auto, {taken.reason}" in said
    assert f"{taken.kind}, contiguous" in said
