"""Files by http or https, as a source of a download: the only place where these protocols are opened."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import avcil_dist
from avcil_dist.errors import ConfigError, DataError, StorageError
from avcil_dist.storage.urls import CONTROL
from avcil_dist.text.redaction import has_secret
from data_shards.downloads.transfer import CutError, Opened

TIMEOUT_SECONDS = 30.0  # of a silent connection
READ_BYTES = 1 << 20
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
PROTOCOLS = ("http", "https")


def is_http(url: str) -> bool:
    """Whether the url is one of http or https."""
    return url.partition("://")[0] in PROTOCOLS


def check_http_url(url: str) -> str:
    """Return the url. Raises ConfigError for one without a host, with a control character, or with a secret."""
    if has_secret(url):
        raise ConfigError(f"{url}: no secret belongs in a url; use a mirror that needs none, or a folder")
    if CONTROL.search(url) or " " in url or not urlsplit(url).hostname:
        raise ConfigError(f"{url!r}: not a url of http or https")
    return url


class HttpSource:
    """A file by url. Redirects are followed within http and https, never from https to http."""

    def __init__(self, url: str) -> None:
        self.name = check_http_url(url)

    def size(self) -> int | None:
        """Size in bytes; None where the server does not send it. Raises DataError for a missing file."""
        return self._head()[0]

    def open(self, start: int, version: str) -> Opened:
        """Open the file at byte `start`, or at 0 where the server has no ranges or has another version by now."""
        headers = {"Range": f"bytes={start}-", **({"If-Range": version} if version else {})} if start else {}
        response = self._request("GET", headers)
        if response is None:  # the file has no byte `start`: it is here as a whole, or is another one by now
            if self._head() == (start, version):
                return Opened(start, start, version, iter(()))
            response = self._request("GET", {})
        length = _number(response.headers.get("Content-Length"))
        begin = start if response.status == http.client.PARTIAL_CONTENT else 0
        return Opened(begin, None if length is None else begin + length, _version(response), _blocks(response))

    def _head(self) -> tuple[int | None, str]:
        """Return size and version, None and "" where the server does not send them."""
        try:
            with self._request("HEAD", {}) as response:
                return _number(response.headers.get("Content-Length")), _version(response)
        except (CutError, StorageError):  # some servers refuse this request alone; the download has the last word
            return None, ""

    def _request(self, method: str, headers: dict[str, str]) -> Any:
        """Return the response; None where the file ends before the range of the headers."""
        agent = {"User-Agent": f"avcil-dist/{avcil_dist.__version__}", "Accept-Encoding": "identity"}
        request = urllib.request.Request(self.name, method=method, headers=agent | headers)  # noqa: S310 - checked
        try:
            return _OPENER.open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and "Range" in headers:
                return None
            raise _refusal(self.name, error) from None
        except (OSError, http.client.HTTPException) as error:
            raise CutError(_text(error)) from None


def _version(response: Any) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _blocks(response: Any) -> Iterator[bytes]:
    with response:
        while True:
            try:
                block = response.read(READ_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise CutError(_text(error)) from None
            if not block:
                return
            yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not is_http(newurl) or (req.full_url.startswith("https://") and not newurl.startswith("https://")):
            raise StorageError(f"{req.full_url}: redirected to {newurl}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener of http and https alone; it honours the proxies of the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


_OPENER = _opener()


def _refusal(url: str, error: urllib.error.HTTPError) -> Exception:
    if error.code in TRANSIENT_STATUS:
        return CutError(f"HTTP {error.code} {error.reason}")
    if error.code in (404, 410):
        return DataError(f"{url}: missing (HTTP {error.code}); check the url, or give a mirror with --from")
    return StorageError(f"{url}: refused (HTTP {error.code} {error.reason}); give a mirror with --from")


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _text(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
