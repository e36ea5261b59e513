"""Records of runs: ids, prefixes, folders, and files that are none."""

import threading
from pathlib import Path

import pytest
from longspan.cluster.registry import (
    Place,
    Record,
    Registry,
    check_id,
    find_run,
    new_id,
    run_folder,
)
from longspan.errors import RunError
from longspan.trainer.run_directory import RunDirectory
from support.recorded import leave_run

PLACE = Place("lab", "http://127.0.0.1:8265", "/shared")


def record(name: str, created: float = 0.0, **changes) -> Record:
    return Record(name, "smoke", created, f"/shared/runs/{name}", **changes)


def test_what_is_written_is_read_again():
    registry = Registry()
    given = record("a-1", 5.0, cluster=PLACE, settings="s", shape="k").submitted("a-1-1")
    registry.write(given, "text")
    assert registry.get("a-1") == given and Registry().records() == [given]
    assert registry.recipe(given) == "text"
    registry.forget("a-1")
    assert registry.get("a-1") is None and registry.records() == []
    with pytest.raises(RunError, match="longspan submit RECIPE --run-id a-1"):
        registry.recipe(given)


def test_the_newest_is_first_and_strange_files_are_skipped():
    registry = Registry()
    for number in range(3):
        registry.write(record(f"r{number}", float(number)))
    for name, text in {"x.json": "{", "y.json": "[]", "z.json": '{"id": "z"}', "r0.yaml": "",
                       "other.json": (registry.root / "r0.json").read_text()}.items():  # fmt: skip
        (registry.root / name).write_text(text)
    assert [found.id for found in registry.records()] == ["r2", "r1", "r0"]
    assert registry.get("../r0") is None


def test_an_id_is_given_once():
    registry = Registry()
    registry.write(record("a"), new=True)
    with pytest.raises(FileExistsError):
        registry.write(record("a", 1.0), new=True)
    assert registry.get("a") == record("a")
    ids = {new_id("smoke") for _ in range(200)}
    assert len(ids) == 200
    name, day, letters = ids.pop().split("-")
    assert (name, len(day), len(letters)) == ("smoke", 6, 6) and not set(letters) & set("aeiou")
    for run_id in ids:
        check_id(run_id)
    check_id(new_id("x" * 200))


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "x" * 81, "a\n", "a.json"])
def test_what_cannot_be_an_id(name):
    with pytest.raises(RunError, match="cannot be the id"):
        check_id(name)


def test_writers_at_the_same_time_leave_whole_records():
    registry = Registry()
    threads = [threading.Thread(target=registry.write, args=(record(f"r{n}"),)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(registry.records()) == 16


def test_a_run_is_found_by_id_prefix_and_folder(tmp_path, monkeypatch):
    registry = Registry()
    for name in ("smoke-1-abc", "smoke-1-abd", "smoke-2-xyz", "smoke-1"):
        registry.write(record(name))
    assert find_run("smoke-1") == record("smoke-1")  # exact, though a prefix of others
    assert find_run("smoke-2") == record("smoke-2-xyz")
    directory = leave_run(tmp_path / "mine")
    assert find_run(str(tmp_path / "mine")).path == directory.path
    monkeypatch.chdir(tmp_path)
    assert isinstance(find_run("mine"), RunDirectory)
    known = Record("mine-1", "short", 0.0, str(directory.path))
    registry.write(known)
    assert find_run("mine") == find_run("./mine") == find_run("mine/") == known
    assert isinstance(find_run("./other"), RunDirectory)


def test_the_folder_of_a_run_is_known_by_whatever_names_the_run(tmp_path, monkeypatch):
    registry = Registry()
    directory = leave_run(tmp_path / "mine")
    place = Place("lab", PLACE.address, str(tmp_path))
    registry.write(Record("stretch-1", "short", 0.0, str(directory.path), cluster=place))
    assert run_folder("stretch") == directory.path
    checkpoint = tmp_path / "mine" / "checkpoints" / "step-3"
    assert run_folder(str(checkpoint)) == checkpoint
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stretch").mkdir()
    assert run_folder("stretch") == Path("stretch")  # a folder of that name, not a prefix
    assert run_folder("stretch-1") == directory.path
    registry.write(record("far", cluster=PLACE))
    with pytest.raises(RunError, match=r"is on cluster lab, not here\n.*that sees /shared"):
        run_folder("far")
    with pytest.raises(RunError, match="no run `nowhere`"):
        run_folder("nowhere")


def test_a_run_that_cannot_be_found(tmp_path, monkeypatch):
    registry = Registry()
    with pytest.raises(RunError, match="no run was started from here yet"):
        find_run("smoke")
    for number in range(12):
        registry.write(record(f"smoke-{number:02}", number))
    with pytest.raises(RunError) as caught:
        find_run("smoke")
    assert caught.value.what.startswith("12 runs begin with `smoke`:\n  smoke-11\n  smoke-10\n")
    assert caught.value.what.endswith("\n  and 4 more")
    with pytest.raises(RunError, match=r"no run `smoke_03`.*\n.*did you mean smoke-03"):
        find_run("smoke_03")
    with pytest.raises(RunError, match="`longspan runs` lists"):
        find_run("zzz")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(RunError, match="a folder of that name holds no run"):
        find_run("data")


def test_records_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LONGSPAN_HOME", str(tmp_path / "file"))
    with pytest.raises(RunError, match="LONGSPAN_HOME"):
        Registry().write(record("a"))
    assert Registry().records() == []
