"""A proxy before a server that refuses requests, loses answers, or sends them byte by byte."""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

# "pass", "lose" (the server acts, its answer is lost), "drip" (five bytes a second), "hang", "endless" (bytes without
# end), or a status such as "503"
Rule = Callable[[str, str], str]


class FaultyProxy:
    """Forwards to a port on this machine, with a fault where `rule(method, path)` names one. A context manager."""

    def __init__(self, port: int, rule: Rule = lambda method, path: "pass") -> None:
        self.rule, self.faults, self.closing = rule, 0, threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self, "port": port})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    def fault_of(self, method: str, path: str) -> str:
        """Return the fault of a request, and count it; one request at a time, as rules may count too."""
        with self._lock:
            fault = self.rule(method, path)
            self.faults += fault != "pass"
            return fault

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy
    port: int

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.fault_of(self.command, self.path)
        if fault.isdigit():
            self._answer(int(fault), b"refused by the proxy", [])
            return
        if fault == "hang":
            self.proxy.closing.wait(60)
            self.close_connection = True
            return
        if fault == "endless":
            self.send_response(200)
            self.end_headers()
            while not self.proxy.closing.wait(0.01):
                self.wfile.write(bytes(1 << 20))
            self.close_connection = True
            return
        backend = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "transfer-encoding"}
        backend.request(self.command, self.path, body, headers)
        answer = backend.getresponse()
        data = answer.read()
        backend.close()
        if fault == "lose":
            self.close_connection = True
            return
        self._answer(answer.status, data, answer.getheaders(), is_slow=fault == "drip")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _forward  # noqa: N815 - names of http.server

    def _answer(self, status: int, data: bytes, headers: list[tuple[str, str]], *, is_slow: bool = False) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        for part in [data[at : at + 1] for at in range(len(data))] if is_slow else [data]:
            self.wfile.write(part)
            if is_slow and self.proxy.closing.wait(0.2):
                self.close_connection = True
                return

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has given up
            self.close_connection = True
