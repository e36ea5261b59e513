"""Which checkpoints may go: never the newest, none before the newest was read again."""

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from longspan.trainer.checkpoint.retention import expendable
from longspan.trainer.checkpoint.settings import CheckpointSettings

HOUR = 3600.0
AGES = {10: 5 * HOUR, 20: 4 * HOUR, 30: 3 * HOUR, 40: 2 * HOUR, 50: 1 * HOUR}


@pytest.mark.parametrize(
    ("settings", "gone"),
    [
        ({"keep": 1}, [10, 20, 30, 40]),
        ({"keep": 2}, [10, 20, 30]),
        ({"keep": 9}, []),
        ({"keep": 1, "keep_every": 20}, [10, 30]),
        ({"keep": 1, "keep_hours": 2.5}, [10, 20, 30]),
        ({"keep": 4, "keep_hours": 2.5}, [10]),
        ({"keep": 1, "keep_hours": 3.5, "keep_every": 20}, [10]),
    ],
)
def test_by_count_by_age_and_every_nth(settings, gone):
    settings = CheckpointSettings(every=10, **settings)
    assert expendable(AGES, settings, reread=True) == gone
    assert expendable(AGES, settings, reread=False) == []


def test_an_age_in_doubt_is_young():
    ages = AGES | {10: -HOUR, 20: None}
    young = CheckpointSettings(keep=1, keep_hours=1.5)
    assert expendable(ages, young, reread=True) == [30, 40]
    by_count = CheckpointSettings(keep=1)
    assert expendable(ages, by_count, reread=True) == [10, 20, 30, 40]


@limits(max_examples=60)
@given(
    st.dictionaries(st.integers(0, 200), st.none() | st.floats(-1e6, 1e6)),
    st.integers(1, 5),
    st.integers(0, 20),
    st.none() | st.floats(0.1, 300),
    st.booleans(),
)
def test_the_newest_and_the_nth_always_stay(ages, keep, nth, hours, reread):
    settings = CheckpointSettings(every=1, keep=keep, keep_every=nth, keep_hours=hours)
    gone = expendable(ages, settings, reread=reread)
    assert gone == sorted(gone)
    stay = set(ages) - set(gone)
    assert set(sorted(ages)[-keep:]) <= stay
    assert not any(nth and step % nth == 0 for step in gone)
    if hours is not None:
        assert all((ages[step] or 0) >= hours * HOUR for step in gone)
    if reread and not nth and hours is None:
        assert len(stay) == min(keep, len(ages))
