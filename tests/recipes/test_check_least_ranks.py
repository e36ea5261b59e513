"""The fewest ranks of a run on a cluster: a range of sizes that every stage can be laid out on."""

from pathlib import Path

import pytest
from longspan.errors import RecipeError
from longspan.recipes.check import check_recipe
from longspan.recipes.loading import load_recipe
from longspan.recipes.outline import outline
from longspan.trainer.devices import Machine
from longspan.trainer.gang_sizes import gang_sizes
from rich.console import Console

TWO_STAGES = str(Path(__file__).parent / "two_stages.yaml")
CPU = Machine(gpus=0, cores=64)

# Stage 0: 48 sequences in micro-batches of 4; stage 1: 12 sequences, two context ranks.
CASES = {
    "no range": (["ranks=null", "ranks_at_least=2"], "2; no such setting: without ranks"),
    "more than ranks": (["ranks_at_least=4"], "4; at most ranks (2); ranks_at_least: 2 or less, "
                        "or ranks: 4 or more"),
    "half a context": (["ranks=4", "ranks_at_least=3"], "3; ranks for every stage; stages.0 (base) "
                       "needs sequences per step that 3 data-parallel ranks share in micro-batches "
                       "of 4, not 50; stages.1 (stretch) needs a multiple of 2 (tensor x"),
    "nearest on both sides": (["ranks=12", "ranks_at_least=8"], "8; ranks for every stage; stages.0"
                              " (base) needs sequences per step that 8 data-parallel ranks share"),
    "experts": (["model.moe={experts: 4}", "ranks=4", "stages.1.parallel={context: 1, expert: 4}",
                 "ranks_at_least=2"], "data x context ranks that parallel.expert (4) divides, not"),
}  # fmt: skip


def problem(*changes: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(TWO_STAGES, changes), CPU)
    (found,) = [p for p in caught.value.problems if p.path == "ranks_at_least"]
    return f"{found.value}; {found.expected}; {found.fix}"


@pytest.mark.parametrize("name", CASES)
def test_a_range_that_cannot_be_run_is_a_problem(name):
    changes, part = CASES[name]
    changes = ["stages.0.batch_tokens=50K", *changes] if name == "half a context" else changes
    assert part in problem(*changes)


def test_the_nearest_sizes_are_named():
    assert problem("ranks=12", "ranks_at_least=8").endswith("ranks_at_least: 6 or 12")
    assert problem("ranks=4", "ranks_at_least=1").endswith("ranks_at_least: 2")
    assert problem("ranks=3", "ranks_at_least=3").endswith("ranks_at_least: 2")


def test_the_sizes_of_a_gang_are_those_that_every_stage_fits():
    run = load_recipe(TWO_STAGES, ["ranks=12", "ranks_at_least=2"]).run()
    check_recipe(load_recipe(TWO_STAGES, ["ranks=12", "ranks_at_least=2"]), CPU)
    assert gang_sizes(run) == (12, 6, 4, 2)
    assert gang_sizes(load_recipe(TWO_STAGES, []).run()) == (2,)


def lines(*changes: str) -> list[str]:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        console.print(outline(check_recipe(load_recipe(TWO_STAGES, changes), CPU)))
    return [line.strip() for line in capture.get().splitlines() if "cluster" in line]


def test_the_outline_says_what_binds_on_a_cluster_only_where_a_recipe_does():
    assert lines() == []
    assert lines("recovery.retries={infrastructure: 10, preemption: null}") == []
    assert lines("ranks=4", "ranks_at_least=2") == ["on a cluster only: goes on with 4 or 2 ranks"]
    assert lines("ranks_at_least=2", "recovery.retries={infrastructure: 1}") == [
        "on a cluster only: goes on with 2 ranks, 1 new start after lost nodes and dead or "
        "hanging ranks, as many as it takes after preemptions"
    ]
    assert lines("recovery.retries.preemption=3") == [
        "on a cluster only: 10 new starts after lost nodes and dead or hanging ranks, "
        "3 new starts after preemptions"
    ]
    assert lines("recovery.wait=20min", "recovery.hang.first=1h") == [
        "on a cluster only: waits 1200 s for nodes, hangs are told after 300 s, 3600 s the first "
        "time, 7200 s for data"
    ]
