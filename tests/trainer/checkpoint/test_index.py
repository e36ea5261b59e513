import pytest
from longspan.errors import CheckpointError
from longspan.trainer.checkpoint.boxes import Box
from longspan.trainer.checkpoint.index import Index, build_index
from longspan.trainer.checkpoint.shard import Entry


def entry(*box: int, name="w") -> Entry:
    return Entry(name, (4, 3), Box(*box), (0, 100, 200))


def test_an_index_is_read_as_it_was_written():
    files = [("b", [entry(2, 4, 0, 3)]), ("a", [entry(0, 2, 0, 3)])]
    index = build_index("bf16", files, {"w": 7})
    assert Index.from_json(index.to_json()) == index
    assert index.parameters["w"].shape == (4, 3) and index.steps == {"w": 7}


@pytest.mark.parametrize(
    "boxes",
    [
        [(0, 3, 0, 3)],
        [(0, 2, 0, 3), (1, 3, 0, 3)],  # as many elements as there are, and some twice
        [(0, 4, 0, 2), (0, 2, 1, 3)],
        [(0, 2, 0, 3), (2, 4, 0, 3), (0, 1, 0, 1)],
    ],
)
def test_elements_that_are_missing_or_there_twice_are_no_checkpoint(boxes):
    with pytest.raises(CheckpointError, match="other elements of w"):
        build_index("fp32", [("a", [entry(*box) for box in boxes])], {"w": 1})


def test_a_parameter_that_no_rank_wrote_is_no_checkpoint():
    with pytest.raises(CheckpointError, match="other elements of v"):
        build_index("fp32", [("a", [entry(0, 4, 0, 3)])], {"w": 1, "v": 1})
