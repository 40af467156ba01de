"""File servers on 127.0.0.1 that log what they are asked and misbehave on demand."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Log(list):
    """Requests as ``"METHOD path first-end"``, and the faults that the next GETs of parts meet.

    A fault is a status, ``"reset"`` (the connection ends inside the body), ``"short"`` (fewer bytes than asked for, as
    if they were all), ``"slow"`` (no answer for two seconds).
    """

    def __init__(self):
        super().__init__()
        self.faults = []
        self.bytes = 0

    def parts(self):
        return [entry for entry in self if re.search(r" \d+-\d+$", entry)]

    def empty(self):
        self.clear()
        self.bytes = 0

    def note(self, method, path, part):
        match = RANGE.fullmatch(part or "")
        self.append(f"{method} {path}" + (f" {match[1]}-{int(match[2]) + 1}" if match else ""))
        if match:
            self.bytes += int(match[2]) + 1 - int(match[1])
        return self.faults.pop(0) if self.faults and match and method == "GET" else None


@contextmanager
def s3_server(log):
    """A moto server behind a log; gives its address."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    moto = DomainDispatcherApplication(create_backend_app)

    def app(environ, start_response):
        path = environ["PATH_INFO"] + ("?list" if "list-type" in environ.get("QUERY_STRING", "") else "")
        fault = log.note(environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE"))
        if isinstance(fault, tuple):
            status, code = fault
            start_response(f"{status} no", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>as ordered</Message></Error>".encode()]
        if fault == "slow":
            time.sleep(2)
        body = moto(environ, start_response)
        return _broken(body) if fault == "reset" else body

    def _broken(body):
        content = b"".join(body)
        yield content[: len(content) // 2]
        raise ConnectionResetError

    server = make_server("127.0.0.1", 0, app, threaded=True)
    yield from _served(server, f"http://127.0.0.1:{server.server_port}")


@contextmanager
def web_server(folder, log, ranges=True):
    """A plain web server for a folder; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = self.path.partition("?")[0]
            fault = log.note("GET", path, self.headers.get("Range"))
            if fault == "slow":
                time.sleep(2)
            file = Path(folder) / path.lstrip("/")
            if isinstance(fault, int) or not file.is_file():
                self.send_error(fault if isinstance(fault, int) else 404)
                return
            content = file.read_bytes()
            match = RANGE.fullmatch(self.headers.get("Range") or "") if ranges else None
            first, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(content))
            part = content[first:end]
            if match and not part:
                self.send_error(416)
                return
            if fault == "short":
                part = part[: len(part) // 2]
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
            self.end_headers()
            if fault == "reset":
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
                return
            self.wfile.write(part)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that no longer waits
    yield from _served(server, f"http://127.0.0.1:{server.server_port}")


def _served(server, address):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def numbered(n, size=700):
    """Samples whose content says who they are."""
    return [(f"clip/{i:03d}", {"json": json.dumps({"n": i}), "mp4": bytes([i]) * size}) for i in range(n)]
