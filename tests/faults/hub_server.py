"""A directory in, a hub on the loopback out that serves it as a model repository, well or badly."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40
STALL_SECONDS = 5.0  # longer than the client waits


@dataclass
class Hub:
    """What is served and how.

    Attributes:
        directory: Files of the one repository.
        fault: drop, truncate, stall, damage, status:CODE or status:CODE:ErrorCode; "" for none.
        times: How many requests go wrong; those after them go well.
        only: Only requests whose path holds this go wrong.
        requests: Method and path of what was asked for, in order.
    """

    directory: Path
    fault: str = ""
    times: int = 10**9
    only: str = ""
    requests: list[str] = field(default_factory=list)

    def next_fault(self, method: str, path: str) -> str:
        """The fault for this request."""
        self.requests.append(f"{method} {path}")
        if not self.fault or self.only not in path or self.times <= 0:
            return ""
        self.times -= 1
        return self.fault


@contextmanager
def serving(hub: Hub) -> Iterator[int]:
    """Serves on a free port, which it yields."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            fault = hub.next_fault(self.command, self.path)
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
                return
            if fault.startswith("status:"):
                _, code, *name = fault.split(":")
                self.send(int(code), b"{}", {"X-Error-Code": name[0]} if name else {}, body)
                return
            status, content, headers = self.find()
            if fault in ("truncate", "stall") and body and len(content) > 1:
                self.begin(status, content, headers)
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if fault == "stall":
                    time.sleep(STALL_SECONDS)
                self.close_connection = True
                return
            if fault == "damage" and len(content) > 1:
                content = content[:-1] + bytes([content[-1] ^ 1])  # the headers say what it should have been
            self.send(status, content, headers, body)

        def files(self) -> list[tuple[str, Path]]:
            found = sorted(path for path in hub.directory.rglob("*") if path.is_file())
            return [(path.relative_to(hub.directory).as_posix(), path) for path in found]

        def find(self) -> tuple[int, bytes, dict[str, str]]:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/") and "/tree/" in path:
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": p.stat().st_size,
                        "oid": sha256(p.read_bytes()).hexdigest(),
                    }
                    for name, p in self.files()
                ]
                return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
            if path.startswith("/api/models/"):
                files = [{"rfilename": name, "size": p.stat().st_size} for name, p in self.files()]
                facts = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "private": False, "siblings": files}
                return 200, json.dumps(facts).encode(), {"Content-Type": "application/json"}
            file = hub.directory / path.partition("/resolve/")[2].partition("/")[2]
            if "/resolve/" not in path or not file.is_file():
                return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
            content = file.read_bytes()
            headers = {"ETag": f'"{sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            start = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            if start and int(start):
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return 206, content[int(start) :], headers
            return 200, content, headers

        def begin(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.begin(status, content, headers)
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
