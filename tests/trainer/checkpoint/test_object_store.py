"""Checkpoints in S3: a real server on loopback; cut off before any request; owners; errors."""

import subprocess
import sys

import pytest
from longspan.errors import CheckpointError, RunError
from longspan.trainer.checkpoint.folders import MARKER
from longspan.trainer.checkpoint.object_store import ASIDE, ObjectStore
from longspan.trainer.checkpoint.owner import OWNER
from longspan.trainer.checkpoint.store import open_store
from support.stores import assert_whole, save, steps

MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def server():
    """An S3 server that the environment points to."""
    from moto.server import ThreadedMotoServer

    started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "sEcret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
            "NO_PROXY": "*",
        }.items():
            environment.setenv(name, value)
        environment.delenv("AWS_PROFILE", raising=False)
        yield started
    started.stop()


@pytest.fixture
def place(request):
    """A fresh bucket's URL, with a prefix."""
    import s3fs

    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
    return f"s3://{name}/some/prefix"


@pytest.fixture
def run(tmp_path):
    return tmp_path


@pytest.fixture
def fresh_session():
    """Connections are kept per process; here the environment changes."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def cut_off(monkeypatch):
    """`cut_off(n)`: no request gets through after the first n; which ones did."""
    from aiobotocore.client import AioBaseClient

    real, state = AioBaseClient._make_api_call, {"left": -1, "done": []}

    async def call(self, operation, parameters):
        if state["left"] == 0:
            raise OSError("the process is gone")
        state["left"] -= 1
        state["done"].append(operation)
        return await real(self, operation, parameters)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", call)

    def arm(requests):
        state.update(left=requests, done=[])
        return state

    return arm


def test_a_save_is_read_back_and_is_the_newest(place, run):
    store = open_store(place, run)
    assert store.committed() == [] == store.unfinished()
    assert save(store, 100000000) == "step-100000000.try-1"
    assert save(store, 20) == "step-00000020.try-1"
    assert store.committed() == ["step-00000020.try-1", "step-100000000.try-1"]
    for folder in store.committed():
        assert_whole(store, folder)
    folder = "step-00000020.try-1"
    assert store.read(folder, "manifest.json", 2, 6) == b"step"
    assert store.read(folder, "manifest.json", 9) == b"20}"
    assert store.read(folder, "manifest.json", 4, 4) == b""
    assert store.size(folder, "manifest.json") == 12
    assert store.free() is None


def test_cut_off_before_any_request_a_checkpoint_is_whole_or_not_there(place, run, cut_off):
    def save_and_prune(store, step):
        save(store, step)
        for folder in store.committed()[:-1]:
            store.remove(folder)

    save(ObjectStore(place, run), 10)
    state = cut_off(-1)
    save_and_prune(ObjectStore(place, run), 11)
    requests = list(state["done"])
    assert requests.count("PutObject") == 6 and "ListObjectsV2" in requests
    seen = []
    for number, step in enumerate(range(12, 12 + len(requests))):
        cut_off(number)
        with pytest.raises(CheckpointError, match="the process is gone"):
            save_and_prune(ObjectStore(place, run), step)
        cut_off(-1)
        after = ObjectStore(place, run)
        seen.append(tuple(found - step for found in steps(after)))
        for folder in after.committed():
            assert_whole(after, folder)
        for folder in after.unfinished():
            after.remove(folder)
        if step not in steps(after):
            save(after, step)
        for folder in after.committed()[:-1]:
            after.remove(folder)
        assert steps(after) == [step] and after.unfinished() == []
    assert list(dict.fromkeys(seen)) == [(-1,), (-1, 0), (0,)]


def test_large_files_go_up_in_parts(place, run, cut_off):
    store = ObjectStore(place, run, part_bytes=5 * MIB)
    data = bytes(range(256)) * (12 * MIB // 256)
    state = cut_off(-1)
    folder = store.begin(1)
    store.write(folder, "file", [data[:7], memoryview(data)[7:]])
    assert state["done"].count("UploadPart") == 3
    assert store.read(folder, "file") == data
    assert store.read(folder, "file", 6 * MIB, 6 * MIB + 300) == data[:300]


@pytest.mark.parametrize("size", [10, 6 * MIB])
def test_an_upload_whose_parts_fail_leaves_no_object(place, run, size):
    def parts():
        yield bytes(size)
        yield bytes(5)
        raise RuntimeError("the device is lost")

    store = ObjectStore(place, run, part_bytes=5 * MIB)
    folder = store.begin(1)
    with pytest.raises(CheckpointError, match="the device is lost"):
        store.write(folder, "file", parts())
    assert store.files(folder) == {}
    uploads = store._fs.call_s3("list_multipart_uploads", Bucket=place.split("/")[2])
    assert not uploads.get("Uploads")


def test_attempts_have_numbers_even_before_their_first_object(place, run):
    store = open_store(place, run)
    assert [store.begin(7), store.begin(7)] == ["step-00000007.try-1", "step-00000007.try-2"]
    store.write("step-00000007.try-2", "file", [b"x"])
    assert store.unfinished() == ["step-00000007.try-2"]
    assert open_store(place, run).begin(7) == "step-00000007.try-1"
    store.remove("step-00000007.try-2")
    store.remove("step-00000007.try-2")
    assert store.listing() == {}


def test_a_complete_checkpoint_is_not_replaced_until_it_is_set_aside(place, run):
    store = open_store(place, run)
    first = save(store, 5)
    second = store.begin(5)
    store.write(second, "file", [b"x"])
    with pytest.raises(CheckpointError, match="step 5 is already complete"):
        store.commit(second, 5, b"")
    assert store.committed() == [first]
    assert store.set_aside(first) == first
    assert store.committed() == [] and store.listing()[first] == "aside"
    assert {ASIDE, "manifest.json"} <= store.files(first).keys()
    assert MARKER not in store.files(first)
    store.commit(second, 5, b"")
    assert store.committed() == [second]


def test_a_marker_whose_answer_was_lost_is_not_written_to_another_attempt(place, run, monkeypatch):
    store = ObjectStore(place, run)
    real = store._fs.pipe_file

    def lost(path, data, **options):
        real(path, data, **options)
        if path.endswith(MARKER):
            raise OSError("timeout")

    folder = store.begin(3)
    store.write(folder, "file", [b"x"])
    monkeypatch.setattr(store._fs, "pipe_file", lost)
    assert store.commit(folder, 3, b"hash") == folder
    assert store.read(folder, MARKER) == b"hash"


def test_two_runs_never_write_to_one_place(place, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    save(open_store(place, first), 10)
    with pytest.raises(RunError, match=f"belongs to another run: {first} on "):
        open_store(place, second).begin(20)
    assert steps(open_store(f"{place}/", second)) == [10]
    open_store(place, first).claim()


def test_of_runs_that_claim_at_once_one_wins(place, tmp_path, monkeypatch):
    stores = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        stores.append(ObjectStore(place, tmp_path / name))
    monkeypatch.setattr(stores[0]._fs, "exists", lambda path: False)
    stores[0].claim()
    with pytest.raises(RunError, match="another run"):
        stores[1].claim()
    assert str(tmp_path / "first").encode() in stores[0]._fs.cat_file(f"{stores[0]._path}/{OWNER}")


def test_missing_and_short_objects_are_named(place, run):
    store = open_store(place, run)
    folder = save(store, 5)
    with pytest.raises(CheckpointError, match=f"{folder}/none cannot be read") as caught:
        store.read(folder, "none")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    for first in (3, 50):
        with pytest.raises(CheckpointError, match="cut short: 11 bytes of 99"):
            store.read(folder, "manifest.json", first, 99)
    with pytest.raises(CheckpointError, match="no such object"):
        store.size(folder, "none")


def test_a_missing_bucket_is_an_error_with_a_fix(run):
    store = open_store("s3://no-such-bucket-here/prefix", run)
    for call in (store.committed, store.claim):
        with pytest.raises(CheckpointError, match="bucket") as caught:
            call()
        assert "endpoint" in caught.value.fix


def test_a_server_that_does_not_answer_is_an_error_without_secrets(run, monkeypatch, fresh_session):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = ObjectStore("s3://bucket/prefix?token=sEcret", run)
    monkeypatch.setattr(store._fs, "retries", 1)
    with pytest.raises(CheckpointError, match="Could not connect") as caught:
        store.committed()
    assert "AWS_ENDPOINT_URL" in caught.value.fix
    assert "sEcret" not in str(caught.value) and "sEcret" not in str(store)


def test_missing_credentials_are_named(run, monkeypatch, fresh_session, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="credentials are missing") as caught:
        open_store("s3://bucket/prefix", run).committed()
    assert "AWS_ACCESS_KEY_ID" in caught.value.fix


@pytest.mark.parametrize("missing", ["fsspec", "s3fs"])
def test_a_missing_package_is_named_with_the_extra(missing):
    program = f"""
import sys
sys.modules[{missing!r}] = None
from pathlib import Path
from longspan.trainer.checkpoint.store import open_store
try:
    open_store("s3://key:sEcret@bucket/prefix", Path("."))
except Exception as error:
    print(type(error).__name__, error)
print({{"torch", "numpy"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("RunError"), done.stderr
    assert 'pip install "longspan[s3]"' in done.stdout and "sEcret" not in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_url_of_nothing_is_an_error(run):
    with pytest.raises(RunError, match="nowhere"):
        open_store("nowhere://bucket", run)
