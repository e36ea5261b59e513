"""Nodes: a cluster that is made up, for what chooses nodes; Ray is not asked."""

from types import SimpleNamespace

from longspan.cluster import crews as module
from longspan.cluster import growth
from longspan.cluster.crews import Crews
from longspan.cluster.nodes import Node
from longspan.trainer.observe.events import read_events
from longspan.trainer.run_directory import create_or_open


class Clock:
    """Stands in for the module's clock; waiting takes no time."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(module, "_POLL_S", 1.0)
        monkeypatch.setattr(module, "time", self)

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class World:
    """Nodes as Ray would tell of them."""

    def __init__(self, monkeypatch, tmp_path, **nodes):
        self.nodes = {id: self.node(id, has) for id, has in nodes.items()}
        self.free, self.gone, self.said, self.asked = {}, set(), [], []
        self.path = tmp_path / "run"
        monkeypatch.setattr(module, "alive_nodes", lambda: tuple(self.nodes.values()))
        monkeypatch.setattr(module, "has_gone", lambda node: node.id in self.gone)
        monkeypatch.setattr(module, "free_slots", self.free_slots)
        monkeypatch.setattr(module, "_POLL_S", 0.01)
        monkeypatch.setattr(growth, "_request", lambda bundles: self.asked.append([*bundles]))

    def node(self, id, has):
        gpus, cores = has if isinstance(has, tuple) else (0, has)
        return Node(id, f"10.0.0.{ord(id)}", gpus, cores)

    def free_slots(self, gpu):
        return {id: self.free.get(id, node.slots(gpu)) for id, node in self.nodes.items()}

    def crews(self, run, consent=None, preflight=None, device=None, wait=0.05, **more):
        directory = create_or_open(self.path, run, "tiny")
        voice = SimpleNamespace(say=self.said.append)
        recovery = run.recovery.model_copy(update={"wait": wait})
        run = run.model_copy(update={"recovery": recovery})
        return Crews(run, directory, voice, consent, preflight, device, **more)

    def later(self, *changes):
        """While it is waited, each of these comes, one after the other; asks nobody to stop."""
        coming = iter(changes)

        def asked():
            if self.said:
                next(coming, lambda: None)()
            return False

        return asked

    def events(self):
        return [e for e in read_events(self.path / "events.jsonl") if e["event"] == "excluded"]


def places(crews):
    """The node of each rank of the next attempt."""
    return crews.next(lambda: False).places
