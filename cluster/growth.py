"""Growth: a cluster that can grow is asked for the nodes that a run waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress


class Growth:
    """What the autoscaler is asked for. There is one such request in a cluster: the newest counts,
    so a driver that waits has to renew its own.

    A cluster without an autoscaler keeps it in mind, and nothing comes of it.
    """

    def __init__(self) -> None:
        # What a driver of this run that was killed asked for is still there.
        self._asked = True

    def ask(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Ask for nodes on which all of these have room at once, those that are up included.

        Args:
            bundles: Resources that have to be on one node, each.
        """
        self._asked = True
        _request(bundles)

    def take_back(self) -> None:
        """Nothing is asked for any more; what is up and idle may go."""
        if self._asked:
            self._asked = False
            _request(())


def _request(bundles: Sequence[Mapping[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    # It is a wish: whatever Ray makes of it, the run waits for nodes and says what is missing.
    with suppress(Exception):
        request_resources(bundles=[dict(bundle) for bundle in bundles])
