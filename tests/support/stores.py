"""A save as the trainer makes it, and what must hold of a store whenever it was cut off."""

from longspan.trainer.checkpoint.folders import MARKER, step_of


def content(step: int) -> dict[str, bytes]:
    """The files of a checkpoint: one of several parts, one empty."""
    return {f"rank-{rank}.safetensors": f"{step}.{rank} ".encode() * 1000 for rank in range(2)} | {
        "manifest.json": f'{{"step": {step}}}'.encode(),
        "empty": b"",
    }


def save(store, step: int) -> str:
    """A save in one process."""
    folder = store.begin(step)
    for name, data in content(step).items():
        store.write(folder, name, [data[:5], memoryview(data)[5:]])
    return store.commit(folder, step, f"marker of {step}".encode())


def assert_whole(store, folder: str) -> None:
    """All of a checkpoint is there, as it was written."""
    step = step_of(folder)
    expected = content(step) | {MARKER: f"marker of {step}".encode()}
    assert store.files(folder) == {name: len(data) for name, data in expected.items()}
    for name, data in expected.items():
        assert store.read(folder, name) == data


def steps(store) -> list[int]:
    """Of the complete checkpoints."""
    return [step_of(folder) for folder in store.committed()]
