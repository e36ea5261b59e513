"""Nodes that meet in preflight: who measures with whom, and who is to blame where it fails."""

import time

import pytest
from longspan.cluster.preflight import devices, groups, versions
from longspan.cluster.preflight import preflight as module
from longspan.cluster.preflight.inspector import Inspector
from support.measuring_crew import MeasuringCrew, node
from support.short_run import short_run


def test_a_later_node_measures_with_known_ones_which_are_not_judged_again():
    known, new = [node(1), node(2)], node(3)
    crew = MeasuringCrew([*known, new], set())
    found = groups.measure(crew, [new], known)
    assert [(r.node, r.check, r.level) for r in found] == [(new.name, "bandwidth between", "ok")]
    assert crew.groups == [[known[0].name, known[1].name, new.name]]
    assert [
        r.node for r in groups.measure(MeasuringCrew([*known, new], {new.name}), [new], known)
    ] == [new.name]
    # With a known one that is alone nothing else would tell that it cannot be reached.
    assert groups.measure(MeasuringCrew(known, {new.name}), [], known) == []
    cores = groups.measure(MeasuringCrew([node(1, gpus=2), new], set()), [new], [node(1, gpus=2)])
    assert cores == []  # its ranks would be on GPUs, and it has none


class _Leaving(MeasuringCrew):
    """Some nodes go away while all of them measure, and spoil that."""

    def __init__(self, nodes, leaving, spoilers=(), after=60.0, at="reduce"):
        super().__init__(nodes, {*spoilers})
        self._leaving, self._after, self._at = {*leaving}, after, at

    def ask(self, method, arguments, limit_s):
        gone = self._leaving & arguments.keys()
        if method != self._at or not gone:
            return super().ask(method, arguments, limit_s)
        self.present = [node for node in self.present if node.name not in gone]
        self._left = self._after
        return {name: {"error": "timed out"} for name in arguments if name not in gone}


def found_in(crew, nodes, known=()):
    return [(r.node, r.level) for r in groups.measure(crew, nodes, known)]


@pytest.mark.parametrize("at", ["port", "reduce"])
def test_a_known_node_that_goes_away_does_not_take_new_ones_with_it(at):
    known, new = [node(1), node(2)], node(3)
    crew = _Leaving([*known, new], [known[0].name], at=at)
    assert found_in(crew, [new], known) == [(new.name, "ok")]
    assert crew.groups == [[known[1].name, new.name]]
    # One that is alone cannot measure; neither can it where no time is left.
    names = [n.name for n in known]
    assert found_in(_Leaving([*known, new], names, at=at), [new], known) == [(new.name, "warn")]
    hurry = _Leaving([*known, new], names[:1], after=3.0, at=at)
    assert found_in(hurry, [new], known) == [(new.name, "warn")]
    # Those that are left may have one among them that spoils it all the same.
    nodes = [node(number) for number in range(1, 6)]
    crew = _Leaving(nodes, [nodes[0].name], [nodes[4].name], at=at)
    assert [level for _, level in found_in(crew, nodes)] == ["ok", "ok", "fail", "fail"]


class _Looked(MeasuringCrew):
    """A whole crew, whose inspectors are in this process; some nodes cannot be reached."""

    def __init__(self, nodes, tmp_path, cut=()):
        super().__init__(nodes, set())
        self.nodes, self.ask_time, self.asked, self._cut = list(nodes), time.time, {}, set(cut)
        self._inspectors = {n.name: Inspector(n.name, "127.0.0.1", None) for n in nodes}

    def __call__(self, nodes, interface, deadline):
        assert [n.name for n in nodes] == [n.name for n in self.nodes]
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def silent(self):
        return []

    def ask(self, method, arguments, limit_s):
        self.asked.setdefault(method, []).extend(arguments)
        if method in ("port", "reduce"):
            return super().ask(method, arguments, limit_s)
        answers = {}
        for name, given in arguments.items():
            answers[name] = getattr(self._inspectors[name], method)(*given)
            if method == "meet" and name in self._cut:
                answers[name]["network"] = dict.fromkeys(given[0], "timed out")
        return answers


@pytest.fixture
def looked(tmp_path, monkeypatch):
    """A crew in this process, for `preflight`, by its nodes and those that cannot be reached."""
    monkeypatch.setattr(module.dashboard, "where", lambda: None)
    card = {"name": "CPU", "flops": 1e12, "core_flops": 1e11, "right": True}
    monkeypatch.setattr(devices, "probe", lambda limit_s: {"gpus": 0, "devices": [card]})

    def make(nodes, cut=()):
        crew = _Looked(nodes, tmp_path, cut)
        monkeypatch.setattr(module, "Crew", crew)
        return crew

    return make


def test_a_later_node_has_to_have_the_versions_that_are_asked_for(looked, tmp_path):
    new = node(2)
    looked([new])
    own = versions.probe()
    for like, level in ((own, "ok"), ({**own, "torch": "0.1"}, "fail")):
        found = module.preflight([new], short_run(), tmp_path, like=like)
        levels = [r.level for r in found.results if r.check == "versions"]
        assert (levels, found.versions) == ([level], like)


@pytest.mark.parametrize("cut", [False, True])
def test_a_replacement_meets_those_in_use_and_only_it_is_judged(looked, tmp_path, cut):
    known, new = node(1), node(2)
    crew = looked([known, new], [new.name] * cut)
    found = module.preflight([new], short_run(), tmp_path, beside=[known])
    assert {result.node for result in found.results} == {new.name}
    assert crew.asked["look"] == [new.name] and crew.asked["greet"] == [known.name]
    assert sorted(crew.asked["meet"]) == sorted([known.name, new.name])
    failed = [(r.check, r.found) for r in found.failures(new)]
    assert failed == [("network", f"none with {known.name} (timed out)")] * cut
    assert ("bandwidth between" in {r.check for r in found.results}) != cut
