"""Runs that are stopped and go on: on as many ranks or others, with the same data or others."""

import json
import os
import random
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
from longspan.errors import LongspanError
from longspan.trainer.observe.sink import Sink
from longspan.trainer.rewinds import Rewind, write_rewinds
from longspan.trainer.run_directory import RunDirectory
from longspan.trainer.settings import RunSettings
from support.tiny import LENGTH, SEQUENCES, tiny_run

STEPS = 8


class Attempt(NamedTuple):
    """What a rank saw of an attempt."""

    losses: dict
    samples: list
    news: list
    error: str

    @property
    def resumed(self):
        """What was said of the resume."""
        found = [text for text in self.news if text.startswith("going on from")]
        return found[0] if found else ""


def attempt(run: RunSettings, folder: Path, stop_at=None, exactness=None, threads=1) -> Attempt:
    """Train what is left on this rank's world, until the step after `stop_at`."""
    import torch
    import torch.distributed as dist
    from longspan.trainer.data.samples import TrainingSamples
    from longspan.trainer.exactness import allow
    from longspan.trainer.loop import Run
    from longspan.trainer.observe.observer import Observer
    from longspan.trainer.run_directory import create_or_open
    from longspan.trainer.stopping import StopRequest

    seen, stop, error = Attempt({}, [], [], ""), StopRequest(), ""

    class Heard(Sink):
        def run_started(self, info):
            seen.news.append(info["exactness"]["meaning"])

        def message(self, text):
            seen.news.append(text)

        def step(self, metrics):
            seen.losses[metrics.step] = metrics.loss, metrics.grad_norm
            stop.requested = metrics.step == stop_at

    read = TrainingSamples.__getitem__

    def noted(samples, index):
        sample = read(samples, index)
        seen.samples.append((index, blake2b(sample.tokens_T.numpy().tobytes()).hexdigest()))
        return sample

    os.environ["LONGSPAN_CACHE"] = str(folder.parent / "cache")
    allow(exactness)
    torch.set_num_threads(threads)
    try:
        with patch.object(TrainingSamples, "__getitem__", noted):
            if dist.get_rank() == 0:
                create_or_open(folder, run, "tiny")
            dist.barrier()
            Run(RunDirectory(folder), run, Observer([Heard()]), stop).train()
    except LongspanError as refused:
        error = str(refused)
    finally:
        torch.set_num_threads(1)
    return seen._replace(error=error)


def write(folder: Path, documents: int = 60) -> None:
    words = random.Random(1)
    texts = [" ".join(words.choices(["fox", "over", str(n)], k=5 + n)) for n in range(documents)]
    folder.joinpath("a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def settings(folder: Path, **changes) -> RunSettings:
    write(folder)
    return tiny_run(
        stage__data={"sources": [{"kind": "jsonl", "paths": [str(folder / "a.jsonl")]}]},
        stage__tokens=LENGTH * SEQUENCES * STEPS,
        stage__optimizer__lr=1e-3,
        model__layers=2,
        checkpoint={"every": 1, "keep": 20},
        evaluation={"documents": 0, "sequences": 1, "visible": 8},
        telemetry={"every": 0},
        **changes,
    )


def newest_state(folder: Path):
    """What the newest checkpoint says of itself."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "manifest.json").read_text())


def assert_close(found: dict, expected: dict, tolerance: float = 1e-5):
    assert found.keys() == expected.keys()
    for step, pair in expected.items():
        assert found[step] == pytest.approx(pair, rel=tolerance), step


@pytest.fixture(scope="module")
def straight(worlds, tmp_path_factory):
    """The run on one rank without a stop, and its folder."""
    folder = tmp_path_factory.mktemp("straight")
    found = worlds(1).run(attempt, settings(folder), folder / "run")[0]
    assert not found.error and found.news[0] == "E2 (bit-exact)"
    return found, folder / "run"


def test_ranks_come_and_go_and_no_sample_is_lost_or_repeated(worlds, straight, tmp_path):
    run, expected = settings(tmp_path), straight[0]
    losses, samples = {}, []
    for ranks, stop_at in ((4, 1), (2, 3), (1, 5), (4, None)):
        found = worlds(ranks).run(attempt, run, tmp_path / "run", stop_at, "E1")
        assert [one.error for one in found] == [""] * ranks
        assert all(one.losses == found[0].losses for one in found)
        assert not losses.keys() & found[0].losses.keys()
        losses |= found[0].losses
        samples += [sample for one in found for sample in one.samples]
        if stop_at != 1:
            assert f" -> {ranks}" in found[0].resumed and "E1" in found[0].resumed
    assert [number for number, _ in sorted(samples)] == [*range(STEPS * SEQUENCES)]
    assert sorted(samples) == sorted(expected.samples)
    assert_close(losses, expected.losses)
    assert newest_state(tmp_path / "run")["exactness"]["level"] == "E1"


def test_other_ranks_are_refused_until_they_are_allowed(worlds, tmp_path):
    run = settings(tmp_path)
    worlds(2).run(attempt, run, tmp_path / "run", 1)
    before = sorted(tmp_path.rglob("run/checkpoints/**/*"))
    (refused,) = worlds(1).run(attempt, run, tmp_path / "run")
    assert "would be E1 (same data and schedule), and the run declared E2" in refused.error
    assert "ranks: 2 -> 1" in refused.error and "--exactness E1" in refused.error
    assert not refused.losses and sorted(tmp_path.rglob("run/checkpoints/**/*")) == before


def test_the_same_conditions_go_on_bit_for_bit(worlds, straight, tmp_path):
    run = settings(tmp_path)
    first = worlds(1).run(attempt, run, tmp_path / "run", 1)[0]
    (refused,) = worlds(1).run(attempt, run, tmp_path / "run", None, None, 2)
    assert 'threads (OMP_NUM_THREADS): "1" -> "2"' in refused.error and not refused.losses
    rest = worlds(1).run(attempt, run, tmp_path / "run")[0]
    assert rest.resumed.endswith("stage tiny: exactness E2 (bit-exact)")
    assert first.losses | rest.losses == straight[0].losses
    assert newest_state(tmp_path / "run")["exactness"]["level"] == "E2"


def test_other_documents_are_refused_and_the_same_ones_elsewhere_are_not(worlds, tmp_path):
    run = settings(tmp_path)
    worlds(1).run(attempt, run, tmp_path / "run", 1)
    write(tmp_path, 61)
    for allowed in (None, "E1"):
        (refused,) = worlds(1).run(attempt, run, tmp_path / "run", None, allowed)
        assert "would be E0" in refused.error and "training documents:" in refused.error
        assert "order of the first 8 sequences:" in refused.error and not refused.losses
    write(tmp_path)
    os.utime(tmp_path / "a.jsonl", (1, 1))
    (gone,) = worlds(1).run(attempt, run, tmp_path / "run", 3)
    assert "E2" in gone.resumed and not gone.error
    write(tmp_path, 61)
    (gone,) = worlds(1).run(attempt, run, tmp_path / "run", None, "E0")
    assert "exactness E0" in gone.resumed and not gone.error and STEPS in gone.losses
    promise = newest_state(tmp_path / "run")["exactness"]
    assert (promise["declared"], promise["level"]) == ("E2", "E0")
    assert json.loads((tmp_path / "run" / "complete.json").read_text())["exactness"] == promise


def test_data_left_out_by_a_rewind_are_not_other_data(worlds, tmp_path):
    run, folder = settings(tmp_path), tmp_path / "run"
    worlds(1).run(attempt, run, folder, 1)
    write_rewinds(RunDirectory(folder).rewinds, [Rewind(3, 2, 0, 3 * SEQUENCES, SEQUENCES)])
    (gone,) = worlds(1).run(attempt, run, folder)
    assert not gone.error and "exactness E2" in gone.resumed
    assert min(gone.samples)[0] == 3 * SEQUENCES and min(gone.losses) == 3


def test_where_no_checkpoint_is_nothing_falls(worlds, tmp_path):
    run = settings(tmp_path)
    worlds(1).run(attempt, run, tmp_path / "run", 1)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    write(tmp_path, 61)
    (again,) = worlds(1).run(attempt, run, tmp_path / "run", 1)
    assert not again.error and min(again.losses) == 1
    assert newest_state(tmp_path / "run")["exactness"]["level"] == "E2"


def two_stages(folder: Path) -> RunSettings:
    """The second one has other documents, another length and another layout."""
    raw = settings(folder).model_dump(mode="json")
    (first,) = raw["stages"]
    lines = folder.joinpath("a.jsonl").read_text().splitlines(keepends=True)
    folder.joinpath("b.jsonl").write_text("".join(lines[20:]))
    data = {"sources": [{"kind": "jsonl", "paths": [str(folder / "b.jsonl")]}]}
    short = {**first, "tokens": LENGTH * SEQUENCES * 2}
    second = {**short, "name": "second", "length": LENGTH * 2, "micro_batch": 2, "data": data}
    return RunSettings.model_validate({**raw, "stages": [short, second]})


def test_between_stages_layout_and_data_are_the_recipes_wish(worlds, tmp_path):
    run, folder = two_stages(tmp_path), tmp_path / "run"
    whole = worlds(1).run(attempt, run, folder)[0]
    assert not whole.error and sorted(whole.losses) == [1, 2, 3, 4]
    for step in (3, 4):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    (folder / "evaluations" / "second.json").unlink()
    shutil.copytree(folder, tmp_path / "other")
    again = worlds(1).run(attempt, run, folder)[0]
    assert "stage second: exactness E2" in again.resumed
    assert again.losses == {step: whole.losses[step] for step in (3, 4)}
    # The machine is compared there, too.
    (refused,) = worlds(1).run(attempt, run, tmp_path / "other", None, None, 2)
    assert "threads" in refused.error and "micro_batch" not in refused.error
