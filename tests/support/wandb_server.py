"""A stand-in for W&B's server on loopback: it keeps the history of runs as it is sent."""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """Serves until it is closed; `url` is where."""

    def __init__(self) -> None:
        self.histories: dict[str, dict[int, dict[str, Any]]] = {}
        """The rows of each run by their place, as sent last."""
        keeper = self

        class Handler(_Handler):
            server_of = keeper

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """End."""
        self._server.shutdown()
        self._server.server_close()

    def told(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The answer to an operation of GraphQL."""
        project = {"id": "p", "name": "tiny", "entity": {"id": "e", "name": "me"}}
        name = str(given.get("name"))
        rows = self.histories.get(name)
        about = {"id": "b", "name": name, "displayName": name, "config": "{}",
                 "historyLineCount": len(rows or {})}  # fmt: skip
        if operation == "RunResumeStatus":
            last = json.dumps([json.dumps(rows[max(rows)])] if rows else [])
            more = {"summaryMetrics": "{}", "logLineCount": 0, "eventsLineCount": 0, "tags": [],
                    "historyTail": last, "eventsTail": "[]",
                    "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
            return {"model": {**project, "bucket": None if rows is None else about | more}}
        if operation == "UpsertBucket":
            self.histories.setdefault(name, {})
            bucket = {**about, "description": None, "sweepName": None, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": rows is None}}
        if operation == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}",
                           "teams": {"edges": []}}}  # fmt: skip

    def streamed(self, name: str, history: dict[str, Any]) -> None:
        """Rows that were sent for a place on."""
        for place, line in enumerate(history["content"], history["offset"]):
            self.histories[name][place] = json.loads(line)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: WandbServer

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def do_POST(self) -> None:
        given = json.loads(self._body())
        if self.path.endswith("/file_stream"):
            history = (given.get("files") or {}).get("wandb-history.jsonl")
            if history:
                self.server_of.streamed(self.path.split("/")[-2], history)
            self._reply({"limits": {}})
            return
        found = re.search(r"(?:query|mutation)\s+(\w+)", given["query"])
        operation = found[1] if found else ""
        self._reply({"data": self.server_of.told(operation, given.get("variables") or {})})

    def _body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("content-length") or 0))
        packed = self.headers.get("content-encoding") == "gzip"
        return gzip.decompress(content) if packed else content

    def _reply(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
