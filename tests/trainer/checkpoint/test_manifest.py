import json

import pytest
from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.cursor import Cursor
from longspan.trainer.checkpoint.files import CheckpointFiles
from longspan.trainer.checkpoint.local_store import LocalStore
from longspan.trainer.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    damages,
    marker_of,
    read_manifest,
    record,
)


@pytest.fixture
def committed(tmp_path):
    """A checkpoint with one file of data."""
    store = LocalStore(tmp_path)
    folder = store.begin(4)
    store.write(folder, "data", [b"abc", b"def"])
    manifest = Manifest(Cursor(step=4), {"data": record([b"abcdef"])}, {"stage_name": "base"})
    store.write(folder, MANIFEST, [manifest.to_json()])
    store.commit(folder, 4, marker_of(manifest.to_json()))
    return CheckpointFiles(store, "step-00000004")


def test_a_manifest_is_read_as_it_was_written(committed):
    manifest = read_manifest(committed)
    assert manifest.cursor == Cursor(step=4) and manifest.info["stage_name"] == "base"
    assert manifest.files["data"].size == 6
    assert damages(committed, manifest) == []


def test_every_change_of_a_file_is_found(committed):
    manifest, path = read_manifest(committed), committed.store.path / committed.folder
    (path / "data").write_bytes(b"abcdeg")
    assert damages(committed, manifest) == ["data is not what was written: its hash differs"]
    (path / "data").write_bytes(b"abcde")
    assert damages(committed, manifest) == ["data has 5 bytes in place of 6"]
    (path / "data").unlink()
    (sentence,) = damages(committed, manifest)
    assert "data cannot be read" in sentence
    (path / "more").touch()
    assert damages(committed, manifest, share=(0, 2))[-1] == "more does not belong to it"


def test_ranks_share_the_reading(committed):
    (committed.store.path / committed.folder / "data").write_bytes(b"")
    manifest = read_manifest(committed)
    found = [at for rank in range(3) for at in damages(committed, manifest, share=(rank, 3))]
    assert found == ["data has 0 bytes in place of 6"]


def test_a_manifest_of_another_version_or_with_a_change_is_refused(committed):
    path = committed.store.path / committed.folder / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"step": 4', '"step": 5'))
    with pytest.raises(CheckpointError, match="not the one that was committed"):
        read_manifest(committed)
    path.write_text(json.dumps(json.loads(text) | {"format": 3, "longspan": "9.1"}))
    with pytest.raises(CheckpointError, match=r"format 3, written by longspan 9\.1"):
        read_manifest(committed)
    path.write_text(text[:40])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(committed)
