"""A dashboard on loopback that answers as Ray's does, without a cluster behind it."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

OPEN = ("/api/authentication_mode", "/api/healthz")
ENDED = ("STOPPED", "SUCCEEDED", "FAILED")


@dataclass
class Request:
    """What was asked, as it came over the wire."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Dashboard:
    """Serves Ray's Jobs API in a thread.

    Attributes:
        token: What it asks for; None: it answers everybody.
        nodes: GPUs, cores and maybe the type of GPU of each node; None: it does not say.
        version: Of Ray.
        starts_as: The status of a new job.
        refuses: A text that new jobs are refused with.
        not_ready: Times that a job is refused because nothing could start it yet.
        loses: The answer to the next job: `break`: the connection breaks when it has started;
            `late`: it breaks before that, and `arrive` starts it; `gateway`: status 504.
        on_stop: Called with a job that is to stop; left out: it stops at once.
        breaks_off: Times that a tail of logs ends before its job does.
        withholds: Characters at the end of a job's logs that a tail does not send.
        jobs: By submission id, as the API shows them.
        output: What each job has printed.
        packages: Uploaded files.
        kept: Those that were asked for before, which keeps them until a job needs them.
        requests: All of them, in order.
    """

    token: str | None = "right-token-0123456789"
    nodes: list[tuple[Any, ...]] | None = field(default_factory=lambda: [(0, 4), (0, 4)])
    version: str = "2.60.0"
    starts_as: str = "RUNNING"
    refuses: str = ""
    not_ready: int = 0
    loses: str = ""
    on_stop: Callable[[dict[str, Any]], None] | None = None
    breaks_off: int = 0
    withholds: int = 0
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    output: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def posted(self) -> list[Request]:
        """The requests that started a job."""
        return [r for r in self.requests if (r.method, r.path) == ("POST", "/api/jobs/")]

    def end(self, job: dict[str, Any], status: str, code: int | None = None) -> None:
        job.update(status=status, driver_exit_code=code, end_time=int(time.time() * 1000))

    def start(self) -> None:
        self._loop, ready = asyncio.new_event_loop(), threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            self._loop.run_until_complete(self._open())
            ready.set()
            self._loop.run_forever()
            self._loop.run_until_complete(self._runner.cleanup())
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        """Close the port, as a head node that goes down."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    async def _open(self) -> None:
        app = web.Application(middlewares=[self._guard], client_max_size=2**28)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/v0/nodes", self._nodes),
                web.get("/api/packages/gcs/{name}", self._ask_package),
                web.put("/api/packages/gcs/{name}", self._package),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{id}", self._get),
                web.post("/api/jobs/{id}/stop", self._stop),
                web.get("/api/jobs/{id}/logs", self._logs),
                web.get("/api/jobs/{id}/logs/tail", self._tail),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.read()
        self.requests.append(Request(request.method, request.path, dict(request.headers), body))
        if self.token is not None and request.path not in OPEN:
            given = request.headers.get("Authorization", "")
            if not given:
                text = "Unauthorized: Missing authentication token"
                return web.Response(status=401, text=text)
            if given != f"Bearer {self.token}":
                return web.Response(status=403, text="Forbidden: Invalid authentication token")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.version})

    async def _nodes(self, request: web.Request) -> web.Response:
        if self.nodes is None:
            return web.json_response({"result": False, "data": {}})
        rows = [
            {
                "node_id": f"{number:056x}",
                "node_name": f"node-{number}",
                "state": "ALIVE",
                "resources_total": {"CPU": float(cores)}
                | ({"GPU": float(gpus)} if gpus else {})
                | {f"accelerator_type:{name}": 1.0 for name in names if name},
            }
            for number, (gpus, cores, *names) in enumerate(self.nodes)
        ]
        rows.append({"node_id": "dead", "state": "DEAD", "resources_total": {"CPU": 64.0}})
        return web.json_response({"result": True, "data": {"result": {"result": rows}}})

    async def _ask_package(self, request: web.Request) -> web.Response:
        uri = f"gcs://{request.match_info['name']}"
        self.kept.add(uri)
        return web.Response(status=200 if uri in self.packages else 404)

    async def _package(self, request: web.Request) -> web.Response:
        self.packages[f"gcs://{request.match_info['name']}"] = await request.read()
        return web.Response()

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if self.not_ready:
            self.not_ready -= 1
            text = "No available agent to submit job, please try again later."
            return web.Response(status=500, text=text)
        loses, self.loses = self.loses, ""
        if loses == "late":
            self._waiting = asked
            return self._break(request)
        if self.refuses or name in self.jobs:
            text = self.refuses or f"Job with submission_id {name} already exists. Please use a"
            trace = f"Traceback (most recent call last):\n  ...\nValueError: {text}\n."
            return web.Response(status=500, text=trace)
        self._begin(asked)
        if loses == "break":
            return self._break(request)
        if loses == "gateway":
            return web.Response(status=504, text="Gateway Time-out")
        return web.json_response({"job_id": name, "submission_id": name})

    def arrive(self) -> None:
        """Start the job whose request was late."""
        self._begin(self._waiting)

    def _break(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _begin(self, asked: dict[str, Any]) -> None:
        name = asked["submission_id"]
        self.jobs[name] = {
            "type": "SUBMISSION",
            "submission_id": name,
            "status": self.starts_as,
            "start_time": int(time.time() * 1000),
            "end_time": None,
            "driver_exit_code": None,
            **asked,
        }
        needed = set(asked["runtime_env"]["py_modules"])
        if not self.kept >= needed <= self.packages.keys():
            message = "runtime_env setup failed: Failed to set up.\n...\nOSError: no package\n"
            self.jobs[name]["message"] = message
            self.output[name] = ""
            self.end(self.jobs[name], "FAILED")
        self.output.setdefault(name, f"Running entrypoint for job {name}\n")

    async def _list(self, request: web.Request) -> web.Response:
        driver = {"type": "DRIVER", "job_id": "01000000", "submission_id": None}
        return web.json_response([*self.jobs.values(), {**driver, "status": "RUNNING"}])

    def _job(self, request: web.Request) -> dict[str, Any]:
        name = request.match_info["id"]
        if name not in self.jobs:
            raise web.HTTPNotFound(text=f"Job {name} does not exist")
        return self.jobs[name]

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(self._job(request))

    async def _stop(self, request: web.Request) -> web.Response:
        job = self._job(request)
        live = job["status"] not in ENDED
        if live and self.on_stop is not None:
            self.on_stop(job)
        elif live:
            self.end(job, "STOPPED")
        return web.json_response({"stopped": live})

    async def _logs(self, request: web.Request) -> web.Response:
        job = self._job(request)
        return web.json_response({"logs": self.output[job["submission_id"]]})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        job = self._job(request)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sent = 0
        while True:
            ended = job["status"] in ENDED
            text = self.output[job["submission_id"]]
            text = text[: max(sent, len(text) - self.withholds)]
            if new := text[sent:]:
                sent += len(new)
                await socket.send_str(new)
            if ended:
                return socket
            if self.breaks_off:
                self.breaks_off -= 1
                return socket
            await asyncio.sleep(0.02)
