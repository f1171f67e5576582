"""Urls: allowed protocols, paths inside a folder."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist import storage
from avcil_dist.errors import AvcilError, ConfigError, DataError
from avcil_dist.storage.urls import PROTOCOLS, split_url


@pytest.mark.parametrize(
    "url",
    ["runs", "/data/x.tar", "a:b/c.tar", "~/x", "what?v=1", "file:///data/x", "s3://bucket/x y.tar", "gs://b/x",
     "gcs://b/x", "az://c/x", "abfs://container@account/x", "memory://x", "s3://b/名", "/data/\udce9.mp4", "."],
)  # fmt: skip
def test_paths_and_urls_of_the_allowed_protocols_pass(url: str) -> None:
    assert storage.check_url(url) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty path"),
        ("a\nb", "control character"),
        ("x\0y", "control character"),
        ("s3://b/\x1b[2J", "control character"),
        ("pipe:cat x", "pipe urls run shell commands"),
        ("reference://k", "protocol reference is not allowed"),
        ("reference://k::http://127.0.0.1/e.json", "opens one url inside another"),
        ("simplecache::s3://b/x", "opens one url inside another"),
        ("reference::/data/x.json", "opens one url inside another"),
        ("http://host/x", "protocol http is not allowed"),
        ("https://host/x", "protocol https is not allowed"),
        ("zip://x.zip", "protocol zip is not allowed"),
        ("github://owner:name@/x", "protocol github is not allowed"),
        ("ftp://host/x", "protocol ftp is not allowed"),
        ("local://x", "protocol local is not allowed"),
        ("S3://b/x", "protocol S3 is not allowed"),
        ("data://x", "protocol data is not allowed"),
        ("s3:///x", "bucket is missing"),
        ("s3://KEY:SECRET@b/x", "no secret belongs in a url"),
        ("s3://b/x?X-Amz-Signature=abc", "no secret belongs in a url"),
        ("s3://b/\udce9.mp4", "not a url"),
    ],
)
def test_other_urls_are_refused_by_every_function(url: str, message: str) -> None:
    for use in (storage.check_url, storage.open_filesystem, storage.read_bytes, storage.exists, storage.size,
                storage.local_path, storage.list_folder, storage.remove_tree):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            use(url)
        assert "\n" not in str(caught.value)
        assert "SECRET" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        storage.write_bytes(url, b"x")


@pytest.mark.parametrize(
    "part",
    ["", "/data/c.tar", "s3://bucket/c.tar", "../x", "a/../../x", "a/..", ".", "a//b", "a/", "x\0", "a\nb",
     "reference::x", "pipe:cat x", "http://h/x"],
)  # fmt: skip
def test_what_is_no_plain_path_below_its_folder_is_refused(part: str) -> None:
    for use in (storage.inner_path, lambda path: storage.join("runs", path)):
        with pytest.raises(DataError, match="not a plain path below the folder"):
            use(part)


@pytest.mark.parametrize("part", ["x.tar", "train/c0.tar", "..x", "a:b", "名", "~", "what?v=1", ".lock"])
def test_plain_names_are_inner_paths(part: str) -> None:
    assert storage.inner_path(part) == part


@pytest.mark.parametrize(
    ("url", "folder", "path"),
    [
        ("/data/a/x.tar", "/data", "a/x.tar"),
        ("file:///data/a/x.tar", "/data/", "a/x.tar"),
        ("data/./x.tar", "data", "x.tar"),
        ("x.tar", ".", "x.tar"),
        ("s3://b/d/x.tar", "s3://b/d", "d/x.tar"[2:]),
        ("/database/x.tar", "/data", None),
        ("/data/../x.tar", "/data", None),
        ("s3://b/x.tar", "/data", None),
        ("/b/x.tar", "s3://b", None),
    ],
)
def test_the_path_of_a_url_below_a_folder(url: str, folder: str, path: str | None) -> None:
    assert storage.path_below(url, folder) == path


def test_local_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_url("a/b/") == ("file", f"{tmp_path}/a/b")
    assert split_url("file:///a") == ("file", "/a")
    assert split_url("s3://b/x") == ("s3", "b/x")


def test_a_crafted_reference_sends_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    host = f"http://127.0.0.1:{server.server_port}"
    template = "{{t.__globals__[os].environ[AWS_SECRET_ACCESS_KEY]}}"
    (tmp_path / "e.json").write_text(
        json.dumps({"version": 1, "templates": {"u": f"{host}/"}, "refs": {"k": [f"{{{{u}}}}{template}", 0, 3]}})
    )
    try:
        for url in (f"reference://k::file://{tmp_path}/e.json", f"reference://k::{host}/e.json", f"{host}/x"):
            for use in (storage.read_bytes, storage.size, storage.exists):
                with pytest.raises(AvcilError):
                    use(url)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert requests == []


PIECES = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "//",
        "a",
        "é",
        "\\",
        "\0",
        "\n",
        "~",
        ":",
        "::",
        "://",
        "s3://b",
        "file:",
        "pipe:",
        "reference::",
        "%2e",
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_no_accepted_name_leaves_its_folder(name: str) -> None:
    try:
        joined = storage.join("/data/set", name)
    except DataError:
        return
    assert os.path.normpath(joined).startswith("/data/set/")
    assert storage.local_path(joined) == joined
    assert storage.path_below(joined, "/data/set") == name


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_any_url_is_local_of_an_allowed_protocol_or_refused(url: str) -> None:
    try:
        protocol, path = split_url(url)
    except ConfigError:
        return
    assert protocol in PROTOCOLS
    assert path.startswith("/") or protocol != "file"
