"""Reports over streams written to disk as steps write them."""

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.reporting.page import write_page
from avcil_dist.reporting.report import StreamReport, load_streams, megabytes, percent, print_report
from avcil_dist.streams.commit import write_commit, write_files
from avcil_dist.streams.metrics import MemoryUse, StreamMetrics
from data_shards.random_features import make_feature_shards
from launch.report_clips import report_clips
from tests.helpers.streams import avcil

STEPS = [["dog", "<b>cat</b>"], ["bus & co"], ["rain"]]
ROWS = [[0.9], [0.5, 0.8], [0.6, 0.3, 0.7]]
SEEN = [0.9, 0.6, 0.456]


def make_config(method: str, seed: int) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "seed": seed,
            "data": {"manifest": "manifest.json"},
            "scenario": {"classes_per_step": [2, 1, 1]},
            "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
            "method": {"name": method},
        }
    )


def write_stream(folder: Path, *, committed: int, started: int = 0, method: str = "avcil", seed: int = 0) -> None:
    """A stream with `committed` whole steps, then `started` ones that were cut off before their commit."""
    metrics = None
    for step in range(committed + started):
        seen = [name for names in STEPS[: step + 1] for name in names]
        metrics = StreamMetrics.after(
            metrics,
            step=step,
            row=ROWS[step],
            seen=SEEN[step],
            per_class={name: (label + 1) / 10 for label, name in enumerate(seen)},
            num_test_clips=10 * (step + 1),
            epoch=3,
            val_accuracy=0.5,
            num_epochs=9,
            num_ties=step,
            memory=MemoryUse(num_clips=8, clip_bytes=1_000_000, model_bytes=200_000, state_bytes=step * 50_000),
        )
        artifact = str(folder / f"step_{step:03d}")
        files = {
            "metrics.json": json.dumps(metrics.to_dict()).encode(),
            "scenario.json": json.dumps({"steps": STEPS}).encode(),
            "config.yaml": config_to_yaml(make_config(method, seed)).encode(),
        }
        digests = write_files(artifact, files)
        if step < committed:
            write_commit(artifact, digests, step=step, manifest_hash="m", code_version="1")


def page_of(streams: list[StreamReport], tmp_path: Path) -> str:
    path = tmp_path / "out" / "report.html"
    write_page(streams, str(path))
    return path.read_text()


def printed(streams: list[StreamReport]) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_report(streams, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Tags(HTMLParser):
    """Collects ids, and checks that what opens is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_last_committed_step_counts_and_a_later_uncommitted_one_does_not(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=2, started=1)
    (stream,) = load_streams([str(tmp_path / "a")])
    assert stream.metrics.step == 1
    assert stream.progress == "2/3"
    assert (stream.config.method.name, stream.scenario.num_steps) == ("avcil", 3)


def test_a_folder_of_streams_stands_for_all_of_them_once(tmp_path: Path) -> None:
    write_stream(tmp_path / "b", committed=1, method="finetune")
    write_stream(tmp_path / "a", committed=3)
    write_stream(tmp_path / "c", committed=0, started=1)
    (tmp_path / "mlartifacts").mkdir()
    streams = load_streams([f"{tmp_path}/", f"{tmp_path}/a"])
    assert [stream.config.method.name for stream in streams] == ["avcil", "finetune"]


@pytest.mark.parametrize("name", ["", "nowhere", "c"])
def test_a_folder_without_a_committed_step_is_an_error_that_says_what_to_do(tmp_path: Path, name: str) -> None:
    write_stream(tmp_path / "c", committed=0, started=1)
    folder = str(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"COMMITTED\.json.*avcil train") as raised:
        load_streams([folder])
    assert folder in str(raised.value)


def test_outputs_of_several_commands_are_named_and_not_mixed(tmp_path: Path) -> None:
    write_stream(tmp_path / "smoke" / "a", committed=1)
    write_stream(tmp_path / "demo" / "a", committed=1)
    with pytest.raises(ArtifactError, match=rf"give one with streams: {tmp_path}/demo, {tmp_path}/smoke$"):
        load_streams([str(tmp_path)])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", "{}"),
        ("metrics.json", "[]"),
        ("metrics.json", "{"),
        ("scenario.json", "[]"),
        ("config.yaml", "a: 1"),
        ("config.yaml", None),
    ],
)
def test_a_damaged_step_is_named(tmp_path: Path, file: str, content: str | None) -> None:
    write_stream(tmp_path, committed=2)
    damaged = tmp_path / "step_001" / file
    damaged.unlink() if content is None else damaged.write_text(content)
    with pytest.raises(ArtifactError, match="step_001"):
        load_streams([str(tmp_path)])


@pytest.mark.parametrize(
    ("file", "was", "now"),
    [("metrics.json", "0.6", "0.9"), ("scenario.json", "dog", "cat"), ("config.yaml", "30", "31")],
)
def test_a_committed_file_that_was_changed_is_refused_by_name(tmp_path: Path, file: str, was: str, now: str) -> None:
    write_stream(tmp_path, committed=2)
    path = tmp_path / "step_001" / file
    changed = path.read_text().replace(was, now)
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ArtifactError, match=rf"step_001/{file}: damaged, its digest is not the one committed"):
        load_streams([str(tmp_path)])


def test_the_terminal_shows_summary_and_matrix_in_percent(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3, seed=7)
    write_stream(tmp_path / "b", committed=1, method="finetune")
    text = printed(load_streams([str(tmp_path)]))
    assert re.search(r"tiny\W+avcil\W+7\W+3/3\W+90\.0 +60\.0 +45\.6\W+65\.2\W+40\.0\W+4/9 +4/9\* +4/9\*\W+1\.3\W", text)
    assert re.search(r"tiny\W+finetune\W+0\W+1/3\W+90\.0\W+90\.0\W+–", text)
    assert re.search(r"2\W+60\.0\W+30\.0\W+70\.0", text)
    assert "* later epochs are as good" in text


def test_the_page_needs_nothing_but_itself_and_is_well_formed(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3)
    write_stream(tmp_path / "b", committed=2, method="finetune")
    page = page_of(load_streams([str(tmp_path)]), tmp_path)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids))
    assert not tags.seen & {"link", "iframe", "object"}
    assert not re.search(r"src=(?!\"data:)|@import|url\((?!#)|href=\"(?!#)", page)
    assert page.count("<figure") == 2


def test_the_page_holds_the_numbers_and_escapes_names(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3)
    page = page_of(load_streams([str(tmp_path)]), tmp_path)
    for text in ("65.2", "45.6", "40.0", "&lt;b&gt;cat&lt;/b&gt;", "bus &amp; co", "weight_decay: 0.0001"):
        assert text in page
    assert "<b>cat" not in page


def test_the_drawings_take_the_colours_of_the_page(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3)
    page = page_of(load_streams([str(tmp_path)]), tmp_path)
    assert "stroke: var(--series-0)" in page
    assert "#abc" not in page


def test_the_drawings_have_no_ground_of_their_own(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3)
    page = page_of(load_streams([str(tmp_path)]), tmp_path)
    assert "#ffffff" not in page[page.index("<svg") :]


def test_a_stream_of_one_step_has_no_chart_of_forgetting(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=1)
    page = page_of(load_streams([str(tmp_path)]), tmp_path)
    assert page.count("<figure") == 1


def test_the_same_streams_give_the_same_page(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=3)
    streams = load_streams([str(tmp_path)])
    assert page_of(streams, tmp_path) == page_of(streams, tmp_path)


def test_a_stream_without_a_record_of_its_memory_has_a_dash_for_it() -> None:
    assert megabytes(None) == "–"
    assert megabytes(MemoryUse(1, 2_000_000_000, 40_000, 9_999)) == "2,000.0"


def test_percent_has_one_decimal() -> None:
    assert [percent(value) for value in (0.0, 0.12345, 1.0, -0.05, None)] == ["0.0", "12.3", "100.0", "-5.0", "–"]


def test_clips_need_a_page_and_streams_on_clips(tmp_path: Path) -> None:
    write_stream(tmp_path / "a", committed=1)
    done = avcil("report", tmp_path, "--clips", "1")
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert "give --page FILE too" in done.output
    make_feature_shards(tmp_path / "shards", classes=2, clips={"train": 1, "val": 1, "test": 1}, separation=0.5)
    config = make_config("avcil", 0).model_dump(mode="json")
    config["data"]["manifest"] = f"{tmp_path}/shards/manifest.json"
    [stream] = load_streams([str(tmp_path)])
    stream = replace(stream, config=Config.model_validate(config))
    with pytest.raises(ConfigError, match="trained on features"):
        report_clips([stream], 1)
