"""Checkpoints in folders: cut off before any operation, complete or not there; owners; errors."""

import errno
import os
import resource
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from longspan.errors import CheckpointError, RunError
from longspan.trainer.checkpoint import local_store
from longspan.trainer.checkpoint.folders import MARKER
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.owner import OWNER
from longspan.trainer.checkpoint.store import open_store
from support.stores import assert_whole, content, save, steps

CHANGES = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "link")


class Killed(BaseException):
    """The process is gone: nothing that it does after this has an effect."""


@pytest.fixture
def killed_before(monkeypatch):
    """`killed_before(n)`: the process dies before its nth operation; how many it did."""
    state = {"left": -1, "done": 0}

    def planted(name):
        real = getattr(os, name)

        def operation(*args, **kwargs):
            if state["left"] == 0:
                raise Killed
            state["left"] -= 1
            state["done"] += 1
            if name == "write" and state["left"] == 0:
                return real(args[0], args[1][: len(args[1]) // 2])
            return real(*args, **kwargs)

        return operation

    for name in CHANGES:
        monkeypatch.setattr(os, name, planted(name))

    def arm(operations):
        state.update(left=operations, done=0)
        return state

    yield arm
    arm(-1)


def save_and_prune(store):
    save(store, 20)
    store.remove("step-00000010")


def test_a_save_is_read_back_and_is_the_newest(tmp_path):
    store = open_store("checkpoints", tmp_path)
    assert store.committed() == [] and store.unfinished() == []
    assert save(store, 100000000) == "step-100000000"
    assert save(store, 20) == "step-00000020"
    assert store.committed() == ["step-00000020", "step-100000000"]
    for folder in store.committed():
        assert_whole(store, folder)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000020\n"
    assert store.read("step-00000020", "manifest.json", 2, 6) == b"step"
    assert store.read("step-00000020", "manifest.json", 9) == b" 20}"[1:]
    assert not (tmp_path / "checkpoints" / OWNER).exists()
    assert 0 < store.free() < 2**60


def test_a_pointer_that_a_kill_left_behind_is_set_right(tmp_path):
    store = open_store("checkpoints", tmp_path)
    name, root = save(store, 20), tmp_path / "checkpoints"
    (root / "latest").write_text("step-00000010\n")
    (root / "latest.writing").write_text("step-000")
    store.point(name)
    assert (root / "latest").read_text() == f"{name}\n" and not (root / "latest.writing").exists()


def test_killed_before_any_operation_a_checkpoint_is_whole_or_not_there(tmp_path, killed_before):
    start = LocalStore(tmp_path / "start")
    save(start, 10)
    state = killed_before(-1)
    shutil.copytree(start.path, tmp_path / "whole")
    state = killed_before(-1)
    save_and_prune(LocalStore(tmp_path / "whole"))
    operations = state["done"]
    assert operations > 30
    seen = []
    for number in range(operations):
        root = tmp_path / str(number)
        shutil.copytree(start.path, root)
        killed_before(number)
        with pytest.raises(Killed):
            save_and_prune(LocalStore(root))
        killed_before(-1)
        after = LocalStore(root)
        seen.append(tuple(steps(after)))
        for folder in after.committed():
            assert_whole(after, folder)
        assert set(after.listing().values()) <= {"committed", "unfinished"}
        for folder in after.unfinished():
            after.remove(folder)
        if 20 not in steps(after):
            save(after, 20)
        assert steps(after)[-1] == 20 and after.unfinished() == []
    assert list(dict.fromkeys(seen)) == [(10,), (10, 20), (20,)]


def test_what_a_rename_publishes_was_synced_before(tmp_path, monkeypatch):
    store, log, names = LocalStore(tmp_path / "root"), [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}

    def opened(path, *args, **kwargs):
        handle = real["open"](path, *args, **kwargs)
        names[handle] = Path(path).name
        return handle

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda fd: log.append(names[fd]) or real["fsync"](fd))
    monkeypatch.setattr(os, "rename", lambda a, b: log.append("rename") or real["rename"](a, b))
    save(store, 20)
    attempt = "step-00000020.tmp-1"
    made = [tmp_path.name]
    assert log[:-2] == [*made, *content(20), MARKER, attempt, "rename", "root"]
    log.clear()
    store.remove("step-00000020")
    assert log == ["rename", "root"]


def test_attempts_have_numbers_and_are_found_and_removed(tmp_path):
    store = LocalStore(tmp_path)
    names = [store.begin(7) for _ in range(3)]
    assert names == [f"step-00000007.tmp-{number}" for number in (1, 2, 3)]
    store.remove(names[1])
    store.write(names[0], "file", [b"x"])
    assert store.begin(7) == names[1]
    assert store.unfinished() == names and store.committed() == []
    for name in names:
        store.remove(name)
    store.remove(names[0])
    assert store.listing() == {}


def test_a_complete_checkpoint_is_never_replaced_and_an_incomplete_one_is_kept(tmp_path):
    store = LocalStore(tmp_path)
    save(store, 5)
    attempt = store.begin(5)
    with pytest.raises(CheckpointError, match="step-00000005 is already complete"):
        store.commit(attempt, 5, b"")
    assert_whole(store, "step-00000005")
    assert store.unfinished() == [attempt]
    (tmp_path / "step-00000005" / MARKER).unlink()
    assert store.listing()["step-00000005"] == "damaged"
    store.commit(attempt, 5, b"")
    assert store.listing() == {"step-00000005": "committed", "step-00000005.aside-1": "aside"}
    assert "manifest.json" in store.files("step-00000005.aside-1")
    assert store.set_aside("step-00000005") == "step-00000005.aside-2"
    assert store.committed() == [] == store.unfinished()


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    store = LocalStore(tmp_path)
    for name in ("step-1", "step-00000001x", "notes", "step-00000002.tmp-0x", "step-0000003.tmp-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000004").write_text("a file")
    assert store.listing() == {}
    for name in ("../secret", "", "..", "a/b"):
        with pytest.raises(CheckpointError, match="is no name of a file"):
            store.read("step-00000001", name)


def test_a_marker_that_cannot_be_read_is_an_error_and_not_a_missing_one(tmp_path, monkeypatch):
    store, real = LocalStore(tmp_path), os.open
    save(store, 5)

    def broken(path, *args, **kwargs):
        if Path(path).name == MARKER:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(CheckpointError, match=r"Input/output error.*\n  fix: check the disk"):
        store.committed()


def test_missing_and_short_files_are_named(tmp_path):
    store = LocalStore(tmp_path)
    save(store, 5)
    with pytest.raises(CheckpointError, match="step-00000005/none cannot be read"):
        store.read("step-00000005", "none")
    with pytest.raises(CheckpointError, match="step-00000006 cannot be read"):
        store.files("step-00000006")
    with pytest.raises(CheckpointError, match="cut short: 11 bytes of 99"):
        store.read("step-00000005", "manifest.json", 3, 99)
    with pytest.raises(CheckpointError, match="no such file") as caught:
        store.size("step-00000005", "none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_file_is_written_once(tmp_path):
    store = LocalStore(tmp_path)
    folder = store.begin(1)
    store.write(folder, "file", [b"first"])
    with pytest.raises(CheckpointError, match="File exists"):
        store.write(folder, "file", [b"second"])
    assert store.read(folder, "file") == b"first"


def test_parts_of_any_shape_and_type_are_written_as_they_lie_in_memory(tmp_path):
    numpy = pytest.importorskip("numpy")
    store = LocalStore(tmp_path)
    folder = store.begin(1)
    parts = [numpy.arange(6, dtype="<f4").reshape(2, 3), numpy.zeros((0, 4)), bytearray(b"ab")]
    store.write(folder, "file", iter(parts))
    assert store.read(folder, "file") == parts[0].tobytes() + b"ab"


def test_a_failing_computation_of_the_parts_is_not_called_a_failing_disk(tmp_path):
    def parts():
        yield b"x"
        raise RuntimeError("the device is lost")

    store = LocalStore(tmp_path)
    with pytest.raises(RuntimeError, match="the device is lost"):
        store.write(store.begin(1), "file", parts())


@pytest.mark.parametrize(
    ("number", "why", "fix"),
    [
        (errno.ENOSPC, "no space is left", "free some space"),
        (errno.EDQUOT, "the quota is used up", "free some space"),
        (errno.EROFS, "the file system is read-only", "checkpoint.where"),
        (errno.ESTALE, "Stale file handle", "mount"),
    ],
)
def test_an_error_of_the_disk_names_the_fix_and_leaves_what_is_complete(
    tmp_path, monkeypatch, number, why, fix
):
    store = LocalStore(tmp_path)
    save(store, 10)

    def failing(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(CheckpointError, match=why) as caught:
            save(store, 20)
    assert str(tmp_path) in caught.value.what and fix in caught.value.fix
    assert isinstance(caught.value.__cause__, OSError)
    assert steps(store) == [10]
    assert_whole(store, "step-00000010")
    save(store, 20)
    assert steps(store) == [10, 20] and store.unfinished() == ["step-00000020.tmp-1"]


def test_a_real_limit_on_files_is_an_error_with_a_fix(tmp_path):
    store = LocalStore(tmp_path)
    folder = store.begin(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(CheckpointError, match="larger than is allowed"):
            store.write(folder, "file", [bytes(2**21)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_without_write_permission_is_an_error_with_a_fix():
    root = Path(tempfile.mkdtemp())
    root.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # who may write everywhere
            os.seteuid(65534)
        for place in (root, root / "new"):
            with pytest.raises(CheckpointError, match="permission was denied") as caught:
                LocalStore(place).begin(1)
            assert "permissions" in caught.value.fix
    finally:
        os.seteuid(user)
        root.rmdir()


def run_dir(path):
    path.mkdir()
    return path


def test_two_runs_never_write_to_one_place(tmp_path):
    first, second = run_dir(tmp_path / "first"), run_dir(tmp_path / "second")
    place = str(tmp_path / "shared")
    save(open_store(place, first), 10)
    with pytest.raises(RunError, match=f"belongs to another run: {first} on ") as caught:
        open_store(place, second).begin(20)
    assert "checkpoint.where" in caught.value.fix
    assert open_store(place, second).committed() == ["step-00000010"]
    save(open_store(f"file://{place}", first), 20)
    assert steps(open_store(place, first)) == [10, 20]
    shutil.copytree(first, tmp_path / "copy")
    with pytest.raises(RunError, match="another run"):
        open_store(place, tmp_path / "copy").claim()
    (tmp_path / "shared" / OWNER).write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        open_store(place, first).claim()
    (tmp_path / "shared" / OWNER).unlink()
    open_store(place, second).claim()
    assert sorted(path.name for path in (tmp_path / "shared").glob("OWNER*")) == [OWNER]


def test_a_folder_that_only_looks_like_the_runs_own_has_an_owner(tmp_path):
    first, second = run_dir(tmp_path / "first"), run_dir(tmp_path / "second")
    (tmp_path / "shared").mkdir()
    for run in (first, second):
        (run / "checkpoints").symlink_to(tmp_path / "shared")
    open_store("checkpoints", first).claim()
    with pytest.raises(RunError, match="another run"):
        open_store("checkpoints", second).begin(1)


@pytest.mark.parametrize("links", [True, False])
def test_of_runs_that_claim_at_once_one_wins(tmp_path, monkeypatch, links):
    if not links:

        def refused(*args, **kwargs):
            raise OSError(errno.ENOTSUP, "no links")

        monkeypatch.setattr(os, "link", refused)
    runs = [run_dir(tmp_path / str(number)) for number in range(6)]
    start, won = threading.Barrier(len(runs)), []

    def claim(run):
        store = open_store(str(tmp_path / "shared"), run)
        start.wait()
        try:
            store.claim()
            won.append(run)
        except RunError:
            pass

    threads = [threading.Thread(target=claim, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_commit_that_cannot_be_made_durable_is_none(tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "store")
    folder, whole = store.begin(10), local_store._sync
    store.write(folder, "a", [b"x"])

    def failing(path):
        if path == store.path:
            raise OSError(errno.EIO, "Input/output error")
        whole(path)

    monkeypatch.setattr(local_store, "_sync", failing)
    with pytest.raises(CheckpointError, match="cannot be committed"):
        store.commit(folder, 10, b"m")
    assert store.listing() == {folder: "unfinished"}
    monkeypatch.setattr(local_store, "_sync", whole)
    store.remove(folder)
    assert store.commit(store.begin(10), 10, b"m") == "step-00000010"
