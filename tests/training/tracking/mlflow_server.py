"""A real MLflow server on this machine, and one that only fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlflow.tracking import MlflowClient


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """`mlflow server` with its database and artifacts in a folder; ended with all its workers by `kill`."""

    def __init__(self, folder: Path, backend: str | None = None) -> None:
        self.folder = folder
        self.backend = backend or f"sqlite:///{folder}/server.db"
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self, wait: bool = True) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", self.backend,
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )
        if wait:
            self.wait()

    def wait(self, seconds: float = 240) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < until, "the server does not come up"
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)


class Failing:
    """Answers every request with 500, on a port."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(self.path)
                body = b'{"error_code": "INTERNAL_ERROR", "message": "no"}'
                self.send_response(500)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        self._server = self._bound(port, Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def _bound(port: int, handler: type[BaseHTTPRequestHandler], seconds: float = 20) -> ThreadingHTTPServer:
        until = time.monotonic() + seconds
        while True:
            try:
                return ThreadingHTTPServer(("127.0.0.1", port), handler)
            except OSError:  # a server that was killed lets go of its port when its last process is gone
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
