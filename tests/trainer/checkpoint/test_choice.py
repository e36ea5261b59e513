"""Going on from an older checkpoint: what of the run goes with the newer ones."""

import json

import pytest
import torch.distributed as dist
from longspan.errors import RunError
from longspan.trainer.checkpoint.choice import newest_step, set_aside_newer
from longspan.trainer.checkpoint.store import open_store
from longspan.trainer.rewinds import Rewind, read_rewinds, write_rewinds
from longspan.trainer.run_directory import RunDirectory
from support.runs import run_with, state


@pytest.fixture
def lone_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_rewinds_and_reports_of_later_steps_go_with_newer_checkpoints(tmp_path, lone_rank):
    path = run_with(tmp_path / "run", {step: state(step) for step in (10, 20, 30)})
    directory = RunDirectory(path)
    run = directory.load_settings()
    store = open_store(run.checkpoint.where, path)
    early, late = Rewind(14, 10, 0, 60, 8), Rewind(24, 20, 0, 100, 8)
    write_rewinds(directory.rewinds, [early, late])
    report = directory.evaluations / f"{run.stages[0].name}.json"
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps({"loss": 1.0}))
    with pytest.raises(RunError, match="no complete checkpoint of step 15"):
        set_aside_newer(directory, run, store, 15)
    assert newest_step(store) == 30 and report.exists()
    set_aside_newer(directory, run, store, 10)
    assert newest_step(store) == 10 and not report.exists()
    assert read_rewinds(directory.rewinds) == [early]
    assert set(store.listing().values()) == {"committed", "aside"}
