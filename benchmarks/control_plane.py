"""What the control plane of a run costs with a thousand ranks, in a real Ray actor.

Ranks and nodes are simulated in a few processes; what they write, read and send is the code of a
run: heartbeats, stations, the watch and what the driver asks it. Ray Train's own look at its
workers is not part of it. A rank's steps are beats of its heart, many of them between two reports.
Run: python benchmarks/control_plane.py --out benchmarks/results/control-plane-cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import psutil
from about import about

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from longspan.cluster.driver import Driver, Options
from longspan.cluster.gang import Crew, Gang
from longspan.cluster.limits import known_limits
from longspan.cluster.rank import Task
from longspan.cluster.station import Station
from longspan.cluster.voice import Voice
from longspan.cluster.watch import End, Place
from longspan.trainer.heartbeat import Heartbeat
from support.cluster import ray_environment
from support.recorded import leave_run
from support.short_run import short_run

_POLL_S = 0.2


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        ranks: Of the gang.
        nodes: That they are on, evenly.
        steps_per_s: Of every rank.
    """

    ranks: int
    nodes: int
    steps_per_s: float

    def ranks_of(self, node: int) -> range:
        """The ranks of a node."""
        each = self.ranks // self.nodes
        return range(node * each, (node + 1) * each)


CASES = (Case(1000, 125, 10.0), Case(1000, 125, 1.0), Case(125, 125, 10.0), Case(1000, 25, 10.0))
SMALL = Case(8, 4, 10.0)


def _name(node: int) -> str:
    """As long as Ray's, and different where those are."""
    return f"{node:08x}".ljust(56, "0")


class Hosts:
    """Some of the nodes, with their ranks; an actor of its own.

    Args:
        task: What ranks are told.
        case: What is simulated.
        mine: The nodes that are here.
    """

    def __init__(self, task: Task, case: Case, mine: Sequence[int]) -> None:
        self._task, self._case, self._mine = task, case, mine
        self._stations = {n: Station(Path(task.run_dir), task.attempt, _name(n)) for n in mine}
        self._hearts: list[Heartbeat] = []
        self._over = threading.Event()
        self.steps = 0

    async def join(self) -> list[str]:
        """All ranks are there; what is wrong, if anything."""
        places = []
        for node, station in self._stations.items():
            for rank in self._case.ranks_of(node):
                self._hearts.append(Heartbeat(station.beat_path(rank)))
                station.started(rank, os.getpid())
                places.append(Place(rank, station.node, f"host-{node}", "10.0.0.1", 29500))
        watch, attempt = self._task.watch, self._task.attempt
        told = await asyncio.gather(*(watch.join.remote(attempt, place) for place in places))
        threading.Thread(target=self._step, daemon=True).start()
        return [one.problem for one in told if one.problem or one.order != "go on"]

    def _step(self) -> None:
        """Every rank makes its steps; what is late is made up for."""
        for heart in self._hearts:
            heart.enter("open")
        begun = time.monotonic()
        while not self._over.wait(1 / self._case.steps_per_s):
            while self.steps < (time.monotonic() - begun) * self._case.steps_per_s:
                self.steps += 1
                for heart in self._hearts:
                    heart.computed(0.05)
                    heart.enter("step", self.steps)

    async def report(self, seconds: float) -> dict[str, Any]:
        """Every node reports once in an interval for so long; how long each answer took."""
        before, until = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() + seconds
        made = self.steps
        found = await asyncio.gather(*(self._tell(n, until) for n in self._mine))
        after = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "latencies_s": [seconds for latencies in found for seconds in latencies],
            "steps": self.steps - made,
            "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        }

    async def _tell(self, node: int, until: float) -> list[float]:
        task, station, latencies = self._task, self._stations[node], []
        next_at = time.monotonic() + task.interval * node / self._case.nodes
        while next_at < until:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            next_at += task.interval
            report = station.look(task.limits, False)
            assert len(report.own_s) == len(self._case.ranks_of(node))
            begun = time.perf_counter()
            order = await task.watch.report.remote(task.attempt, report)
            latencies.append(time.perf_counter() - begun)
            assert order == "go on", order
        return latencies

    async def end(self) -> None:
        """All ranks end."""
        self._over.set()
        ranks = [rank for node in self._mine for rank in self._case.ranks_of(node)]
        watch, attempt = self._task.watch, self._task.attempt
        await asyncio.gather(*(watch.ended.remote(attempt, rank, End(0)) for rank in ranks))
        for station in self._stations.values():
            station.close()


def main() -> int:
    """Runs the cases, and writes what came of them with the versions."""
    args = _parse()
    with tempfile.TemporaryDirectory() as name:
        # Of this process and of all that Ray starts from it.
        os.environ |= ray_environment(secrets.token_hex(32))
        os.environ["PYTHONPATH"] += f"{os.pathsep}{sys.path[0]}"
        os.environ["TMPDIR"] = os.environ["RAY_TMPDIR"] = name
        tempfile.tempdir = None
        import ray

        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
                 object_store_memory=80 * 2**20, _temp_dir=f"{name}/ray")  # fmt: skip
        try:
            cases = (SMALL,) if args.small else CASES
            rows = [_run(case, args, Path(name) / f"run-{n}") for n, case in enumerate(cases)]
        finally:
            ray.shutdown()
    result = {
        "interval_s": args.interval,
        "seconds": args.seconds,
        "processes": args.processes,
        "cases": rows,
        "load": round(os.getloadavg()[0], 2),
        **about("ray"),
    }
    print(_table(rows))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds, as of the driver")
    parser.add_argument("--processes", type=int, default=2, help="that the nodes are simulated in")
    parser.add_argument("--small", action="store_true", help="one case, to see that it runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.seconds < args.interval or args.processes < 1:
        parser.error("there are an interval and a process at least")
    return args


def _run(case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One case, from the first rank that joins to the last that ends."""
    import ray

    directory = leave_run(folder, 0, None)
    places = [_name(node) for node in range(case.nodes) for _ in case.ranks_of(node)]
    crew = Crew(places, {}, gpu=True, unit=len(case.ranks_of(0)))
    options = Options(folder.name, folder, "short", interval=args.interval)
    watch = Driver(short_run(), options, Voice())._begin(None, 1, crew)
    limits = known_limits(short_run().recovery.hang, directory.events, case.ranks)
    task = Task(str(folder), 1, watch, args.interval, limits, grace=60.0)
    hosts = [
        ray.remote(Hosts).options(num_cpus=0).remote(task, case, mine)
        for n in range(args.processes)
        if (mine := range(n, case.nodes, args.processes))
    ]
    begun = time.monotonic()
    assert not any(ray.get([host.join.remote() for host in hosts]))
    joined_s = time.monotonic() - begun
    process = psutil.Process(ray.get(watch.__ray_call__.remote(lambda self: os.getpid())))
    calls, cpu_s, own_s = _calls(watch), sum(process.cpu_times()[:2]), time.process_time()
    gang = Gang(directory, task, crew, Voice(), lambda: 0, lambda: None)
    reports = [host.report.remote(args.seconds) for host in hosts]
    asked = _lead(gang, args.seconds, reports)
    found, minutes = asked.pop("reports"), args.seconds / 60
    calls, cpu_s = _calls(watch) - calls, sum(process.cpu_times()[:2]) - cpu_s
    own_s = time.process_time() - own_s
    ray.get([host.end.remote() for host in hosts])
    assert len(ray.get(watch.news.remote()).ends) == case.ranks
    for actor in (*hosts, watch):
        ray.kill(actor)
    latencies = [seconds for one in found for seconds in one["latencies_s"]]
    assert calls == len(latencies) + asked["asked"], "somebody else called"
    return {
        "ranks": case.ranks,
        "nodes": case.nodes,
        "steps_per_s": round(min(one["steps"] for one in found) / args.seconds, 1),
        "all_joined_s": round(joined_s, 2),
        "calls_of_nodes_per_min": round(len(latencies) / minutes),
        "calls_of_driver_per_min": round(asked["asked"] / minutes),
        "watch_cpu_s_per_min": round(cpu_s / minutes, 2),
        "driver_cpu_s_per_min": round(own_s / minutes, 2),
        "simulation_cpu_s_per_min": round(sum(one["cpu_s"] for one in found) / minutes, 2),
        "report_ms": _milliseconds(latencies),
        "news_ms": _milliseconds(asked["latencies_s"]),
    }


def _lead(gang: Gang, seconds: float, reports: Sequence[Any]) -> dict[str, Any]:
    """What the driver does while ranks train: it looks often, and asks once in an interval."""
    import ray

    until, latencies = time.monotonic() + seconds, []
    while time.monotonic() < until:
        due, begun = gang._next_news, time.perf_counter()
        gang._hear()
        if gang._next_news != due:
            latencies.append(time.perf_counter() - begun)
        assert gang._hung_since is None and not gang._is_overdue()
        time.sleep(_POLL_S)
    return {"reports": ray.get(reports), "asked": len(latencies), "latencies_s": latencies}


def _calls(watch: Any) -> int:
    import ray

    return ray.get(watch.__ray_call__.remote(lambda self: self.calls))


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=100, method="inclusive")
    found = {"p50": cuts[49], "p99": cuts[98], "most": max(seconds)}
    return {name: round(1e3 * value, 1) for name, value in found.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For people."""
    head = f"{'ranks':>6} {'nodes':>6} {'steps/s':>8} {'calls/min':>10} {'of driver':>10}"
    lines = [head + f" {'watch CPU':>12} {'report p50':>11} {'p99':>8}"]
    for row in rows:
        milliseconds = row["report_ms"]
        lines.append(
            f"{row['ranks']:6} {row['nodes']:6} {row['steps_per_s']:8} "
            f"{row['calls_of_nodes_per_min']:10} {row['calls_of_driver_per_min']:10} "
            f"{row['watch_cpu_s_per_min']:6} s/min {milliseconds['p50']:8} ms "
            f"{milliseconds['p99']:5} ms"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
