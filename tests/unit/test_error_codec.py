"""Errors that ranks exchange as text."""

import json

import pytest

from avcil_dist.errors import AvcilError, DataError, RankError
from avcil_dist.training.error_codec import MAX_LENGTH, decode_error, encode_error


def test_a_typed_error_keeps_its_type_and_its_line() -> None:
    error = decode_error(encode_error(DataError("clip x\nis damaged"), 1))
    assert (type(error), str(error)) == (DataError, "clip x is damaged")


def test_a_bug_becomes_an_error_that_names_its_rank() -> None:
    error = decode_error(encode_error(ZeroDivisionError("a bug"), 3))
    assert (type(error), str(error)) == (
        RankError,
        "rank 3 failed: ZeroDivisionError: a bug; its log has the traceback",
    )


@pytest.mark.parametrize(
    "text",
    ["", "gone", "[]", "{}", "3", '["DataError"]', '["DataError", 3]', '[["x"], "y"]', "[" * 100_000, '"ab"', "\ufffd"],
)
def test_any_other_text_is_one_bounded_error(text: str) -> None:
    error = decode_error(text)
    assert type(error) is RankError
    assert "cannot be read" in str(error) or text == '"ab"'


@pytest.mark.parametrize(
    "kind", ["Exception", "SystemExit", "StepStopped", "__builtins__", "annotations", "NoSuchError"]
)
def test_a_type_that_is_no_error_of_ours_is_not_made(kind: str) -> None:
    assert type(decode_error(json.dumps([kind, "words"]))) is RankError


def test_the_words_are_one_printable_line_of_bounded_length() -> None:
    error = decode_error(json.dumps(["ConfigError", "\x1b[2Jgone\r\n" + "x" * 10**6]))
    assert isinstance(error, AvcilError)
    assert str(error).startswith("[2Jgone xxx")
    assert str(error).isprintable()
    assert len(str(error)) <= MAX_LENGTH + 1
