"""Bound on the size of MLflow's answers: a server that lies, or a page that never ends, does not fill the memory.

MLflow reads each answer whole. Its requests all pass one function, which gets a hook here that reads the answer itself.
Downloads of artifacts are streamed to files, and have bounds of their own (`artifacts.py`).
"""

from functools import cache
from typing import Any

from mlflow.utils import rest_utils
from requests import RequestException, Response

MAX_ANSWER_BYTES = 64 << 20
CHUNK_BYTES = 64 << 10


class LargeAnswerError(RequestException):
    """An answer beyond the bound."""


@cache
def bound_answers() -> None:
    """Bound the answers to all further requests of this process; done once."""
    request = rest_utils._get_http_response_with_retries

    def bounded_request(*arguments: Any, **named: Any) -> Any:
        if named.get("stream"):
            return request(*arguments, **named)
        return request(*arguments, hooks={"response": read_bounded}, **named)

    rest_utils._get_http_response_with_retries = bounded_request


def read_bounded(response: Response, *_: Any, **__: Any) -> None:
    """Read the content of a response, also of a redirect. Raises LargeAnswerError beyond MAX_ANSWER_BYTES."""
    content = bytearray()
    for chunk in response.iter_content(CHUNK_BYTES):
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            response.close()
            raise LargeAnswerError(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB; is this an MLflow server?")
    response._content = bytes(content)
