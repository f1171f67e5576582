from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.decode import DecodedClip, decode_clip, probe_clip
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from data_shards.synthetic import (
    SyntheticSpec,
    _class_look,
    _sounding_look,
    render_clip,
    render_dataset,
    sounding_region,
)

torch.set_num_threads(1)
SPEC = SyntheticSpec(num_classes=2, clips={"train": 3, "test": 1}, seconds=1.0, size=32, frames_per_second=8)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _decoded(number: int, index: int, spec: SyntheticSpec = SyntheticSpec()) -> DecodedClip:  # noqa: B008
    data = render_clip(spec, "train", number, index)
    return decode_clip(data, num_frames=20, sample_rate=16000, silent="error", where="clip")


def test_csv_lists_every_clip_once_and_all_exist(tmp_path: Path) -> None:
    called = []
    path = render_dataset(tmp_path, SPEC, progress=lambda: called.append(1), processes=1)
    lines = path.read_text().splitlines()
    assert lines[0] == "path,label,split,region"
    assert len(lines) - 1 == len(set(lines)) - 1 == len(called) == SPEC.num_clips == 8
    for line in lines[1:]:
        name, label, split, _ = line.split(",")
        assert (tmp_path / name).is_file()
        assert name.startswith(f"{split}/{label}/")


def test_clips_are_h264_and_have_sound_of_the_given_length() -> None:
    info = probe_clip(render_clip(SPEC, "train", 0, 0), "clip")
    assert (info.width, info.height, info.frames_per_second, info.sample_rate) == (32, 32, 8.0, 16000)
    assert info.duration == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_bytes_follow_from_the_seed_whatever_the_processes(tmp_path: Path) -> None:
    render_dataset(tmp_path / "one", SPEC, processes=1)
    render_dataset(tmp_path / "two", SPEC, processes=2)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


def test_another_seed_gives_other_clips() -> None:
    other = SyntheticSpec(num_classes=2, clips={"train": 1}, seconds=1.0, size=32, frames_per_second=8, seed=1)
    assert render_clip(SPEC, "train", 0, 0) != render_clip(other, "train", 0, 0)
    assert render_clip(SPEC, "train", 0, 0) != render_clip(SPEC, "train", 0, 1)
    assert render_clip(SPEC, "train", 0, 0) != render_clip(SPEC, "test", 0, 0)


def test_second_run_keeps_existing_clips_and_adds_missing_ones(tmp_path: Path) -> None:
    render_dataset(tmp_path, SPEC, processes=1)
    kept, lost = tmp_path / "train/class_000/train-000-00000.mp4", tmp_path / "train/class_001/train-001-00002.mp4"
    before = lost.read_bytes()
    kept.write_bytes(b"kept")
    lost.unlink()
    render_dataset(tmp_path, SPEC, processes=1)
    assert kept.read_bytes() == b"kept"
    assert lost.read_bytes() == before


def test_folder_of_another_spec_is_refused(tmp_path: Path) -> None:
    render_dataset(tmp_path, SPEC, processes=1)
    other = SyntheticSpec(num_classes=2, clips={"train": 1}, seconds=1.0, size=32, frames_per_second=8, seed=1)
    with pytest.raises(ConfigError, match="other settings"):
        render_dataset(tmp_path, other, processes=1)


@pytest.mark.parametrize("change", [{"size": 33}, {"seconds": 0.0}, {"clips": {"trian": 1}}, {"num_classes": 0}])
def test_impossible_spec_is_refused_before_anything_is_written(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        render_dataset(tmp_path / "out", SyntheticSpec(**change), processes=1)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_looks_of_309_classes_are_distinct() -> None:
    looks = [_class_look(number) for number in range(309)]
    values = np.array(
        [[*look.colours.ravel(), look.orientation, look.stripes, np.log(look.pitch), look.pulse] for look in looks]
    )
    scaled = (values - values.mean(0)) / values.std(0)
    distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=-1) + 1e9 * np.eye(309)
    assert distances.min() > 0.3
    assert min(look.pitch for look in looks) >= 150
    assert max(look.pitch for look in looks) <= 1500


def test_part_of_the_picture_pulses_with_the_sound() -> None:
    clip = _decoded(0, 0)
    loudness = clip.waveform[:32000].reshape(20, -1).square().mean(1).sqrt()
    saturation = (clip.frames.float().amax(1) - clip.frames.float().amin(1)).reshape(20, 2, 32, 2, 32).mean((2, 4))
    per_cell = saturation.reshape(20, 4)
    correlation = [float(torch.corrcoef(torch.stack([loudness, per_cell[:, cell]]))[0, 1]) for cell in range(4)]
    assert max(correlation) > 0.9
    assert sorted(correlation)[-2] < 0.6


@pytest.mark.slow
def test_a_linear_map_learns_the_classes_from_sound() -> None:
    assert _accuracy(_sound_features) > 0.9


@pytest.mark.slow
def test_a_linear_map_learns_from_the_pictures_more_than_chance() -> None:
    # distractors wear other classes' colours, so colour alone must not be enough, nor useless
    assert 0.3 < _accuracy(_colour_features) < 1.0


def _sound_features(clip: DecodedClip) -> torch.Tensor:
    return ClipTransform(ClipConfig(size=32, mel_frames=200, mel_bins=64))(clip)[1].mean(0)


def _colour_features(clip: DecodedClip) -> torch.Tensor:
    colours = torch.nn.functional.avg_pool2d(clip.frames.float() / 255, 4)
    return torch.cat([colours.std(0).flatten(1).mean(1), colours.amax((0, 2, 3)), colours.mean((0, 2, 3))])


def _accuracy(features) -> float:
    """Test accuracy of ridge regression on 12 training clips of each of 4 classes."""

    def rows(indices: range) -> torch.Tensor:
        return torch.stack([features(_decoded(number, index, spec)) for number in range(4) for index in indices])

    spec = SyntheticSpec(num_classes=4)
    train, test = rows(range(12)), rows(range(12, 18))
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    train, test = [torch.cat([(x - mean) / deviation, torch.ones(len(x), 1)], 1) for x in (train, test)]
    targets = torch.eye(4).repeat_interleave(12, 0)
    weights = torch.linalg.solve(train.T @ train + torch.eye(train.shape[1]), train.T @ targets)
    return float(((test @ weights).argmax(1) == torch.arange(4).repeat_interleave(6)).float().mean())


HARD = SyntheticSpec(num_classes=6, clips={"train": 2}, seconds=1.0, size=64, frames_per_second=8, hard=True)


def test_classes_of_a_hard_data_set_share_looks_and_tones_and_no_two_have_both() -> None:
    pairs = [HARD.look_of(number) for number in range(HARD.num_classes)]
    assert len(set(pairs)) == 6
    assert pairs == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_the_pulse_of_a_hard_clip_says_nothing_about_its_class_and_its_region_is_that_of_the_pulse() -> None:
    looks = [_sounding_look(HARD, 3, np.random.default_rng(seed)) for seed in range(4)]
    assert len({look.pulse for look in looks}) == 4
    assert {look.pitch for look in looks} == {_class_look(1).pitch}
    assert {look.orientation for look in looks} == {_class_look(0).orientation}
    spec = replace(HARD, seconds=4.0, num_classes=4)
    hits = 0
    for index in range(4):
        clip = decode_clip(
            render_clip(spec, "train", 1, index), num_frames=32, sample_rate=16000, silent="error", where="clip"
        )
        loudness = np.square(clip.waveform[:64000].numpy()).reshape(32, -1).mean(axis=1) ** 0.5
        brightness = clip.frames.float().mean(dim=1).numpy()
        top, left, bottom, right = (round(64 * edge) for edge in sounding_region(spec, "train", 1, index))
        cells = [
            np.corrcoef(brightness[:, row : row + 32, column : column + 32].mean(axis=(1, 2)), loudness)[0, 1]
            for row in (0, 32)
            for column in (0, 32)
        ]
        assert (bottom - top, right - left) == (32, 32)
        hits += int(np.argmax(cells)) == 2 * (top // 32) + left // 32
    assert hits >= 3


def test_a_folder_of_an_earlier_version_is_continued(tmp_path: Path) -> None:
    render_dataset(tmp_path, SPEC, processes=1)
    assert "hard" not in (tmp_path / "spec.json").read_text()
    with pytest.raises(ConfigError, match="other settings"):
        render_dataset(tmp_path, replace(SPEC, hard=True), processes=1)
