"""What `longspan submit` says of the time a run will take."""

import re

import pytest
from longspan.cluster.forecast import forecast
from longspan.cluster.registry import Registry
from longspan.recipes.loading import load_recipe
from longspan.trainer.flops import training_flops
from longspan.trainer.run_directory import RunDirectory

UNKNOWN = "time     not known: nothing like it was trained from here yet"
GPUS = ("--set", "precision=bf16")


def plan(longspan, *words) -> str:
    """The plan of a submission that is not sent."""
    code, out, err = longspan("submit", "smoke", "--dry-run", *words)
    assert code == 0, err
    return out


def test_the_time_is_that_of_an_equal_run_before(longspan, lab, dashboard, storage):
    assert longspan("submit", "smoke", "--run-id", "first")[0] == 0
    leave_smoke(storage / "runs" / "first")
    _, out, _ = longspan("submit", "smoke", "--dry-run", "--set", "seed=3")
    # 4,096 tokens at 512 a second and as many at 1,024: 12 seconds on each of two ranks.
    assert "12.0 seconds of training, 24.0 CPU core-seconds, at 683 tokens/s as in first" in out
    _, out, _ = longspan("submit", "smoke", "--dry-run", "--set", "model.layers=4")
    assert "time     not known" in out


def leave_smoke(path) -> RunDirectory:
    """A run of smoke with a slow first step and a steady rest in both stages."""
    from longspan.trainer.observe.events import EventLog
    from longspan.trainer.run_directory import create_or_open

    directory = create_or_open(path, load_recipe("smoke").run(), "smoke")
    log = EventLog(directory.events)
    for stage, rate in (("base", 512.0), ("stretch", 1024.0)):
        for number in range(4):
            log.write("step", stage=stage, tokens_per_s=1.0 if number == 0 else rate)
    log.close()
    return directory


def test_hours_without_a_run_before_are_arithmetic():
    recipe = load_recipe("smoke", ["precision=bf16", "model.vocab=1000", "tokenizer.vocab=1000"])
    found = forecast(recipe, 4, "none", Registry(), ["H100", "A100-80G"])
    flops = sum(4096 * training_flops(recipe.model, stage, 1000) for stage in recipe.stages)
    assert found.tokens == 8192  # whole steps
    # The slower of two kinds of GPU, at 40 and at 20% of its peak.
    assert found.span == pytest.approx([flops / (4 * 312e12 * mfu) / 3600 for mfu in (0.4, 0.2)])
    assert (found.hours, found.rate, found.peak) == (None, None, 312e12)


def test_without_a_sound_peak_hours_are_not_known():
    bf16, fp32 = (load_recipe("smoke", [f"precision={kind}"]) for kind in ("bf16", "fp32"))
    for recipe, names in ((bf16, []), (bf16, [""]), (bf16, ["H100", "T4"]), (fp32, ["H100"])):
        assert forecast(recipe, 4, "none", Registry(), names).span is None


def test_the_gpus_are_those_that_ray_names(longspan, lab, dashboard):
    dashboard.nodes = [(0, 64, ""), (4, 16, "H100"), (4, 16, "H100")]
    long = ("--set", "stages.0.tokens=10T", "--set", "stages.1.tokens=10T")
    out = plan(longspan, *GPUS, *long)
    (line,) = [line for line in out.splitlines() if line.startswith("time")]
    span = re.search(r"roughly ([\d,.]+) to ([\d,.]+) hours of training, ([\d,.]+) to ", line)
    least, most, of_gpus = (float(part.replace(",", "")) for part in span.groups())
    assert most == pytest.approx(2 * least, rel=0.02) and of_gpus == pytest.approx(2 * least, 0.02)
    assert "GPU-hours, without evaluations and saves: a guess, at 20% to 40% of 989 TFLOP/s" in line
    assert UNKNOWN in plan(longspan)  # fp32
    dashboard.nodes = [(4, 16, "H100"), (4, 16, "")]
    assert UNKNOWN in plan(longspan, *GPUS)


def test_a_run_that_begins_with_fewer_ranks_takes_longer(longspan, lab, dashboard, storage):
    """An equal run is one of as many ranks, and GPU-hours are those of ranks that there are."""
    dashboard.nodes = [(4, 16, "H100")]
    few = ("--set", "ranks=8", "--set", "ranks_at_least=2", "--set", "stages.0.batch_tokens=8K",
           "--set", "stages.1.batch_tokens=8K", "--set", "stages.0.tokens=10T",
           "--set", "stages.1.tokens=10T")  # fmt: skip
    out = plan(longspan, *GPUS, *few)
    assert "ranks    8, one per GPU, on 1 node" in out
    (line,) = [line for line in out.splitlines() if line.startswith("time")]
    assert line == next(line for line in plan(longspan, *GPUS, *few, "--set", "ranks=4",
                        ).splitlines() if line.startswith("time"))  # fmt: skip
    assert longspan("submit", "smoke", "--run-id", "few", *GPUS, *few)[0] == 0
    assert longspan("submit", "smoke", "--run-id", "four", *GPUS, *few, "--set", "ranks=4")[0] == 0
    few_record, four = Registry().get("few"), Registry().get("four")
    assert few_record.shape == four.shape and (few_record.ranks, four.ranks) == (8, 4)


def test_the_file_can_name_the_gpus(longspan, lab, dashboard):
    dashboard.nodes = [(4, 16, "")]
    lab(nodes={"count": 1, "gpus": 4, "gpu_name": "A100"})
    assert "of 312 TFLOP/s per GPU" in plan(longspan, *GPUS)
    lab(nodes={"count": 1, "gpus": 4})
    assert UNKNOWN in plan(longspan, *GPUS)
    lab(nodes={"count": 1, "gpus": 4, "gpu_name": "Voodoo 2"})
    code, _, err = longspan("submit", "smoke", "--dry-run")
    assert (
        code == 2 and "gpu_name: got Voodoo 2; expected one of H200, H100 PCIe, H100, A100" in err
    )
