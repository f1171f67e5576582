"""Urls and paths: the only protocols that are opened, and the paths that files of a data set may name.

A url that the code receives (setting, argument, column of a request) passes `check_url`. A name that a file contains
(manifest, commit, tag) passes `inner_path`, so it stays below the folder of that file.
"""

import os
import re

from avcil_dist.errors import ConfigError, DataError, StorageError
from avcil_dist.text.redaction import has_secret

LOCAL, MEMORY = "file", "memory"
WITH_BUCKETS = ("s3", "gs", "gcs", "az", "abfs")
PROTOCOLS = (LOCAL, *WITH_BUCKETS, MEMORY)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def check_url(url: str) -> str:
    """Return `url`, a path or a url of one of PROTOCOLS. Raises ConfigError for any other, and for one with a secret.

    fsspec has many more protocols. Some of them run commands, send requests that a file describes, or open other
    urls, so a list of those that are allowed is the only safe one.
    """
    if not url:
        raise ConfigError("an empty path; name a file or a folder")
    if CONTROL.search(url):
        raise ConfigError(f"{url!r}: a control character in a path; give it without")
    if url.startswith("pipe:"):
        raise ConfigError(f"{url}: pipe urls run shell commands and are refused; give a path or a url ({_allowed()})")
    if "::" in url:
        raise ConfigError(f"{url}: `::` opens one url inside another and is refused; name the file itself")
    protocol, is_url, path = url.partition("://")
    if not is_url:
        return url
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{url}: the protocol {protocol} is not allowed; give a path or a url ({_allowed()})")
    if protocol in WITH_BUCKETS:
        if has_secret(url):
            raise ConfigError(f"{url}: no secret belongs in a url; set the credentials in the environment")
        if not path.split("/")[0]:
            raise ConfigError(f"{url}: the name of the bucket is missing")
        if not path.isprintable():  # a path that is no Unicode, such as a name of a local file in another encoding
            raise ConfigError(f"{url!r}: not a url; give it in UTF-8")
    return url


def split_url(url: str) -> tuple[str, str]:
    """Return protocol and path of a url that `check_url` accepts; local paths are absolute. `~` has no meaning here."""
    protocol, is_url, path = check_url(url).partition("://")
    if not is_url:
        protocol, path = LOCAL, url
    if protocol == LOCAL:
        path = path if path.startswith("/") else f"{_working_folder()}/{path}"
        return LOCAL, path.rstrip("/") or "/"
    return protocol, path


def is_inner(path: str) -> bool:
    """Whether `path` is a plain relative path: it cannot leave the folder that it is joined to."""
    is_plain = not CONTROL.search(path) and "::" not in path and "://" not in path and not path.startswith("pipe:")
    return is_plain and all(part not in ("", ".", "..") for part in path.split("/"))


def inner_path(path: str) -> str:
    """Return `path`, a plain relative path below the folder of the file that names it. Raises DataError otherwise."""
    if not is_inner(path):
        raise DataError(f"{path!r}: not a plain path below the folder of the file that names it")
    return path


def join(root: str, *parts: str) -> str:
    """Return `root/part/part`. Raises DataError for a part that `inner_path` refuses: nothing leaves its folder."""
    joined = root
    for part in parts:
        joined = f"{joined.rstrip('/')}/{inner_path(part)}"
    return joined


def parent(url: str) -> str:
    """Return the folder of `url`; `.` for a bare file name."""
    return url.rsplit("/", 1)[0] if "/" in url else "."


def path_below(url: str, folder: str) -> str | None:
    """Return the path of `url` relative to `folder`, or None if it is not below it."""
    (protocol, path), (of_folder, root) = split_url(url), split_url(folder)
    if protocol == LOCAL:
        path, root = os.path.normpath(path), os.path.normpath(root)
    prefix = f"{root.rstrip('/')}/"
    return path.removeprefix(prefix) if protocol == of_folder and path.startswith(prefix) else None


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - called for every read of a relative path; a Path costs ten times more
    except FileNotFoundError:
        raise StorageError("the working folder was removed; change to one that exists") from None


def _allowed() -> str:
    return ", ".join(f"{protocol}://" for protocol in PROTOCOLS)
