"""Hypothesis strategies that damage files: bytes, JSON documents, text."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

POSITIONS = st.integers(0, 1 << 20)
PIECES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [
            *(b"\0", b"\xff" * 8, b"\n", b'"', b"'", b"{", b"[" * 300, b"]", b",", b"\\", b"\xc3\x28", b"\xed\xa0\x80"),
            *(
                b"9" * 30,
                b"-1",
                b"1e999",
                b"NaN",
                b"\x1b[2J",
                b"../../",
                b"/etc/passwd",
                b"~",
                b"::",
                b"pipe:id",
                b"&a *a",
            ),
            *(
                b"\xef\xbb\xbf",
                "²".encode(),
                "\u202e".encode(),
                b"\r",
                b"\x7f",
                b"%s",
                b"${HOME}",
                b"\x80\x04",
                b"\x85" * 50,
            ),
        ]
    ),
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "repeat", "swap"]), POSITIONS, POSITIONS, PIECES),
    min_size=1,
    max_size=3,
)
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
VALUES = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2, 1 << 31, 1 << 53, 1 << 63, -(1 << 63), 1 << 80, 1e308, -0.0, 0.5),
            *(
                float("nan"),
                float("inf"),
                "",
                "x",
                "0",
                "../x",
                "/etc/passwd",
                "a/../../b",
                "reference://k::http://x/y",
            ),
            *(
                "s3://KEY:SECRET@b/x",
                "file:///etc/passwd",
                "\x1b[2J",
                "a\nb",
                "a\0b",
                "é" * 5000,
                "\ud800",
                "train",
                "clip",
            ),
            *([], {}, [[]], [None], {"": ""}, {"a": {"b": []}}, [0] * 1000, "0" * 64, DEEP),
        ]
    ),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=8),
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "delete", "copy", "rename"]), POSITIONS, POSITIONS, VALUES),
    min_size=1,
    max_size=2,
)


def damaged(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    """Return the bytes after the edits."""
    for kind, first, second, piece in edits:
        place = first % (len(data) + 1)
        length = second % 64 if second % 3 else second % (len(data) + 1)
        if kind == "set":
            data = data[:place] + piece + data[place + len(piece) :]
        elif kind == "insert":
            data = data[:place] + piece + data[place:]
        elif kind == "delete":
            data = data[:place] + data[place + length :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "repeat":
            data = data[:place] + data[place : place + length] * 3 + data[place:]
        else:
            other = second % (len(data) + 1)
            data = data[:place] + data[other : other + 16] + data[place + 16 :]
    return data


def changed(document: Any, changes: list[tuple[str, int, int, Any]]) -> Any:
    """Return the document after the changes, each of a node in it."""
    document = copy.deepcopy(document)
    for kind, first, second, value in changes:
        nodes = list(_places(document))
        if not nodes:
            return copy.deepcopy(value)
        parent, key = nodes[first % len(nodes)]
        if kind == "set":
            parent[key] = copy.deepcopy(value)
        elif kind == "delete":
            del parent[key]
        elif kind == "copy":
            other, other_key = nodes[second % len(nodes)]
            parent[key] = copy.deepcopy(other[other_key])
        elif isinstance(parent, dict):
            parent[str(value)[:100]] = parent.pop(key)
        else:
            parent.insert(key, copy.deepcopy(value))
    return document


def to_json(document: Any) -> bytes:
    """Return the document as JSON, with numbers and characters that JSON does not have."""
    return json.dumps(document).encode()


def _places(node: Any) -> Any:
    """Yield each node below `node`, as its parent and its key."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])
