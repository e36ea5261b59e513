"""Jobs: what a cluster can be asked through Ray's Jobs API, spoken directly over HTTP.

Ray's own client takes seconds to import, and goes to the address in RAY_ADDRESS whatever it is
given.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ..errors import ClusterError
from ..redact import redact_text
from .clusters import Cluster
from .door import Answer, Door, NoAnswer

LIVE = ("PENDING", "RUNNING")
RUN_KEY, SETTINGS_KEY = "longspan_run", "longspan_settings"
"""Keys of a job's metadata: the run's id, and `settings_hash` of its recipe."""

_SHOWN = 300
_TYPE = "accelerator_type:"
_GATEWAY = (502, 503, 504)
_NOT_READY = "No available agent"
_READY_S = 60.0
_POLL_S = 1.0
_OLDEST = (2, 52)  # the first with tokens


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        id: The submission's id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: What Ray says about it.
        exit_code: Of the driver, once it has ended by itself.
        started: In unix seconds.
        ended: In unix seconds.
        metadata: What it was submitted with.
    """

    id: str
    status: str
    message: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def is_live(self) -> bool:
        """Whether it has not ended."""
        return self.status in LIVE

    @property
    def trouble(self) -> str:
        """Why Ray could not start its driver, or lost it; empty for a driver that ended."""
        if self.status != "FAILED" or self.exit_code is not None:
            return ""
        lines = [line.strip() for line in redact_text(self.message).splitlines() if line.strip()]
        return " ... ".join(line[:_SHOWN] for line in dict.fromkeys([*lines[:1], *lines[-1:]]))

    @property
    def run(self) -> str | None:
        """The id of the run that it works on."""
        return (self.metadata or {}).get(RUN_KEY)


@dataclass(frozen=True)
class Node:
    """A node that is up.

    Attributes:
        name: As people know it.
        gpus: Its GPUs.
        cores: Its CPU cores.
        gpu_name: Of its GPUs, such as H100; empty where Ray does not say.
    """

    name: str
    gpus: int
    cores: int
    gpu_name: str = ""


class Jobs:
    """The jobs of one cluster.

    Args:
        cluster: Which one.
        timeout_s: How long an answer may take; left out: 30.

    Raises:
        ClusterError: From here on, for everything that a cluster cannot or does not want to do.
    """

    def __init__(self, cluster: Cluster, timeout_s: float | None = None) -> None:
        self.cluster = cluster
        self.door = Door(cluster) if timeout_s is None else Door(cluster, timeout_s)

    def check(self, *, insecure: bool = False) -> list[str]:
        """See that the cluster answers, that it takes our token and that it asks for one.

        Args:
            insecure: Take a cluster that asks for none: whoever reaches it can run anything there.

        Returns:
            Warnings.
        """
        version = self._value(self.door.ask("GET", "/api/version"), "its version")
        found = str(version.get("ray_version", "")) if isinstance(version, dict) else ""
        numbers = [int(part) for part in found.split(".")[:2] if part.isdigit()]
        if len(numbers) < 2:
            what = f"cluster {self.cluster.name}: what answers at {self.door.address} is not Ray"
            raise ClusterError(what, "the dashboard's port is 8265 where nothing else was chosen")
        if tuple(numbers) < _OLDEST:
            least = ".".join(map(str, _OLDEST))
            what = f"cluster {self.cluster.name} runs Ray {found}, which is older than {least}"
            raise ClusterError(what, "update Ray on the cluster")
        warnings = []
        if self.door.ask("GET", "/api/version", token=False, raw=True).status == 200:
            what = f"cluster {self.cluster.name} asks for no token: whoever reaches "
            what += f"{self.door.address} can run anything on it"
            if not insecure:
                raise ClusterError(
                    what,
                    "start it with RAY_AUTH_MODE=token (`ray get-auth-token --generate` makes a "
                    "token), or add --insecure where nobody else can reach it",
                )
            warnings.append(what)
        if self.door.shows_token:
            warnings.append(
                f"the token goes to {self.door.address} unencrypted; a tunnel or https hides it"
            )
        return warnings

    def nodes(self) -> list[Node]:
        """The nodes that are up."""
        answer = self.door.ask("GET", "/api/v0/nodes?limit=10000")
        value = self._value(answer, "its nodes")
        try:
            rows = value["data"]["result"]["result"]
            alive = [row for row in rows if row["state"] == "ALIVE"]
            return [_node(row) for row in alive]
        except (KeyError, TypeError, ValueError):
            what = f"cluster {self.cluster.name} does not say which nodes it has"
            fix = f"write nodes: {{count: ..., gpus: ...}} for {self.cluster.name} in clusters.yaml"
            raise ClusterError(what, fix) from None

    def get(self, submission: str) -> Job | None:
        """A job; None for one that the cluster does not know (any more)."""
        answer = self.door.ask("GET", f"/api/jobs/{quote(submission)}")
        return None if answer.status == 404 else _job(self._value(answer, f"job {submission}"))

    def all(self) -> list[Job]:
        """The jobs that were submitted, of everybody."""
        rows = self._value(self.door.ask("GET", "/api/jobs/"), "its jobs")
        found = [_job(row) for row in rows if isinstance(row, dict)]
        return [job for job in found if job.id]

    def of_run(self, run_id: str) -> list[Job]:
        """The jobs of a run, the oldest first."""
        mine = [job for job in self.all() if job.run == run_id]
        return sorted(mine, key=lambda job: (number_of(job.id), job.id))

    def upload(self, content: bytes) -> str:
        """Give the cluster a zip file to unpack on its nodes.

        Returns:
            Its address inside of the cluster. Equal contents have equal addresses.
        """
        name = f"_ray_pkg_{hashlib.sha256(content).hexdigest()[:32]}.zip"
        path = f"/api/packages/gcs/{name}"
        # To ask for it also keeps it for some minutes, until a job needs it.
        if self.door.ask("GET", path).status != 200:
            answer = self.door.ask("PUT", path, content)
            if answer.status != 200:
                raise self._cannot("take the code", answer)
        return f"gcs://{name}"

    def submit(
        self,
        submission: str,
        entrypoint: str,
        *,
        code: Sequence[str],
        variables: Mapping[str, str],
        metadata: Mapping[str, str],
    ) -> bool:
        """Start a job.

        Args:
            submission: Its id.
            entrypoint: The driver's command line.
            code: Uploaded packages for the Python path.
            variables: Of the driver's environment; anybody on the cluster can read them.
            metadata: Kept with the job.

        Returns:
            False when the cluster has a job of this id already.
        """
        environment = {"py_modules": list(code), "env_vars": dict(variables)}
        request = {
            "submission_id": submission,
            "entrypoint": entrypoint,
            "runtime_env": environment,
            "metadata": dict(metadata),
        }
        deadline = time.monotonic() + _READY_S
        while (answer := self.door.ask("POST", "/api/jobs/", request)).status != 200:
            text = answer.body.decode("utf-8", "replace")
            if "already exists" in text:
                return False
            if answer.status in _GATEWAY:
                what = f"cluster {self.cluster.name}: HTTP status {answer.status} from in between"
                raise NoAnswer(what, "ask again when the dashboard answers")
            # A head that has just started: its dashboard is up, and what starts jobs is not yet.
            if _NOT_READY not in text or time.monotonic() > deadline:
                raise self._cannot(f"start {submission}", answer)
            time.sleep(_POLL_S)
        return True

    def stop(self, submission: str) -> bool:
        """Send SIGTERM to a job's driver; whether it was there to get it."""
        answer = self.door.ask("POST", f"/api/jobs/{quote(submission)}/stop")
        if answer.status == 404:
            return False
        value = self._value(answer, f"the stop of {submission}")
        return bool(value.get("stopped"))

    def logs(self, submission: str) -> str:
        """All that a job's driver has printed; empty before it has begun."""
        answer = self.door.ask("GET", f"/api/jobs/{quote(submission)}/logs")
        value = self._value(answer, f"the logs of {submission}")
        return str(value.get("logs") or "")

    def follow(self, submission: str) -> Iterator[str]:
        """What a job's driver prints, from its beginning until the job ends."""
        loop = asyncio.new_event_loop()
        parts = self._tail(submission)
        try:
            while True:
                try:
                    yield loop.run_until_complete(anext(parts))
                except StopAsyncIteration:
                    return
        finally:
            loop.run_until_complete(parts.aclose())
            loop.close()

    async def _tail(self, submission: str) -> AsyncGenerator[str, None]:
        import aiohttp

        url = f"{self.door.address}/api/jobs/{quote(submission)}/logs/tail"
        try:
            async with (
                aiohttp.ClientSession(headers=self.door.headers) as session,
                session.ws_connect(url, heartbeat=30, max_msg_size=0) as socket,
            ):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        yield message.data
        except (aiohttp.ClientError, OSError) as error:
            reason = getattr(error, "message", None) or str(error) or type(error).__name__
            what = f"cluster {self.cluster.name}: the logs of {submission} broke off: {reason}"
            raise ClusterError(what, "ask again; the run goes on by itself") from None

    def _value(self, answer: Answer, what: str) -> Any:
        value = answer.value()
        if answer.status == 200 and value is not None:
            return value
        raise self._cannot(f"show {what}", answer)

    def _cannot(self, what: str, answer: Answer) -> ClusterError:
        reason = f"cluster {self.cluster.name} cannot {what}: {answer.last_line()}"
        fix = "the logs of its dashboard say more"
        if answer.status == 404:
            fix = f"is {self.door.address} the address of a Ray dashboard?"
        return ClusterError(reason, fix)


def number_of(submission: str) -> int:
    """N of a submission `RUN-N`; 0 for another name."""
    last = submission.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def _job(row: Mapping[str, Any]) -> Job:
    def seconds(key: str) -> float | None:
        return row[key] / 1000 if row.get(key) else None

    return Job(
        id=str(row.get("submission_id") or ""),
        status=str(row.get("status")),
        message=str(row.get("message") or ""),
        exit_code=row.get("driver_exit_code"),
        started=seconds("start_time"),
        ended=seconds("end_time"),
        metadata=row.get("metadata") or {},
    )


def _node(row: Mapping[str, Any]) -> Node:
    has = row.get("resources_total") or {}
    name = str(row.get("node_name") or row.get("node_ip") or row["node_id"])
    types = [key.removeprefix(_TYPE) for key in has if key.startswith(_TYPE)]
    return Node(name, int(has.get("GPU", 0)), int(has.get("CPU", 0)), "".join(types[:1]))
