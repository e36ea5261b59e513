"""Saves of several ranks: what is committed, what a failing store does, what training waits for."""

import threading
import time
from pathlib import Path

import pytest
import torch
from longspan.errors import CheckpointError
from longspan.trainer.checkpoint import saver as saver_module
from longspan.trainer.checkpoint.boxes import Box
from longspan.trainer.checkpoint.cursor import Cursor
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.loader import newest, refuse_damaged
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.manifest import read_manifest
from longspan.trainer.checkpoint.saver import Saver, State
from longspan.trainer.checkpoint.settings import CheckpointSettings
from longspan.trainer.checkpoint.shard import Piece
from longspan.trainer.checkpoint.stored import StoredState


def state_of(rank: int, value: float) -> State:
    """Two rows per rank of a matrix that two ranks have."""
    tensors = tuple(torch.full((6,), float(value + kind)) for kind in range(3))
    piece = Piece("w", (4, 3), Box(2 * rank, 2 * rank + 2, 0, 3), (tensors[0], *tensors[1:]))
    return State([piece], "fp32", {"w": int(value)})


def saver_for(folder: str, **settings) -> Saver:
    saver_module._BACK_OFF_S = 0.01
    return Saver(LocalStore(Path(folder)), CheckpointSettings.model_validate(settings))


def save_three(folder: str):
    """Three saves in flight one after another; the state changes as soon as a save has begun."""
    import torch.distributed as dist

    rank = dist.get_rank()
    saver = saver_for(folder, keep=2)
    for step in (1, 2, 3):
        state = state_of(rank, step)
        saver.wait()
        skipped = [step]
        info = {"skipped": skipped}
        saver.save(lambda state=state: state, Cursor(step=step), info, wait=step == 3)
        skipped.append(-1)  # the run goes on
        for tensor in state.pieces[0].tensors:
            tensor.fill_(-1)
    outcome = saver.wait()
    found = newest(saver.store)
    refuse_damaged(found)
    stored = StoredState(found.files)
    full = [
        stored.full("w", kind).unique().tolist() for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]
    saved = read_manifest(CheckpointFiles(saver.store, "step-00000002")).info["skipped"]
    return outcome.name, full, stored.index.steps, saver.store.committed(), saved


def test_what_is_committed_is_the_state_of_its_step(worlds, tmp_path):
    for found in worlds(2).run(save_three, str(tmp_path)):
        assert found == (
            "step-00000003",
            [[3.0], [4.0], [5.0]],
            {"w": 3},
            ["step-00000002", "step-00000003"],
            [2],
        )


def save_through(folder: str, fail: str, times: int, saves: int, **settings):
    """Saves to a store whose rank 1 fails some calls; how they ended."""
    import torch.distributed as dist

    rank = dist.get_rank()
    saver = saver_for(folder, **settings)
    left, original = [times], getattr(LocalStore, fail)

    def failing(self, *args, **kwargs):
        if left[0] and rank == (0 if fail == "commit" else 1):
            left[0] -= 1
            raise CheckpointError("no space is left", "free some")
        return original(self, *args, **kwargs)

    setattr(LocalStore, fail, failing)
    ended = []
    try:
        for step in range(1, saves + 1):
            saver.save(lambda step=step: state_of(rank, step), Cursor(step=step), {}, wait=False)
            outcome = saver.wait()
            ended.append((outcome.name, outcome.tries, outcome.error and outcome.error.what))
    except CheckpointError as error:
        ended.append(error.what)
    finally:
        setattr(LocalStore, fail, original)
    return ended, saver.store.listing()


@pytest.mark.parametrize("call", ["write", "commit", "read"])
def test_a_failed_attempt_is_tried_again_on_all_ranks(worlds, tmp_path, call):
    folder = tmp_path / call
    for ended, listing in worlds(2).run(save_through, str(folder), call, 1, 1):
        assert ended == [("step-00000001", 2, None)]
        assert listing == {"step-00000001": "committed"}


def test_training_goes_on_until_too_many_saves_in_a_row_have_failed(worlds, tmp_path):
    job = worlds(2).run
    for ended, listing in job(_save_misses, str(tmp_path), 6, 5):
        missed = (None, 2, "no space is left")
        assert ended[:2] == [missed, missed]
        assert "3 saves in a row have failed" in ended[2] and "no space is left" in ended[2]
        assert listing == {}
    for ended, _ in job(_save_misses, str(tmp_path / "mended"), 2, 2):
        assert [at[0] for at in ended] == [None, "step-00000002"]


def _save_misses(folder: str, times: int, saves: int):
    return save_through(folder, "write", times, saves, tries=2)


def stale_staging(folder: str):
    """A staging that copies nothing, as if the state of another step were written."""
    import torch.distributed as dist

    saver = saver_for(folder, tries=1)
    original = saver_module.stage

    def stale(pieces, staging):
        shard = original(pieces, staging)
        shard.data.zero_()
        return shard

    saver_module.stage = stale
    try:
        saver.save(lambda: state_of(dist.get_rank(), 1), Cursor(step=1), {}, wait=True)
        return saver.wait().error.what, saver.store.listing()
    finally:
        saver_module.stage = original


def test_weights_of_another_step_are_never_committed(worlds, tmp_path):
    for error, listing in worlds(2).run(stale_staging, str(tmp_path)):
        assert "does not hold the weights of step 1" in error and listing == {}


def slow_writes(folder: str):
    """A save whose writing waits until it is let go."""
    import torch.distributed as dist

    gate, original = threading.Event(), LocalStore.write

    def slow(self, *args):
        gate.wait(30)
        return original(self, *args)

    LocalStore.write = slow
    try:
        saver = saver_for(folder)
        rank = dist.get_rank()
        begun = time.monotonic()
        saver.save(lambda: state_of(rank, 1), Cursor(step=1), {}, wait=False)
        free = saver.poll() is None
        threading.Timer(0.5, gate.set).start()
        first = saver.wait()
        waited = time.monotonic() - begun
        saver.save(lambda: state_of(rank, 2), Cursor(step=2), {}, wait=False)
        return free, first.name, waited > 0.4, saver.wait().name
    finally:
        LocalStore.write = original


def test_one_save_is_in_flight_and_the_next_one_waits_for_it(worlds, tmp_path):
    for found in worlds(2).run(slow_writes, str(tmp_path)):
        assert found == (True, "step-00000001", True, "step-00000002")


def test_the_safetensors_library_reads_a_rank_s_file(worlds, tmp_path):
    from safetensors.torch import load_file

    worlds(2).run(save_three, str(tmp_path))
    tensors = load_file(tmp_path / "step-00000003" / "rank-00001.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        f"{kind}/w@2,0": (2, 3) for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    assert CheckpointFiles.of(tmp_path / "step-00000003").sizes().keys() == {
        *("rank-00000.safetensors", "rank-00001.safetensors"),
        *("index.json", "manifest.json", "COMMITTED"),
    }
