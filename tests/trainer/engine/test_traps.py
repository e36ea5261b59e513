"""megatron-core's silent traps, each with a test that fails without our handling."""

import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from longspan.trainer.settings import RunSettings
from support.cases import load_and_go_on, save_then_go_on, take_step
from support.poison import poisoned
from support.tiny import LENGTH, VOCAB, random_sample, tiny_run


def test_s1_a_loaded_optimizer_counts_its_steps_once(worlds, tmp_path):
    """One shared step tensor would advance once per parameter; the second step drifts."""
    expected = worlds(1).run(save_then_go_on, tiny_run(), str(tmp_path), 3)[0]
    assert worlds(1).run(load_and_go_on, tiny_run(), str(tmp_path), 3)[0] == expected


def test_s2_context_ranks_do_not_scale_the_gradient(worlds):
    """A 2-tuple loss is multiplied by CP: equal losses, twice the gradient norm."""
    from support.cases import train

    cp2 = tiny_run(stage__parallel={"context": 2})
    (_, expected), (_, found) = (
        worlds(n).run(train, run, 1)[0][0] for n, run in ((1, tiny_run()), (2, cp2))
    )
    assert abs(found - expected) < 1e-5 * expected


def test_s5_saving_needs_no_main_guard(tmp_path):
    """megatron's save spawns a process that runs the script again, which hangs."""
    (tmp_path / "shards").mkdir()
    script = tmp_path / "unguarded.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        import torch.distributed as dist
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        from longspan.trainer.engine.checkpoint import save_engine
        from longspan.trainer.engine.engine import Engine
        from support.tiny import VOCAB, tiny_run
        from support.cases import take_step
        run = tiny_run()
        engine = Engine(run, run.stages[0], VOCAB)
        take_step(engine, 0)
        save_engine(engine, Path({str(tmp_path / "shards")!r}))
        print("saved")
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["saved"], done.stderr


def test_s6_a_setting_that_our_attention_would_ignore_is_refused():
    """megatron takes qk_clip and does nothing with it where TransformerEngine is missing."""
    raw = tiny_run().model_dump()
    with pytest.raises(ValueError, match="qk_clip"):
        RunSettings.model_validate({**raw, "model": {**raw["model"], "qk_clip": True}})


def layer_weights(run):
    """Weights of this rank's layers, by their number in the whole model."""
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    return {
        layer.layer_number: layer.mlp.linear_fc2.weight.detach().clone()
        for layer in engine.model.decoder.layers
    }


def test_s7_pipeline_ranks_start_from_their_own_weights(worlds):
    """Equal seeds would give the second stage the first one's draws."""
    expected = worlds(1).run(layer_weights, tiny_run())[0]
    parts = worlds(2).run(layer_weights, tiny_run(stage__parallel={"pipeline": 2}))
    found = {number: weight for part in parts for number, weight in part.items()}
    assert sorted(found) == sorted(expected) == [1, 2, 3, 4]
    assert all(torch.equal(found[number], expected[number]) for number in expected)
    assert not torch.equal(found[1], found[3])


def rotary_tables_alive(run):
    """Rotation tables in memory after micro-batches of 40 different lengths."""
    from longspan.attention.rope import RotaryTable
    from longspan.trainer.engine.engine import Engine

    engine = Engine(run, run.stages[0], VOCAB)
    for extra in range(40):
        engine.losses(random_sample(extra, LENGTH + extra))
    gc.collect()
    return sum(isinstance(thing, RotaryTable) for thing in gc.get_objects())


def test_s8_rotations_are_not_kept(worlds):
    """megatron's rotary module keeps the tables of 32 lengths."""
    assert worlds(1).run(rotary_tables_alive, tiny_run())[0] == 0


def load_weights_and_go_on(run, folder: str, steps: int):
    """A weights-only load, in which memory that nobody wrote reads as NaN."""
    with poisoned():
        return load_and_go_on(run, folder, steps, optimizer=False)


def test_s9_a_weights_only_load_starts_from_zero_moments(worlds, tmp_path):
    """megatron would hand out uninitialised moments, and train to NaN on the second step."""
    worlds(1).run(save_then_go_on, tiny_run(), str(tmp_path), 0)
    found = worlds(1).run(load_weights_and_go_on, tiny_run(), str(tmp_path), 3)[0]
    again = worlds(1).run(load_and_go_on, tiny_run(), str(tmp_path), 3, False)[0]
    assert found == again
    assert all(norm < 10 for _, norm in found)


def gathers_of_a_step(run):
    """How often megatron gathers parameters in a step."""
    from longspan.trainer.engine.engine import Engine
    from megatron.core.distributed import param_and_grad_buffer as buffers

    found, gather = [], buffers.dist_all_gather_func

    def counted(*args, **options):
        found.append(args)
        return gather(*args, **options)

    buffers.dist_all_gather_func = counted
    try:
        take_step(Engine(run, run.stages[0], VOCAB), 0)
    finally:
        buffers.dist_all_gather_func = gather
    return len(found)


def test_a_lone_data_rank_gathers_no_parameters(worlds):
    """Through gloo that would be a copy by threads which slow down all others."""
    assert worlds(1).run(gathers_of_a_step, tiny_run()) == [0]
    assert min(worlds(2).run(gathers_of_a_step, tiny_run())) > 0
