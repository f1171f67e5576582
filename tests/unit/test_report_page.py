"""The report page: means over seeds, confusion, curves of classes, origin; and the page in a browser."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avcil_dist.reporting.confusion import confusion_view
from avcil_dist.reporting.groups import differing_settings, make_groups, mean_and_deviation
from avcil_dist.reporting.history import duration
from avcil_dist.reporting.page import sparkline, write_page
from avcil_dist.reporting.report import load_streams
from avcil_dist.streams.identity import new_identity, write_identity
from avcil_dist.tracking.event_queue import DeliveryCursor, EventQueue, queue_folder
from avcil_dist.tracking.links import tracked_at
from tests.helpers.browser import chromium, needs_chromium
from tests.helpers.report_streams import write_streams

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods with two seeds each, in three steps of two classes, with known regions."""
    made = tmp_path_factory.mktemp("streams")
    write_streams(made, {"avcil": {"attention": False}, "finetune": {}}, seeds=(0, 1), regions=True)
    return made


def test_means_and_deviations_are_over_the_streams_that_have_a_value() -> None:
    mean, deviation = mean_and_deviation([[1.0, 2.0, None], [3.0, None], [5.0]])
    np.testing.assert_array_equal(mean, [3.0, 2.0, np.nan])
    np.testing.assert_array_equal(deviation, [2.0, 0.0, 0.0])


def test_a_curve_has_the_band_of_its_seeds_and_begins_at_its_step(folder: Path) -> None:
    avcil, _ = make_groups(load_streams([str(folder)]))
    first, second = (stream.metrics.forgetting for stream in avcil.streams)
    curve = avcil.curve(lambda metrics: metrics.forgetting, first=1)
    assert curve is not None
    assert curve.deviation is not None
    assert curve.x == [1, 2]
    assert curve.y == pytest.approx([50 * (a + b) for a, b in zip(first, second, strict=True)])
    assert curve.deviation == pytest.approx([100 * abs(a - b) / 2**0.5 for a, b in zip(first, second, strict=True)])


def test_settings_are_those_in_which_the_rows_differ(folder: Path) -> None:
    settings = differing_settings(make_groups(load_streams([str(folder)])))
    assert settings["method.name"] == ["avcil", "finetune"]
    assert settings["method.attention"] == ["false", "–"]
    assert not {"seed", "output", "scenario.classes_per_step"} & settings.keys()


def test_confusion_is_the_mean_of_rows_and_names_the_most_frequent_mistakes(folder: Path, tmp_path: Path) -> None:
    streams = load_streams([str(folder / "made-finetune-seed0"), str(folder / "made-finetune-seed1")])
    view = confusion_view(streams)
    assert view is not None
    np.testing.assert_allclose(view.matrix.sum(axis=1), 1)
    name, task, predicted, _, fraction = view.pairs[0]
    counts = [stream.metrics.confusion[name].get(predicted, 0) for stream in streams]
    assert fraction == pytest.approx(sum(counts) / 20)
    assert (view.tasks[view.classes.index(name)], view.borders) == (task, [0, 2, 4, 6])
    old, new = view.matrix[:4, 4:].sum(), 4
    assert view.drift == pytest.approx(old / new)


def test_the_points_of_a_curve_are_at_their_steps() -> None:
    assert sparkline([(1, 1.0), (2, 0.0)], 3) == "M50 1L100 19"
    assert sparkline([(0, 1.0), (1, 0.0)], 3) == "M0 1L50 19"
    assert sparkline([(0, 0.5)], 1) == "M0 10h1"


def test_the_curves_of_an_unfinished_stream_end_at_its_last_step(folder: Path, tmp_path: Path) -> None:
    stream = tmp_path / "made-avcil-seed0"
    shutil.copytree(folder / stream.name, stream)
    shutil.rmtree(stream / "step_002")
    streams = load_streams([str(stream)])
    [group] = make_groups(streams)
    early, late = (streams[0].scenario.new(task)[0] for task in (0, 1))
    steps = [metrics for _, metrics in group.histories[0].steps]
    assert group.class_curve(early) == [(step, steps[step].per_class[early]) for step in (0, 1)]
    assert group.class_curve(late) == [(1, steps[1].per_class[late])]
    write_page(streams, str(tmp_path / "page.html"))
    paths = re.findall(
        r'<rect width="100" height="20"/><path d="M(\d+) \d+(?:L(\d+) \d+|h1)"', (tmp_path / "page.html").read_text()
    )
    assert paths == [("0", "50"), ("0", "50"), ("50", ""), ("50", "")]


def test_times_have_one_unit() -> None:
    assert [duration(seconds) for seconds in (0, 45.2, 1500, 5400)] == ["–", "45 s", "25 min", "1.5 h"]


def test_the_page_links_to_the_run_on_its_server(tmp_path: Path) -> None:
    write_streams(tmp_path, {"finetune": {}}, sizes=(1,))
    [stream] = load_streams([str(tmp_path)])
    identity = new_identity()
    write_identity(stream.folder, identity)
    queue = EventQueue(queue_folder(stream.folder, identity.id))
    server = "https://tracking.example.org/"
    queue.append("open", name="a", parameters={}, tags={}, server=server)
    queue.append("begin", step=0)
    queue.save_cursor(server, DeliveryCursor(queue.size(), {"stream": "abc"}, experiment="7"))
    link = tracked_at(stream.folder)
    assert link is not None
    write_page([stream], str(tmp_path / "page.html"), links={stream.folder: link})
    page = (tmp_path / "page.html").read_text()
    assert 'href="https://tracking.example.org/#/experiments/7/runs/abc?workflowType=machine_learning"' in page
    assert "8 × NVIDIA H100" in page
    assert "1.0 0123456789ab" in page


def test_the_page_of_many_classes_and_epochs_stays_small(tmp_path: Path) -> None:
    write_streams(tmp_path, {"avcil": {}, "finetune": {}}, sizes=(31,) * 9 + (30,), epochs=200)
    write_page(load_streams([str(tmp_path)]), str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").stat().st_size < 1_000_000


@needs_chromium
@pytest.mark.slow
def test_in_a_browser_nothing_overflows_nothing_fails_and_the_matrix_zooms_by_keyboard(
    folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    write_page(load_streams([str(folder)]), str(page))
    with chromium(tmp_path / "profile") as browser:
        for width in WIDTHS:
            for dark in (False, True):
                browser.open(page, width=width, dark=dark)
                assert browser.evaluate("innerWidth") == width
                assert browser.overflowing() == []
        browser.evaluate("document.querySelector('.matrix-picture').focus()")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            browser.press(key)
        view = confusion_view(load_streams([str(folder)])[:2])
        assert view is not None
        readout = browser.evaluate("document.querySelector('.readout').textContent")
        assert readout.startswith(f"{view.classes[1]} (task 0) → {view.classes[2]} (task 1): ")
        assert float(readout.split()[-2]) == pytest.approx(100 * view.matrix[1, 2], abs=0.5)
        assert browser.evaluate("document.querySelector('.stage').style.transform").startswith("scale(1)")
        browser.evaluate("document.querySelector('.matrix-picture').focus()")
        browser.press("+")
        assert browser.problems == []
        browser.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").width == WIDTHS[-1]
