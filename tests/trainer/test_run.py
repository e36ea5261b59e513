"""Whole runs through the command line, on real ranks: the smoke recipe, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from longspan.attention.settings import RopeSettings
from longspan.parallel.volume import Call, volume_of
from longspan.recipes.loading import load_recipe
from longspan.trainer.exchange_choice import choose_exchange
from longspan.trainer.observe.events import read_events
from support.grid import sample

SMOKE = [sys.executable, "-m", "longspan.cli", "train", "smoke"]
RESUME = [sys.executable, "-m", "longspan.cli", "resume"]
OVERRIDES = ["--set", "stages.0.tokens=8K", "--set", "stages.1.tokens=8K"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache for all runs of this file."""
    cache = tmp_path_factory.mktemp("cache")
    return {
        **os.environ,
        "LONGSPAN_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }


def longspan(command, environment, cwd, **options):
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=240, **options
    )


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loss and norm by step; of a step computed twice, the last."""
    events = read_events(run_dir / "events.jsonl")
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in events if e["event"] == "step"}


@pytest.fixture(scope="module")
def straight(environment, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    done = longspan([*SMOKE, *OVERRIDES, "--run-dir", "run"], environment, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done


def wait_for_step(run_dir: Path, step: int, process) -> None:
    deadline = time.monotonic() + 120
    while step not in losses(run_dir):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_trains_both_stages_and_proves_its_context(straight):
    run_dir, done = straight
    steps = losses(run_dir)
    assert sorted(steps) == list(range(1, 17))
    assert steps[8][0] < steps[1][0]
    summary = json.loads((run_dir / "complete.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["base", "stretch"]
    (proof,) = summary["evaluations"]
    assert sum(bucket["tokens"] for bucket in proof["buckets"]) == 256 * proof["gain"]["documents"]
    assert "loss by position" in done.stdout and "standard error" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr


def test_checkpoints_and_the_log_know_the_whole_rope(straight):
    run_dir, _ = straight
    state = json.loads((run_dir / "checkpoints" / "step-00000016" / "manifest.json").read_text())
    rope = load_recipe("smoke").stages[1].rope
    assert rope.base == 100_000 and RopeSettings.model_validate(state["rope"]) == rope
    assert state["rope"].keys() == RopeSettings.model_fields.keys()
    started = [e for e in read_events(run_dir / "events.jsonl") if e["event"] == "stage_started"]
    assert [e["rope"] for e in started] == ["base 10,000", "base 100,000"]


def test_attention_is_measured_in_both_stages(straight):
    looks = [e for e in read_events(straight[0] / "events.jsonl") if e["event"] == "attention"]
    assert [look["step"] for look in looks] == [4, 8, 12, 16]
    for layer in (layer for look in looks for layer in look["layers"]):
        assert 0 < layer["entropy"] < 5 and 0 < layer["sink_share"] <= 1


def test_a_step_reports_what_its_ranks_sent(straight):
    recipe = load_recipe("smoke")
    stage, model = recipe.stages[1], recipe.model
    tokens = stage.length * stage.micro_batch // stage.parallel.context
    assert model.hidden is not None and model.heads is not None
    groups, dim = model.query_groups or model.heads, model.hidden // model.heads
    parallel, call = stage.parallel, Call(model.heads, groups, dim, dim, wire=4)
    choice = choose_exchange(model, stage, node=parallel.context, gpu=False, wire=4)
    of_layer = sum(volume_of(choice.kind, [tokens] * parallel.context, 0, call))
    micro_batches = stage.batch_tokens // (stage.length * stage.micro_batch)
    events = [e for e in read_events(straight[0] / "events.jsonl") if e["event"] == "step"]
    want = {step: model.layers * of_layer * micro_batches if step > 8 else 0 for step in range(17)}
    for event in events:
        # Where attention is measured, keys are gathered for that.
        measured = event["step"] > 8 and event["step"] % recipe.telemetry.every == 0
        assert (event["context_bytes"] == want[event["step"]]) is not measured


def test_context_ranks_are_compared_with_one_before_they_train(straight):
    run_dir, done = straight
    events = list(read_events(run_dir / "events.jsonl"))
    order = [event["event"] for event in events if event["event"] in ("canary", "step")]
    assert order == ["step"] * 8 + ["canary"] + ["step"] * 8
    (canary,) = (event for event in events if event["event"] == "canary")
    assert canary["step"] == 8 and canary["tokens"] == 256 and canary["grad_difference"] < 1e-4
    assert "canary: over context ranks loss" in done.stdout
    for event in events:
        if event["event"] == "step":
            context = event["step"] > 8
            assert (event["context_wait_s"] > 0) is context
            assert (event["imbalance"] is not None) is context


def test_nothing_is_left_of_old_or_unfinished_checkpoints(straight):
    names = sorted(path.name for path in (straight[0] / "checkpoints").iterdir())
    assert names == ["latest", "step-00000014", "step-00000016"]


def test_a_complete_run_is_not_trained_again(straight, environment):
    run_dir, _ = straight
    before = (run_dir / "events.jsonl").read_bytes()
    again = longspan([*SMOKE, *OVERRIDES, "--run-dir", str(run_dir)], environment, run_dir.parent)
    assert again.returncode == 0 and "is complete" in again.stdout
    assert (run_dir / "events.jsonl").read_bytes() == before


def status(run_dir, environment):
    """What `longspan status --json` and `longspan status` say, without torch."""
    command = [sys.executable, "-X", "importtime", "-m", "longspan.cli", "status", str(run_dir)]
    found = longspan([*command, "--json"], environment, run_dir.parent)
    assert found.returncode == 0 and "| torch" not in found.stderr
    shown = longspan([*command[:1], *command[3:]], environment, run_dir.parent)
    assert shown.returncode == 0 and shown.stderr == ""
    return json.loads(found.stdout), shown.stdout


def assert_adds_up(goodput):
    """Every second is in one bucket."""
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_s"], abs=1e-4)
    assert min(goodput["seconds"].values()) >= 0


def test_status_says_where_the_time_of_a_run_went(straight, environment):
    run_dir, done = straight
    found, shown = status(run_dir, environment)
    assert (found["state"], found["step"], found["steps"]) == ("complete", 16, 16)
    assert (found["stage"], found["stage_step"], found["owner"]) == ("stretch", 8, None)
    assert found["checkpoint"] == "step-00000016" and found["event"] == "ended"
    goodput = found["goodput"]
    assert_adds_up(goodput)
    seconds, events = goodput["seconds"], list(read_events(run_dir / "events.jsonl"))
    steps = [event for event in events if event["event"] == "step"]
    busy = sum(event["step_s"] for event in steps)
    assert seconds["productive"] + seconds["data"] == pytest.approx(busy, rel=0.05)
    assert all(0 < event["data_s"] < event["step_s"] for event in steps)
    for bucket in ("start_up", "save", "restore", "evaluation"):
        assert seconds[bucket] > 0, bucket
    for bucket in ("recomputed", "hang", "down", "queue"):
        assert seconds[bucket] == 0, bucket
    assert seconds["other"] < 0.25 * goodput["wall_s"]
    assert "goodput " in shown and "start-up" in shown and "100.0%" in shown
    recorded = json.loads((run_dir / "complete.json").read_text())["goodput"]
    assert_adds_up(recorded)
    assert recorded["seconds"]["productive"] == pytest.approx(seconds["productive"], abs=1e-3)
    assert "goodput " in done.stdout and ", lost to " in done.stdout


@pytest.mark.parametrize("step", sample("killed in a stage", [5, 13], 1))
def test_killed_in_the_middle_and_resumed_it_ends_bit_equal(straight, environment, tmp_path, step):
    run_dir = tmp_path / "run"
    command = [*SMOKE, *OVERRIDES, "--run-dir", str(run_dir)]
    process = subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_step(run_dir, step, process)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (run_dir / "complete.json").exists()
    assert status(run_dir, environment)[0]["state"] == "lost"
    resumed = longspan([*RESUME, str(run_dir)], environment, tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert losses(run_dir) == losses(straight[0])
    proofs = [json.loads((d / "complete.json").read_text()) for d in (run_dir, straight[0])]
    assert proofs[0]["evaluations"] == proofs[1]["evaluations"]
    assert proofs[0]["stages"] == proofs[1]["stages"]
    found, _ = status(run_dir, environment)
    assert_adds_up(found["goodput"])
    assert [attempt["end"] for attempt in found["goodput"]["attempts"]] == [None, "complete"]
    for bucket in ("recomputed", "down"):
        assert found["goodput"]["seconds"][bucket] > 0, bucket


def test_a_killed_rank_ends_the_run_with_the_command_that_resumes(environment, tmp_path):
    process = subprocess.Popen(
        [*SMOKE, *OVERRIDES, "--run-dir", "run"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(tmp_path / "run", 4, process)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "longspan.trainer.worker"],
        capture_output=True,
        text=True,
    )
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "SIGKILL" in output and "longspan resume run" in output


def test_ctrl_c_saves_and_prints_the_command_that_resumes(straight, environment, tmp_path):
    process = subprocess.Popen(
        [*SMOKE, *OVERRIDES, "--run-dir", "run"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run_dir = tmp_path / "run"
    wait_for_step(run_dir, 3, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "longspan resume run" in output and "Traceback" not in output
    resumed = longspan([*RESUME, "run"], environment, tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert losses(run_dir) == losses(straight[0])


def test_sigusr1_to_ranks_that_still_start_saves_once_and_goes_on(environment, tmp_path):
    few = ["stages.0.tokens=4K", "stages.1.tokens=1K", "checkpoint.every=100"]
    changes = [word for change in few for word in ("--set", change)]
    process = subprocess.Popen(
        [*SMOKE, *changes, "--run-dir", "run"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "logs" / "rank-1.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "saved"] == [2, 4, 5]


def test_torchrun_gives_the_same_run(straight, environment, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "longspan.cli", *SMOKE[3:], *OVERRIDES, "--run-dir", "run"]
    done = longspan(command, environment, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == losses(straight[0])


def test_a_loss_that_is_not_finite_ends_the_run_with_a_reason(environment, tmp_path):
    command = [*SMOKE, "--set", "stages.0.optimizer.lr=1e30", "--run-dir", "run"]
    done = longspan(command, environment, tmp_path)
    assert done.returncode == 2
    assert "is not finite" in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_a_full_disk_is_named_and_keeps_the_older_checkpoint(environment, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root may mount the small disk that this test fills")
    try:
        run_dir = disk / "run"
        done = longspan([*SMOKE, *OVERRIDES, "--run-dir", str(run_dir)], environment, tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "no space left for a checkpoint" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout
        assert list(run_dir.glob("checkpoints/step-*/COMMITTED"))
        assert not list(run_dir.glob("checkpoints/*.tmp*"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_offered(
    straight, environment, tmp_path
):
    shutil.copytree(straight[0], tmp_path / "run")
    (tmp_path / "run" / "complete.json").unlink()
    shard = tmp_path / "run" / "checkpoints" / "step-00000016" / "rank-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = longspan([*RESUME, "run"], environment, tmp_path)
    assert done.returncode == 2
    assert "step-00000016 is damaged: rank-00001.safetensors is not what was" in done.stderr
    assert "step 14: `longspan resume " in done.stderr and "run --from 14` goes" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert shard.read_bytes() == content
    done = longspan([*RESUME, "run", "--from", "14"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(straight[0])
    aside = tmp_path / "run" / "checkpoints" / "step-00000016.aside-1"
    assert (aside / shard.name).read_bytes() == content
