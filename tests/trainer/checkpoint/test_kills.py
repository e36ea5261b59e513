"""A run that is killed at any file operation, resumed, ends bit-equal to the unkilled run.

The points are found by tracing: see support/faults.py. Another day draws other kills.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
from longspan.trainer.loop import Run
from support.faults import AFTER, ALL, BEFORE, HALF, Fault, unseen_files
from support.grid import DRAW, sample
from support.kills import Case, Kills
from support.soak import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
NOTES = "notes.txt"


@pytest.fixture(scope="module")
def kills(tmp_path_factory):
    runs = Kills(tmp_path_factory.mktemp("kills"))
    yield runs
    runs.close()


def test_a_run_that_is_killed_at_a_file_operation_ends_bit_equal(kills):
    failed = []
    for case in sample("kills", kills.cases(), 3):
        try:
            kills.assert_survives(case)
        except (AssertionError, TimeoutError) as error:
            failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


def test_a_run_that_is_killed_at_random_times_ends_bit_equal(kills):
    soaked = soak(kills, 2, seed=DRAW)
    assert sum(soaked.kills.values()) == 2 and soaked.made >= soaked.steps


def test_no_file_of_a_run_escapes_the_tracer(kills):
    run_dir, points = kills.straight
    assert unseen_files(run_dir, points) == []
    (run_dir / "unknown").touch()
    assert unseen_files(run_dir, points) == ["run/unknown"]
    (run_dir / "unknown").unlink()


def write_notes():
    """Let every save write one file more."""
    real = Run._save

    def save(self, *args, **kwargs):
        real(self, *args, **kwargs)
        with (self.directory.path / NOTES).open("a") as notes:
            notes.write("saved\n")

    Run._save = save


def test_a_file_that_somebody_adds_to_a_save_is_among_the_points(kills):
    new = kills.points(f"{__name__}:write_notes").keys() - kills.straight[1].keys()
    ours = {(p.role, p.when) for p in new if NOTES in p.label and "write" in p.label}
    assert ours == {(rank, when) for rank in ("rank 0", "rank 1") for when in (BEFORE, HALF)}


def move_file_by_file():
    """Let checkpoints come into their place file by file, the marker first."""
    real = os.rename

    def rename(source, target, **folders):
        if "tmp" not in Path(source).name or not Path(source).is_dir():
            return real(source, target, **folders)
        Path(target).mkdir()
        for file in sorted(Path(source).iterdir()):
            shutil.copyfile(file, Path(target) / file.name)
        return shutil.rmtree(source)

    os.rename = rename


def test_a_checkpoint_that_is_not_committed_at_once_is_caught(kills):
    patch = f"{__name__}:move_file_by_file"
    halves = {
        point: count
        for point, count in kills.points(patch).items()
        if "checkpoints/step-N/" in point.label and point.when == HALF
    }
    point, count = next(iter(halves.items()))
    with pytest.raises(AssertionError, match="is not intact"):
        kills.assert_survives(Case(Fault(point, count, ALL), again=False), patch)


def test_points_name_what_happens_to_files(kills):
    said = {(point.when, point.label.split()[-2]) for point in kills.straight[1]}
    for operation in ("mkdir", "remove", "rmdir"):
        assert {(BEFORE, operation), (AFTER, operation)} <= said
    assert {(BEFORE, "fsync"), (BEFORE, "write"), (HALF, "write"), (BEFORE, "read")} <= said
