"""Exported models: they predict as the stream, their card is true and its lines run, and ONNX equals the network."""

import contextlib
import io
import json
import re
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import Result

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.inference import onnx_export
from avcil_dist.inference.exported import load_export, load_predictor, without_paths
from avcil_dist.inference.onnx_export import TOLERANCE, check_export_packages, difference, export_onnx
from avcil_dist.methods import make_method
from avcil_dist.methods.analytic import Analytic
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.network import Network
from avcil_dist.reporting.model_card import CardFacts, front_matter, model_card
from avcil_dist.scenario import Scenario
from avcil_dist.streams.summary import load_metrics
from avcil_dist.training.build import network_after
from data_shards.synthetic import SyntheticSpec, render_clip
from launch.export import check_export
from tests.helpers.artifacts import make_artifact
from tests.helpers.plugins import fresh_plug_ins, install
from tests.helpers.published_server import COMMIT, TOKEN, PublishedServer
from tests.helpers.rendered import tiny_manifest
from tests.helpers.streams import avcil, write_config
from tests.unit.test_predict_media import commit

__all__ = ["fresh_plug_ins"]
NAMES = ("cat", "dog", "cow")
SHAPE = {"frames": 4, "positions": 6, "dim": 16}
INPUTS = {"visual": (4, 6, 16), "audio": (16,)}


@pytest.fixture(scope="module")
def of_clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clips")
    manifest = tiny_manifest(folder / "shards", NAMES, {"train": 1, "val": 1, "test": 2})
    data = f"data.manifest={manifest.root}/manifest.json"
    return commit(load_config("demo", [data, f"output={folder}/runs", "scenario.classes_per_step=3"]))


@pytest.fixture(scope="module")
def of_features(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("features")
    return commit(load_config(str(write_config(folder)), ["scenario.classes_per_step=6"]))


def exported(stream: str, folder: Path, *words: str) -> Path:
    result = avcil("export", stream, "-o", folder, *words)
    assert result.exit_code == 0, result.output
    return folder


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The output of the Python lines of a card, run as they are, in its folder."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().strip()


def test_an_exported_repository_predicts_clips_as_the_stream(
    of_clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(
        render_clip(SyntheticSpec(3, {"test": 1}, seconds=1.0, size=32, frames_per_second=8), "test", 1, 0)
    )
    folder = exported(of_clips, tmp_path / "new" / "export", "--format", "hub", "--license", "cc-by-4.0")
    assert {path.name for path in folder.iterdir()} == {
        ".gitattributes",
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
    }
    found, wanted = (avcil("predict", model, clip, "--json", "--top", 3) for model in (folder, of_clips))
    assert json.loads(found.stdout) == json.loads(wanted.stdout)
    assert all(str(Path(of_clips).parents[1]) not in path.read_text("latin1") for path in folder.iterdir())
    best = json.loads(wanted.stdout)["predictions"][0]["classes"][0]["class"]
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    assert run_card(folder, monkeypatch) == best


def test_an_export_is_pushed_to_a_repository_with_a_token_that_can_write(
    of_features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))

    def push(folder: str, *words: str) -> Result:
        return avcil("export", of_features, "-o", tmp_path / folder, *words)

    words = ("--format", "hub", "--push", "lab/tiny")
    assert "--push: no token of the hub; set HF_TOKEN" in push("a", *words).stderr
    assert "add --format hub" in push("a", "--push", "lab/tiny").stderr
    assert "--push: 'tiny' is no repository of the hub" in push("a", "--format", "hub", "--push", "tiny").stderr
    assert not (tmp_path / "a").exists()
    with PublishedServer(tmp_path) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # as HF_ENDPOINT at a start
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        refused = push("a", *words)
        assert refused.exit_code == 2
        assert re.search(r"the hub refuses the upload; .*: hf upload lab/tiny \S+a$", refused.stderr.strip())
        assert "hf_other" not in refused.output
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert f"uploaded: {server.url}/lab/tiny/commit/{COMMIT}" in push("b", *words, "--private").stdout
        assert [made["visibility"] for made in server.made] == ["private"]
        assert server.hub["lab/tiny"] == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_the_card_has_the_numbers_of_the_metrics(of_clips: str, tmp_path: Path) -> None:
    folder = exported(of_clips, tmp_path / "export", "--license", "cc-by-4.0")
    front = huggingface_hub.metadata_load(folder / "README.md")
    assert (front["license"], front["library_name"]) == ("cc-by-4.0", "avcil-dist")
    [entry] = front["model-index"]
    values = {one["name"]: one["value"] for one in entry["results"][0]["metrics"]}
    assert values["seen accuracy"] == load_metrics(of_clips, 0).seen_accuracy[-1]
    text = (folder / "README.md").read_text()
    assert "3 train, 3 val, 6 test clips" in text
    assert all(f"| {number} | {name} | 0 |" in text for number, name in enumerate(NAMES))


def test_names_of_classes_are_no_markup_in_the_card() -> None:
    artifact = make_artifact(1)
    hostile = Scenario((("dog", "<b>|[x](http://y)"), ("bus",)))
    object.__setattr__(artifact, "scenario", hostile)
    text = model_card(artifact, CardFacts({}, "unknown", "clips"))
    assert r"\<b\>\|\[x\](http://y)" in text
    assert "<b>" not in text.replace(r"\<b\>", "")


def test_the_card_names_the_packages_of_plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from avcil_dist.methods.finetune import Finetune as Theirs"
    install(monkeypatch, tmp_path, "own_k", {"methods": {"theirs": "own_k:Theirs"}}, code)
    config = load_config(str(write_config(tmp_path)), ["scenario.classes_per_step=6", "method=theirs"])
    card = (exported(commit(config), tmp_path / "export") / "README.md").read_text()
    assert "install what has the code of this model's plug-ins: `own_k`." in card


def test_names_of_metrics_have_no_remarks() -> None:
    names = [one.metric_name for one in front_matter(make_artifact(1), "mit").eval_results or []]
    assert "average forgetting" in names
    assert not any(":" in name or "(" in name for name in names)


def test_a_damaged_export_is_refused_by_name(of_features: str, tmp_path: Path) -> None:
    folder = exported(of_features, tmp_path / "export")
    assert load_export(str(folder)).shape == {"frames": 2, "positions": 3, "dim": 16}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged"):
        load_export(str(folder))
    with pytest.raises(ConfigError, match="no empty folder"):
        check_export(str(folder), "mit", "safetensors")
    with pytest.raises(ConfigError, match="--license: 'my licence'"):
        check_export(str(tmp_path / "other"), "my licence", "safetensors")


def test_paths_and_urls_of_settings_become_names() -> None:
    settings = {"weights": "/weights/a.pth", "more": ["s3://bucket/b", "owner/name"], "n": 3}
    assert without_paths(settings) == {"weights": "a.pth", "more": ["b", "owner/name"], "n": 3}


def test_a_graph_scores_any_number_of_clips_as_the_predictor(
    of_features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = exported(of_features, tmp_path / "graph", "--format", "onnx")
    predictor = load_predictor(str(exported(of_features, tmp_path / "weights")))
    visual, audio = torch.randn(5, 2, 3, 16), torch.randn(5, 16)
    session = onnxruntime.InferenceSession(str(graph / "model.onnx"))
    [scores] = session.run(["scores"], {"visual": visual.numpy(), "audio": audio.numpy()})
    assert difference(scores, predictor.score_features(visual, audio).numpy()) < TOLERANCE
    assert run_card(graph, monkeypatch) in predictor.classes
    with pytest.raises(ConfigError, match=r"README\.md"):
        load_export(str(graph))


def network_and_method(**model: object) -> tuple[Network, Method]:
    """A network of features and the method `analytic`, at the only step of two classes."""
    settings = {
        "name": "tiny",
        "data": {"manifest": "none.json"},
        "scenario": {"classes_per_step": 2},
        "method": {"name": "analytic" if not model else "lwf"},
        "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}, **model},
    }
    config, scenario = Config.model_validate(settings), Scenario((("dog", "cat"),))
    method = make_method(config.method)
    method.begin_step(StepContext(scenario, 0))
    return network_after(config, SHAPE, scenario, method, 0), method


def test_a_head_in_closed_form_is_exported(tmp_path: Path) -> None:
    network, method = network_and_method()
    assert isinstance(method, Analytic)
    labels = torch.arange(20) % 2
    method.begin_sums({0: 10, 1: 10})
    method.accumulate(network(torch.randn(20, 4, 6, 16), torch.randn(20, 16)), labels)
    method.statistics()
    method.choose(method.solve(), [])
    assert export_onnx(network, method, INPUTS, tmp_path / "graph.onnx") < TOLERANCE


def test_a_graph_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of a fusion are compared too, for two numbers of clips: any difference is above this limit."""
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    network, method = network_and_method(fusion="concat")
    with pytest.raises(ConfigError, match=r"network's by (0\.0e\+00|\d\.\de-0[6-9]), .* it is not kept"):
        export_onnx(network, method, INPUTS, tmp_path / "graph.onnx")


def test_infinities_are_equal_and_a_missing_number_is_not() -> None:
    scores = np.array([[1.0, -np.inf], [50.0, 2.0]])
    assert difference(scores + 0.005, scores) == pytest.approx(1e-4)
    assert difference(np.array([[np.nan, 1.0]]), np.array([[0.0, 1.0]])) == np.inf
    assert difference(np.array([[1.0, 1.0]]), np.array([[-np.inf, 1.0]])) == np.inf


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package.*avcil-dist\[export\]"):
        check_export_packages()
