"""`longspan checkpoint`: what the verbs print and refuse, and every damage that is planted."""

import hashlib
import json
import random
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from longspan.errors import CheckpointError, RunError
from longspan.trainer.checkpoint.folders import MARKER
from longspan.trainer.checkpoint.loader import newest, refuse_damaged
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.manifest import MANIFEST
from longspan.trainer.checkpoint.verbs import list_checkpoints, prune, verify
from longspan.trainer.run_directory import RunDirectory
from support.runs import SHAPES, run_with, state
from test_cli import run as run_cli


@pytest.fixture(scope="module", autouse=True)
def lone_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with checkpoints at 10, 20 and 30, which no test changes."""
    folder = tmp_path_factory.mktemp("made") / "run"
    return run_with(folder, {step: state(step) for step in (10, 20, 30)})


@pytest.fixture
def damaged(made, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(made, tmp_path / "run")


@pytest.fixture
def checkpoint_verb(monkeypatch, capfd):
    return lambda *arguments: run_cli(monkeypatch, capfd, "checkpoint", *map(str, arguments))


def assert_damaged(run, *parts: str) -> None:
    """Verify and the loader refuse the newest checkpoint and offer the one before it."""
    report = verify(run)
    text = "\n".join(report.lines)
    assert not report.good
    for part in parts:
        assert part in text
    assert "step-00000020: intact (4 files" in text
    assert report.lines[-1] == "the newest intact checkpoint is step-00000020"
    with pytest.raises(CheckpointError) as caught:
        refuse_damaged(newest(LocalStore(run / "checkpoints")))
    assert "20" in caught.value.fix


def test_every_flipped_byte_of_every_file_is_found(damaged):
    folder, draw = damaged / "checkpoints" / "step-00000030", random.Random(7)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [MARKER, "index.json", MANIFEST, "rank-00000.safetensors"]
    for name in names:
        whole = (folder / name).read_bytes()
        places = {0, 7, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(25))}
        for place in sorted(places):
            changed = bytearray(whole)
            changed[place] ^= draw.randrange(1, 256)
            (folder / name).write_bytes(changed)
            assert_damaged(damaged, "step-00000030")
        (folder / name).write_bytes(whole)
    assert verify(damaged).good


def test_a_flipped_byte_outside_of_checkpoints_is_harmless(damaged):
    pointer = damaged / "checkpoints" / "latest"
    for content in (b"step-00000031\n", b"\xff" * 9, b""):
        pointer.write_bytes(content)
        assert verify(damaged).good
        assert newest(LocalStore(damaged / "checkpoints")).name == "step-00000030"


@pytest.mark.parametrize("name", ["index.json", MANIFEST, "rank-00000.safetensors"])
def test_truncated_and_missing_files_are_named(damaged, name):
    path = damaged / "checkpoints" / "step-00000030" / name
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        assert_damaged(damaged, f"step-00000030: {name} ")
        assert "damaged" in "\n".join(list_checkpoints(damaged).lines)
    path.unlink()
    assert_damaged(damaged, name, "no such file" if name == MANIFEST else name)
    assert "damaged" in "\n".join(list_checkpoints(damaged).lines)


def test_a_file_too_many_is_named(damaged):
    (damaged / "checkpoints" / "step-00000030" / "rank-00001.safetensors").write_bytes(b"x")
    assert_damaged(damaged, "step-00000030: rank-00001.safetensors does not belong to it")


def test_a_newer_version_is_named_even_with_a_good_marker(damaged):
    folder = damaged / "checkpoints" / "step-00000030"
    raw = json.loads((folder / MANIFEST).read_text()) | {"format": 77, "longspan": "9.9"}
    text = json.dumps(raw).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / MARKER).write_text(hashlib.sha256(text).hexdigest() + "\n")
    assert_damaged(damaged, "has format 77, written by longspan 9.9")


def test_a_lost_marker_is_named_and_nothing_is_removed(damaged):
    (damaged / "checkpoints" / "step-00000030" / MARKER).unlink()
    report = verify(damaged)
    assert not report.good and "step-00000030: it has no file COMMITTED" in report.lines
    with pytest.raises(CheckpointError, match="newest checkpoint step-00000030 is damaged"):
        prune(damaged, 1, lambda names: True)
    assert (damaged / "checkpoints" / "step-00000010").is_dir()


def test_one_step_is_verified_alone(damaged):
    path = damaged / "checkpoints" / "step-00000030" / "index.json"
    path.write_bytes(b"")
    assert verify(damaged, 20).good and not verify(damaged, 30).good
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 25") as caught:
        verify(damaged, 25)
    assert "10, 20, 30" in caught.value.fix


def test_ls_says_what_is_there(damaged, checkpoint_verb):
    store = LocalStore(damaged / "checkpoints")
    store.begin(40)
    store.set_aside("step-00000010")
    (damaged / "checkpoints" / "step-00000020" / "index.json").write_bytes(b"short")
    code, out, err = checkpoint_verb("ls", damaged)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split() == ["step", "stage", "tokens", "size", "age", "layout", "state"]
    rows = {line.split()[0]: line for line in lines[1:5]}
    assert rows["10"].endswith("set aside") and rows["40"].endswith("unfinished")
    assert "short" in rows["30"] and "30,720" in rows["30"] and "1 rank" in rows["30"]
    assert rows["30"].endswith("intact by size") and rows["20"].endswith("damaged")
    assert "step-00000020: index.json has 5 bytes in place of" in lines[5]


def test_verify_ends_with_1_and_a_line_per_damage(damaged, checkpoint_verb):
    assert checkpoint_verb("verify", damaged)[0] == 0
    for step, name in ((20, "index.json"), (30, "index.json"), (30, "rank-00000.safetensors")):
        with (damaged / "checkpoints" / f"step-{step:08d}" / name).open("ab") as file:
            file.write(b"x")
    code, out, _ = checkpoint_verb("verify", damaged)
    assert code == 1 and out.count("bytes in place of") == 3
    assert out.endswith("the newest intact checkpoint is step-00000010\n")


def test_what_is_no_run_or_has_no_checkpoint_is_a_message(tmp_path, checkpoint_verb):
    code, _, err = checkpoint_verb("ls", tmp_path)
    assert code == 2 and "holds no run" in err
    empty = run_with(tmp_path / "empty", {})
    assert checkpoint_verb("ls", empty)[0] == 0
    code, _, err = checkpoint_verb("verify", empty)
    assert code == 2 and "there is no complete checkpoint" in err


def test_show_has_the_manifest_the_files_and_the_parameters(made, checkpoint_verb):
    code, out, _ = checkpoint_verb("show", made, "20", "--norms")
    assert code == 0 and "20 of the run, 20 of stage short" in out
    assert "20,480; the stage goes on with sequence 80" in out and "length" in out
    digest = hashlib.sha256((made / "checkpoints/step-00000020/index.json").read_bytes())
    assert digest.hexdigest() in out
    line = next(line for line in out.splitlines() if "layer.0.weight" in line)
    weight, *moments = state(20).pieces[0].tensors
    assert line.split()[:5] == ["layer.0.weight", "4", "x", "3", "20"]
    assert line.split()[5:] == [f"{t.double().norm():.6g}" for t in (weight, *moments)]
    assert "3 parameters, 29 elements, fp32" in out
    assert "step-00000030" in checkpoint_verb("show", made)[1]


def test_prune_asks_and_removes_what_retention_lets_go(damaged, checkpoint_verb, monkeypatch):
    LocalStore(damaged / "checkpoints").begin(40)
    code, out, _ = checkpoint_verb("prune", damaged, "--yes")
    assert code == 0 and "removed step-00000040.tmp-1" in out and "step-00000010" not in out
    asked = []
    report = prune(damaged, 1, lambda names: bool(asked.append(names)))
    assert report.lines == ["nothing was removed"]
    assert [name.split()[0] for name in asked[0]] == ["step-00000010", "step-00000020"]
    assert len(LocalStore(damaged / "checkpoints").committed()) == 3
    code, out, _ = checkpoint_verb("prune", damaged, "--keep", "1", "--yes")
    assert code == 0 and "are free again" in out
    assert LocalStore(damaged / "checkpoints").committed() == ["step-00000030"]
    assert checkpoint_verb("prune", damaged, "--keep", "1")[1] == "nothing to remove\n"


def test_prune_neither_counts_nor_removes_damaged_checkpoints(damaged):
    (damaged / "checkpoints" / "step-00000020" / "index.json").write_bytes(b"short")
    assert prune(damaged, 2, lambda names: True).lines == ["nothing to remove"]
    assert prune(damaged, 1, lambda names: True).lines[0] == "removed step-00000010"
    assert len(LocalStore(damaged / "checkpoints").committed()) == 2


def test_prune_obeys_the_recipe(tmp_path):
    run = run_with(
        tmp_path / "run",
        {step: state(step) for step in (10, 20, 30)},
        checkpoint={"every": 10, "keep": 1, "keep_every": 20, "keep_hours": 1},
    )
    assert prune(run, None, lambda names: True).lines == ["nothing to remove"]
    for step in (10, 20):
        folder = run / "checkpoints" / f"step-{step:08d}"
        raw = json.loads((folder / MANIFEST).read_text()) | {"created": time.time() - 7200}
        text = json.dumps(raw).encode()
        (folder / MANIFEST).write_bytes(text)
        (folder / MARKER).write_text(hashlib.sha256(text).hexdigest() + "\n")
    assert prune(run, None, lambda names: True).lines[0] == "removed step-00000010"
    assert len(LocalStore(run / "checkpoints").committed()) == 2


def test_prune_leaves_everything_where_the_newest_is_damaged_or_a_run_is_in_progress(damaged):
    never = lambda names: pytest.fail("asked")  # noqa: E731
    with RunDirectory(damaged).lock(), pytest.raises(RunError, match="is in use by process"):
        prune(damaged, 1, never)
    with (damaged / "checkpoints/step-00000030/rank-00000.safetensors").open("r+b") as file:
        file.write(b"\x01")
    with pytest.raises(CheckpointError, match="nothing was removed: the newest"):
        prune(damaged, 1, never)
    assert len(LocalStore(damaged / "checkpoints").committed()) == 3


def test_diff_counts_equal_tensors_and_measures_the_others(tmp_path, checkpoint_verb):
    one, two = state(1), state(1)
    two.pieces[0].tensors[0][5] += 0.5
    two.pieces[2].tensors[1][0] = float("nan")
    run = run_with(tmp_path / "run", {10: one, 20: two, 30: one})
    code, out, _ = checkpoint_verb("diff", f"{run}@10", "30", "--moments")
    assert code == 0 and "9 of 9 tensors bit-equal" in out and "length: 266 -> 286" in out
    code, out, _ = checkpoint_verb("diff", f"{run}@10", "20")
    assert code == 1 and "2 of 3 tensors bit-equal" in out
    row = next(line for line in out.splitlines() if "layer.0.weight" in line).split()
    largest = one.pieces[0].tensors[0].abs().max().item()
    assert row[1:3] == ["weight", "0.5"] and row[4:] == ["1", "of", "12"]
    assert float(row[3]) == pytest.approx(0.5 / largest, rel=1e-2)
    assert "nan" in checkpoint_verb("diff", f"{run}@10", "20", "--moments")[1]


def test_diff_of_two_runs_names_settings_and_parameters(tmp_path, checkpoint_verb):
    left = run_with(tmp_path / "left", {10: state(1)})
    shapes = {**SHAPES, "layer.0.weight": (4, 4), "embedding.word_embeddings.weight": (9, 2)}
    shapes["new"] = (2,)
    del shapes["norm"]
    other = state(1, shapes)
    table = other.pieces[1].tensors[0]
    table[12:] = 0  # the rows that a layout pads
    table[:12] = state(1).pieces[1].tensors[0]
    right = run_with(tmp_path / "right", {10: other}, seed=5)
    code, out, _ = checkpoint_verb("diff", left, right)
    assert code == 1 and "seed: 1234 -> 5" in out
    assert "missing: norm" in out and "added: new" in out
    assert "shape: layer.0.weight: [4, 3] -> [4, 4]" in out
    assert "1 of 2 tensors bit-equal" in out
    table[13] = 1
    right = run_with(tmp_path / "third", {10: other})
    assert "shape: embedding" in checkpoint_verb("diff", left, right)[1]


def test_a_difference_of_zeros_is_one_of_bits(tmp_path):
    from longspan.trainer.checkpoint.comparison import difference

    found = difference(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found is not None and (found.absolute, found.elements) == (0.0, 1)
    assert difference(torch.tensor([float("nan")]), torch.tensor([float("nan")])) is None
