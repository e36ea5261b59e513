"""Nodes that measure with each other in preflight, made up."""

from longspan.cluster.nodes import Node


def node(number, cores=2, gpus=0):
    """A node that there is not."""
    return Node(id=f"{number}" * 56, address=f"10.0.0.{number}", gpus=gpus, cores=cores)


class MeasuringCrew:
    """Answers for nodes, some of which spoil every group that they are in, and some slow it down.

    Attributes:
        groups: Of the newest measurement, by the names of their nodes.
        rounds: Measurements up to now.
    """

    def __init__(self, nodes, spoilers, left=60.0, slow=()):
        self.present, self._spoilers, self._left = list(nodes), spoilers, left
        self.groups, self._slow, self.rounds = [], slow, 0

    def left(self, most_s):
        return min(most_s, self._left)

    def ask(self, method, arguments, limit_s):
        if method == "port":
            return {name: ("127.0.0.1", number) for number, name in enumerate(arguments)}
        groups = {}
        for name, (group, _) in arguments.items():
            groups.setdefault(group.port, []).append((name, group))
        self.groups = [[name for name, _ in members] for members in groups.values()]
        for members in groups.values():
            assert [group.first for _, group in members] == list(
                range(0, members[0][1].world, members[0][1].local)
            )
        self.rounds += 1
        speeds = {name: 1e6 if set(names) & set(self._slow) else 1e12
                  for names in self.groups for name in names}  # fmt: skip
        spoilt = {name: set(names) & self._spoilers for names in self.groups for name in names}
        return {
            name: {"error": "timed out"} if spoilt[name] else {"bytes_per_s": speeds[name]}
            for name in arguments
        }
