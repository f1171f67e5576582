"""Attention as a distribution, its share on a region, and the figures that `avcil attention` writes."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avcil_dist.config.schema import ClipConfig, Config
from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.inference.attention import prepare_clips
from avcil_dist.models.attention.maps import attention_map, evidence_map, token_weights
from avcil_dist.models.attention.module import AudioGuidedAttention
from avcil_dist.models.attention.token_map import TokenMap
from avcil_dist.models.network import build_network
from avcil_dist.reporting.attention import FILM_RATE
from avcil_dist.streams.artifact import save_artifact
from data_shards.synthetic import SyntheticSpec, render_dataset, sounding_region
from tests.helpers.artifacts import make_artifact
from tests.helpers.streams import avcil

SPEC = SyntheticSpec(num_classes=3, clips={"test": 1}, seconds=1.0, size=32, frames_per_second=8)
CLIP = {"frames": 4, "size": 32, "mel_bins": 32, "mel_frames": 96}


def test_a_map_is_the_weight_of_each_token_in_the_pooled_vector() -> None:
    torch.manual_seed(0)
    attention, audio, visual = AudioGuidedAttention(6), torch.randn(2, 6), torch.randn(2, 3, 4, 6)
    weights = token_weights(attention, audio, visual).detach()
    for clip in range(2):
        found = attention_map(weights[clip])
        guide = np.tanh(attention.attn_audio(audio[clip]).detach().numpy())
        keys = np.tanh(attention.attn_visual(lambda w, b, c=clip: (visual[c] @ w.T + b,))[0].detach().numpy())
        spatial = np.exp(keys * guide) / np.exp(keys * guide).sum(axis=1, keepdims=True)  # eq. 2 and 3
        logits = (spatial * keys).sum(axis=1) * guide
        temporal = np.exp(logits) / np.exp(logits).sum(axis=0)  # eq. 4 and 5
        expected = (temporal[:, None] * spatial).mean(axis=2).reshape(3, 2, 2)
        np.testing.assert_allclose(found.mass, expected, rtol=1e-5)
        assert found.mass.sum() == pytest.approx(1)
        np.testing.assert_allclose(found.temporal, expected.sum(axis=(1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found.spatial.sum(axis=(1, 2)), 1)


def test_evidence_is_the_positive_part_of_each_tokens_effect_on_the_score() -> None:
    weights = torch.tensor([[[0.5, 0.1], [0.5, 0.9]]])  # one frame, two tokens, two channels
    tokens = torch.tensor([[[2.0, 1.0], [4.0, 1.0]]])
    found = evidence_map(weights, tokens, torch.tensor([1.0, -1.0]))
    np.testing.assert_allclose(found.mass, [[[0.9 / 2.0, 1.1 / 2.0]]])  # 1 - 0.1 and 2 - 0.9
    assert not evidence_map(weights, tokens, torch.tensor([-1.0, -1.0])).mass.any()
    some = evidence_map(weights, tokens, torch.tensor([1.0, -5.0]))  # 1 - 0.5 and 2 - 4.5
    np.testing.assert_allclose(some.mass, [[[1.0, 0.0]]])


def test_positions_that_are_no_square_are_one_row() -> None:
    assert attention_map(torch.rand(2, 3, 4)).mass.shape == (2, 1, 3)


def test_a_region_takes_its_part_of_the_cells_it_covers() -> None:
    mass = np.zeros((1, 2, 2))
    mass[0] = [[0.1, 0.2], [0.3, 0.4]]
    attention = TokenMap(mass)
    assert attention.share((0, 0, 1, 1)) == pytest.approx(1)
    assert attention.share((0.5, 0, 1, 0.5)) == pytest.approx(0.3)
    assert attention.share((0.25, 0, 1, 0.75)) == pytest.approx(0.5 * (0.1 + 0.5 * 0.2) + 0.3 + 0.5 * 0.4)


def test_the_sounding_region_is_where_the_rendered_shape_pulses(tmp_path: Path) -> None:
    spec = replace(SPEC, seconds=4.0, size=64)
    render_dataset(tmp_path, spec)
    known = json.loads((tmp_path / "regions.json").read_text())
    for number in range(3):
        top, left, bottom, right = sounding_region(spec, "test", number, 0)
        assert known[f"test-{number:03d}-00000"] == [top, left, bottom, right]

        data = (tmp_path / "test" / f"class_{number:03d}" / f"test-{number:03d}-00000.mp4").read_bytes()
        frames = decode_clip(data, num_frames=32, sample_rate=16000, silent="error", where="clip").frames.float()
        level = frames.mean(dim=1)  # (T, H, W)
        pulse = torch.stack([part.mean(dim=(1, 2)).std() for part in level.split(32, 1) for part in part.split(32, 2)])
        assert divmod(int(pulse.argmax()), 2) == (top * 2, left * 2)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two committed steps of a stream over clips, with random weights; `clips/` beside it."""
    folder = tmp_path_factory.mktemp("attention")
    render_dataset(folder / "clips", SPEC)
    made = make_artifact()
    values = made.config.model_dump(mode="json") | {
        "data": {"manifest": "manifest.json", "clip": CLIP},
        "model": {"visual": {"kind": "small", "dim": 16}, "audio": {"kind": "small", "dim": 16}},
    }
    config = Config.model_validate(values)
    for step in (0, 1):
        torch.manual_seed(step)
        network = build_network(config.model, config.data.clip, {}, made.scenario.num_seen(step))
        artifact = replace(
            make_artifact(step), config=config, model=network.state_dict(), method={}, memory=EMPTY_MEMORY
        )
        save_artifact(str(folder / "stream<b>"), artifact)
    return folder


def clips_of(folder: Path) -> list[Path]:
    return sorted((folder / "clips" / "test").glob("*/*.mp4"))


def test_the_page_has_a_row_for_each_step_and_a_cell_for_each_frame(stream: Path, tmp_path: Path) -> None:
    pages = []
    for name in ("one.html", "two.html"):
        done = avcil("attention", stream / "stream<b>", *clips_of(stream), "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
        pages.append((tmp_path / name).read_text())
    assert pages[0] == pages[1]
    page = pages[0]
    assert len(re.findall('<div class="cell">', page)) == 3 * 2 * 4
    assert page.count("data:audio/wav;base64,") == 3
    assert page.count("step 1 · predicted ") == 3
    assert "stream&lt;b&gt;" in page
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_the_picture_and_the_shares_of_chosen_steps(stream: Path, tmp_path: Path) -> None:
    words = "--steps", "1", "--regions", stream / "clips" / "regions.json", "-o", tmp_path / "figure.png"
    done = avcil("attention", stream / "stream<b>", *clips_of(stream), *words)
    assert done.exit_code == 0, done.output
    assert "Attention on the sounding region" in done.output
    assert "(3/3)" in done.output
    assert "step 1" in done.output
    assert "step 0" not in done.output
    picture = Image.open(io.BytesIO((tmp_path / "figure.png").read_bytes()))
    assert picture.format == "PNG"
    assert picture.width > picture.height > 300


def test_the_video_shows_every_step_and_keeps_the_sound(stream: Path, tmp_path: Path) -> None:
    words = "--regions", stream / "clips" / "regions.json", "-o", tmp_path / "figure.mp4"
    done = avcil("attention", stream / "stream<b>", *clips_of(stream)[:2], *words)
    assert done.exit_code == 0, done.output
    data = (tmp_path / "figure.mp4").read_bytes()
    info = probe_clip(data, "figure")
    assert (info.frames_per_second, info.duration) == (FILM_RATE, pytest.approx(2.0, abs=0.3))  # two clips of a second
    assert info.height > 2 * 224  # a row for each of two steps
    film = decode_clip(data, num_frames=20, sample_rate=16000, silent="error", where="figure")
    sound = film.waveform[:16000].double().numpy()
    [clip] = prepare_clips([str(clips_of(stream)[0])], ClipInputs.of(ClipConfig(**CLIP)))
    spectra = [np.abs(np.fft.rfft(part[1600:14400])) for part in (sound, clip.waveform)]
    assert np.corrcoef(*spectra)[0, 1] > 0.9
    assert (film.frames[0] != film.frames[5]).any()


def test_the_evidence_for_a_class_is_another_map(stream: Path, tmp_path: Path) -> None:
    pages = {}
    for words in (["attention"], ["evidence"], ["evidence", "--class", "cat"]):
        output = tmp_path / "a.html"
        done = avcil("attention", stream / "stream<b>", clips_of(stream)[0], "-o", output, "--heat", *words)
        assert done.exit_code == 0, done.output
        pages[" ".join(words)] = output.read_text()
    assert len(set(pages.values())) == 3
    assert "evidence of a part of the frame" in pages["evidence"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{stream}", "{clip}", "--class", "bus", "--heat", "evidence", "-o", "{out}/a.html"], "is not seen at step 0"),
        (["{stream}", "-o", "{out}/a.html"], "no clip among"),
        (["{clip}", "-o", "{out}/a.html"], "no stream with a committed step among"),
        (["{stream}", "{clip}", "-o", "{out}/a.gif"], "written as .html, .png, .mp4"),
        (["{stream}", "{clip}", "--steps", "0,7", "-o", "{out}/a.html"], "has the committed steps 0, 1"),
        (["{stream}", "{out}/none.mp4", "-o", "{out}/a.html"], "none.mp4"),
        (["{stream}", "{clip}", "--regions", "{out}/regions.json", "-o", "{out}/a.html"], "has no region of"),
    ],
)
def test_mistakes_are_one_line(stream: Path, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "regions.json").write_text("{}")
    names = {"stream": stream / "stream<b>", "clip": clips_of(stream)[0], "out": tmp_path}
    done = avcil("attention", *(word.format(**names) for word in words))
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.splitlines()) == 1


def test_a_stream_on_features_has_no_attention_on_clips(stream: Path, tmp_path: Path) -> None:
    save_artifact(str(tmp_path / "features"), make_artifact())
    done = avcil("attention", tmp_path / "features", clips_of(stream)[0], "-o", tmp_path / "a.html")
    assert done.exit_code == 2
    assert "trained on features" in done.output
