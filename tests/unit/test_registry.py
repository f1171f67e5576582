"""Inputs of a registered model: paths below one folder, and a made example."""

from pathlib import Path

import pandas as pd
import pytest

from avcil_dist.data.decode import decode_clip
from avcil_dist.errors import ConfigError
from avcil_dist.tracking.registry import CLIPS, RequestError, _clips, _made_clip, named_scores


def read(*paths: str) -> list[bytes]:
    return [data for _, data in _clips(pd.DataFrame({"path": list(paths)}))]


def test_without_a_folder_no_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CLIPS, raising=False)
    (tmp_path / "a.mp4").write_bytes(b"a")
    with pytest.raises(ConfigError, match=r"paths are not read; send the bytes in the column clip"):
        read(str(tmp_path / "a.mp4"))


def test_paths_below_the_folder_are_read_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clips"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.mp4").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link.mp4").symlink_to(tmp_path / "secret")
    monkeypatch.setenv(CLIPS, str(folder))
    assert read("inner/a.mp4", f"{folder}/inner/a.mp4", f"file://{folder}/inner/a.mp4") == [b"a"] * 3
    for path in ("../secret", f"{tmp_path}/secret", "/etc/passwd", "file:///etc/passwd", f"{folder}/../secret", ""):
        with pytest.raises(ConfigError, match="not a path below"):
            read(path)
    for path in ("reference://k::http://server/e.json", "http://server/a", "s3://bucket/a"):
        with pytest.raises(ConfigError):
            read(path)
    with pytest.raises(ConfigError, match="a link that leaves"):
        read("link.mp4")


def test_the_example_clip_can_be_decoded() -> None:
    clip = decode_clip(_made_clip(), num_frames=4, sample_rate=16_000, silent="error", where="example")
    greys = [float(frame.float().mean()) for frame in clip.frames]
    assert greys == sorted(greys)
    assert clip.waveform.abs().max() > 0.2


def test_scores_have_names_and_the_first_is_the_prediction() -> None:
    assert list(named_scores([0.2, 0.4, 0.4], ["dog", "cat", "bus"]).items()) == [
        ("cat", 0.4),
        ("bus", 0.4),
        ("dog", 0.2),
    ]


def test_the_error_of_a_request_is_its_line_and_status_400() -> None:
    error = RequestError("a.mp4: missing")
    assert (str(error), error.get_http_status_code()) == ("a.mp4: missing", 400)
    assert "a.mp4: missing" in error.serialize_as_json()
