"""The names of the package: imported when they are used, typed in its stub, and nothing else before."""

import ast
import multiprocessing.spawn
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import avcil_dist
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams.artifact import save_artifact
from avcil_dist.system.process_start import without_main_module
from avcil_dist.training.observer import Observer
from launch import api
from launch.call_queue import CallQueue, replay_calls
from tests.helpers.artifacts import make_artifact

PACKAGE = Path(avcil_dist.__file__).parent


def test_the_package_imports_nothing_before_a_name_is_used() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assert [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)] == [
        "import importlib"
    ]
    assert set(avcil_dist.API) <= set(dir(avcil_dist))
    for name in avcil_dist.API:
        assert getattr(avcil_dist, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        avcil_dist.trian  # noqa: B018


def test_the_stub_has_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(avcil_dist.API)


def test_a_folder_without_steps_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no committed step of a stream"):
        avcil_dist.Stream(tmp_path)


class Recorder(Observer):
    def __init__(self) -> None:
        self.calls: list[object] = []

    def begin(self, step: int, num_epochs: int, num_batches: int, num_done: int) -> None:
        self.calls.append((step, num_epochs, num_batches, num_done))

    def begin_test(self, num_batches: int) -> None:
        self.calls.append(num_batches)

    def advance(self) -> None:
        self.calls.append("batch")

    def message(self, text: str) -> None:
        self.calls.append(text)

    def epoch(self, epoch: int, values: object) -> None:
        self.calls.append((epoch, values))


def test_calls_cross_processes_in_their_order_and_no_batch_is_lost() -> None:
    queue = multiprocessing.SimpleQueue()
    calls, seen = CallQueue(queue), Recorder()
    calls.begin(1, 2, 3, 0)
    for _ in range(5):
        calls.advance()
    calls.message("hello")
    calls.advance()
    calls.epoch(0, {"loss/total": 1.5})
    calls.begin_test(7)
    replay_calls(queue, seen)
    assert seen.calls == [(1, 2, 3, 0), *["batch"] * 5, "hello", "batch", (0, {"loss/total": 1.5}), 7]
    replay_calls(None, None)


def test_new_processes_do_not_import_the_script_of_the_program() -> None:
    main = sys.modules["__main__"]
    with without_main_module():
        data = multiprocessing.spawn.get_preparation_data("x")
        assert not {"init_main_from_name", "init_main_from_path"} & set(data)
    assert sys.modules["__main__"] is main


def test_a_notebook_gets_an_error_of_the_user_as_one_line() -> None:
    """By the method that IPython calls; the notebook of the documents has such an error."""
    with pytest.raises(ConfigError) as caught:
        avcil_dist.load_config("demo", "optim.lrr=1")
    assert caught.value._render_traceback_() == [
        "ConfigError: command line: optim.lrr: unknown key; did you mean 'lr'?"
    ]


def test_overrides_are_words_or_mappings() -> None:
    words = ("optim.epochs=2", "optim.lr=1e-05", "method=er", "scenario.classes=[a b,c]", "memory.selection=random")
    given = {"optim": {"epochs": 2}, "optim.lr": 1e-5, "method": "er", "scenario.classes": ["a b", "c"]}
    config = avcil_dist.load_config("demo", given, "memory.selection=random")
    assert config == avcil_dist.load_config("demo", *words)
    assert (config.optim.epochs, config.optim.lr) == (2, 1e-5)
    with pytest.raises(
        ConfigError, match=r"^\['optim.epochs=2'\]: list; an override is a word section.key=value, or a"
    ):
        avcil_dist.load_config("demo", ["optim.epochs=2"])  # type: ignore[arg-type]


def test_one_clip_needs_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_artifact(str(tmp_path), make_artifact())
    predictor = SimpleNamespace(classes=("a",), score_clips=lambda contents: None)
    monkeypatch.setattr("avcil_dist.inference.predict.Predictor", lambda *_: predictor)
    monkeypatch.setattr(api, "_predictions", lambda names, *_: names)
    of_clips = SimpleNamespace(config=avcil_dist.load_config("demo"), step=0)
    monkeypatch.setattr(api.Stream, "artifact", lambda *_: of_clips)
    stream = avcil_dist.Stream(tmp_path)
    assert (
        stream.predict("clip.mp4") == stream.predict(Path("clip.mp4")) == stream.predict(["clip.mp4"]) == ["clip.mp4"]
    )
    assert stream.predict(b"bytes") == ["clip 0"]


def test_every_call_of_an_observer_crosses() -> None:
    names = {name for name, value in vars(Observer).items() if callable(value) and not name.startswith("_")}
    assert names <= vars(CallQueue).keys()
