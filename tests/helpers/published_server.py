"""A web server of published files: plain ones, with or without ranges, and the hub's API; it can cut connections.

`root` holds the plain files under their paths. `hub[repository][path]` are the files of the hub's repositories; a
client with the token `TOKEN` adds some.
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_made"


class PublishedServer:
    """Serves on this machine while the block runs. `requests` lists (method, path, first byte) of each.

    `cut_after`: bytes of a content after which the connection is closed; None for never.
    """

    def __init__(self, root: Path, hub: dict[str, dict[str, bytes]] | None = None, *, ranges: bool = True) -> None:
        self.root, self.hub, self.ranges = root, hub or {}, ranges
        self.cut_after: int | None = None
        self.requests: list[tuple[str, str, int]] = []
        self.made: list[dict[str, Any]] = []  # descriptions of the repositories that a client made
        handler = type("Handler", (_Handler,), {"published": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def content(self, path: str) -> bytes | None:
        """Return the file at a path: the hub's `…/resolve/COMMIT/NAME`, or a plain one."""
        place, is_hub, name = path.strip("/").partition(f"/resolve/{COMMIT}/")
        if is_hub:
            return self.hub.get(place.removeprefix("datasets/"), {}).get(name)
        file = self.root / path.strip("/")
        return file.read_bytes() if file.is_file() else None

    def answer(self, path: str) -> Any:
        """Return the hub's answer to a question of its API; None for another path."""
        words = path.strip("/").split("/")
        if words[0] != "api" or "/".join(words[2:4]) not in self.hub:
            return None
        files = self.hub["/".join(words[2:4])]
        if "tree" in words:
            return [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": _lfs(data)}
                for name, data in files.items()
            ]
        siblings = [{"rfilename": name, "size": len(data), "lfs": _lfs(data)} for name, data in files.items()]
        return {"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def upload(self, path: str, body: bytes) -> Any:
        """Return the hub's answer to a part of an upload: a new repository, ways of upload, a commit."""
        words = path.strip("/").split("/")
        if words[1:] == ["repos", "create"]:
            self.made.append(json.loads(body))
            name = "/".join([self.made[-1]["organization"], self.made[-1]["name"]])
            self.hub.setdefault(name, {})
            return {"url": f"{self.url}/{name}"}
        if words[1:] == ["validate-yaml"]:
            return {"errors": [], "warnings": []}
        repository = "/".join(words[2:4])
        if words[4] == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.hub[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"success": True, "commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}


def _lfs(data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {"oid": digest, "sha256": digest, "size": len(data), "pointerSize": 100}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    published: PublishedServer

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        begin = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
        start = int(begin) if self.published.ranges else 0
        self.published.requests.append((self.command, path, start))
        answer = self.published.answer(path)
        if answer is not None:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        data = self.published.content(path)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start = start if self.headers.get("If-Range", etag) == etag else 0
        fields = {"ETag": etag, "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(data)), "X-Linked-Etag": etag}
        if start >= len(data) > 0:
            self._send(416, b"", {})
            return
        if "Range" in self.headers and self.published.ranges and start:
            fields["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206, data[start:], fields)
            return
        self._send(200, data, fields)

    do_GET = do_HEAD = _serve  # noqa: N815 - names of http.server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        self.published.requests.append(("POST", path, 0))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(403, b'{"error": "no rights"}', {"Content-Type": "application/json"})
            return
        self._send(200, json.dumps(self.published.upload(path, body)).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, fields: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in fields.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.published.cut_after if "ETag" in fields else None
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None and cut < len(data):
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has given up
            self.close_connection = True
