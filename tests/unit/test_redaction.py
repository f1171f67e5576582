"""Secrets do not appear in text that is printed, logged or stored."""

import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist.errors import AvcilError, DataError, StorageError
from avcil_dist.storage.retry import with_retries
from avcil_dist.text.redaction import has_secret, redacted

SECRET = "hunter2"


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@host/x",
        "https://hunter2@host/x",
        "postgresql://u:hunter2@@host/d",
        "postgresql://u:hun/hunter2@host/d",
        "postgresql://:hunter2@host/d",
        "postgresql://h/d?user=u&password=hunter2",
        "https://host/x?token=hunter2",
        "https://host/x?a=1&X-Amz-Signature=hunter2&b=2",
        "https://host/x?X-Amz-Security-Token=hunter2",
        "https://host/x?X-Amz-Credential=hunter2",
        "https://host/x?AWSAccessKeyId=hunter2",
        "https://account.blob.core.windows.net/c?sv=1&sig=hunter2",
        "https://host/x#access_token=hunter2",
        "https://host/x?api_key=hunter2",
        "s3://KEY:hunter2@bucket/x",
        "abfs://user:hunter2@account/x",
        "host=h password=hunter2 dbname=d",
    ],
)
def test_no_part_of_a_url_gives_its_secret_away(url: str) -> None:
    assert has_secret(url)
    for text in (url, f"{url}: missing", f"avcil: '{url}' and {url}", f"({url})"):
        assert SECRET not in redacted(text)
        assert redacted(redacted(text)) == redacted(text)
    assert not has_secret(redacted(url))


@pytest.mark.parametrize(
    "text",
    ["https://host:5000/path", "s3://bucket/a@b", "abfs://container@account/x", "sqlite:////runs/mlflow.db", "/a/b?v=1",
     "user@host.org wrote", "https://host/x?page=2&size=3", "key=value", "method.key=3"],
)  # fmt: skip
def test_text_without_a_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_the_host_stays() -> None:
    assert redacted("https://user:pw@host:80/x?token=t&page=2") == "https://***@host:80/x?token=***&page=2"


def test_an_error_and_its_copy_in_another_process_have_no_secret() -> None:
    error = DataError("https://u:hunter2@host/x?token=hunter2: missing")
    assert SECRET not in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_warnings_of_retries_have_no_secret(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avcil_dist.storage.retry._warned_at", -1000.0)
    monkeypatch.setattr("avcil_dist.storage.retry.FIRST_WAIT_SECONDS", 0.001)

    def fail() -> None:
        raise ConnectionResetError("https://u:hunter2@host/x?sig=hunter2: reset")

    with pytest.raises(StorageError) as caught:
        with_retries(fail, "s3://u:hunter2@b/x", seconds=0.05)
    assert "retrying" in caplog.text
    assert SECRET not in caplog.text + str(caught.value)


@pytest.mark.parametrize("text", ["?" * 100_000, "://" * 50_000, "&a" * 50_000, "://" + "a" * 100_000 + ":" * 1000])
def test_long_text_is_quick(text: str) -> None:
    started = time.process_time()
    redacted(text)
    assert time.process_time() - started < 2


def test_other_arguments_of_an_error_stay() -> None:
    assert AvcilError(3).args == (3,)


WORD = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=10)


@settings(max_examples=300, deadline=None)
@given(WORD, st.text("/@:?&=#%+-_.~abc", max_size=6), st.sampled_from(["https", "s3", "postgresql+psycopg2", "abfs"]))
def test_no_password_is_shown_whatever_its_letters(user: str, marks: str, protocol: str) -> None:
    url = f"{protocol}://{user}:{marks}{SECRET}{marks}@host/x"
    assert SECRET not in redacted(url)
    assert SECRET not in redacted(f"{url}: missing (see {url})")
