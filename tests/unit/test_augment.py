"""Augmentation of training clips: its effect, and that it depends on seed, clip and epoch only."""

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import AugmentConfig, ClipConfig, DataConfig
from avcil_dist.data.augment import Augmentation
from avcil_dist.data.batch import Batch
from avcil_dist.data.decode import DecodedClip
from avcil_dist.data.loader import load_batches, load_on_device
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.sampler import FixedSampler, TrainingSampler
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import ConfigError
from avcil_dist.seeds import derive_seed
from avcil_dist.world import World
from tests.helpers.rendered import tiny_manifest

torch.set_num_threads(1)
CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
ALL = AugmentConfig(
    crop=0.3, flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, time_mask=20, mel_mask=10
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Two classes of 4 training clips."""
    return tiny_manifest(tmp_path_factory.mktemp("clips"), ("cat", "dog"), {"train": 4})


def frames(count: int = 3) -> torch.Tensor:
    """The same picture again and again."""
    picture = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return picture.expand(count, -1, -1, -1)


def test_all_frames_of_a_clip_are_augmented_alike() -> None:
    made = [Augmentation(ALL, 32).augment_frames(frames(), seed) for seed in range(8)]
    for augmented in made:
        assert augmented.shape == (3, 3, 32, 32)
        assert augmented.dtype == torch.uint8
        assert torch.equal(augmented, augmented[:1].expand_as(augmented))
    assert len({bytes(augmented.numpy()) for augmented in made}) == 8


@pytest.mark.parametrize("setting", ["crop", "flip", "brightness", "contrast", "saturation", "hue"])
def test_each_setting_of_frames_has_an_effect_alone(setting: str) -> None:
    alone = AugmentConfig.model_validate({setting: getattr(ALL, setting)})
    made = {bytes(Augmentation(alone, 32).augment_frames(frames(1), seed).numpy()) for seed in range(20)}
    assert len(made) == 2 if setting == "flip" else len(made) > 15


def test_a_crop_of_everything_and_a_certain_flip_mirror_the_picture() -> None:
    plain = Augmentation(AugmentConfig(), 32).augment_frames(frames(), 5)
    assert torch.equal(Augmentation(AugmentConfig(flip=1.0), 32).augment_frames(frames(), 5), plain.flip(-1))


@pytest.mark.parametrize(("setting", "axis"), [("time_mask", 0), ("mel_mask", 1)])
def test_mask_sets_a_span_to_the_mean_and_leaves_the_rest(setting: str, axis: int) -> None:
    log_mel = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) + 1
    longest, widths, starts = getattr(ALL, setting), set(), set()
    for seed in range(200):
        masked = Augmentation(AugmentConfig.model_validate({setting: longest}), 32).augment_sound(log_mel, seed)
        gone = (masked == 0).all(dim=1 - axis)
        assert torch.equal(masked[masked != 0], log_mel[masked != 0])
        assert int((masked == 0).sum()) == int(gone.sum()) * masked.shape[1 - axis]
        places = gone.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[0] + len(places))) if places else True
        widths.add(len(places))
        starts.update(places[:1])
    assert widths == set(range(longest))
    assert len(starts) > 5


def test_without_settings_a_clip_is_unchanged() -> None:
    clip = DecodedClip(frames(2), torch.rand(8000))
    for plain, seeded in zip(ClipTransform(CLIP)(clip), ClipTransform(CLIP)(clip, 3), strict=True):
        assert torch.equal(plain, seeded)


def test_augmentation_depends_on_the_seed_only_and_moves_no_generator() -> None:
    clip, transform = DecodedClip(frames(2), torch.rand(8000)), ClipTransform(CLIP, ALL)
    first = transform(clip, 7)
    torch.manual_seed(123)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())
    transform(clip, 8)
    again = transform(clip, 7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before[1:]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_draws_are_those_of_the_libraries_with_the_seed() -> None:
    made = Augmentation(ALL, 32)
    torch.manual_seed(derive_seed(7, "pictures"))
    assert torch.equal(made._transform(frames()), made.augment_frames(frames(), 7))


def training(manifest: Manifest, augment: AugmentConfig = ALL, **changes: object) -> TrainingSampler:
    """Two epochs of two batches of cats; three dogs are exemplars, and go through two and two thirds of a pass."""
    source = TrainingSampler(
        manifest=manifest,
        classes=("cat",),
        exemplars=manifest.clips(["dog"], "train")[:3],
        data=DataConfig(manifest=f"{manifest.root}/manifest.json", clip=CLIP, augment=augment),
        optim=OptimConfig(epochs=2, global_batch=2, global_replay_batch=2),
        seed=3,
        step=1,
        world=World(rank=0, size=1),
    )
    return replace(source, **changes)


def load(source: TrainingSampler | FixedSampler, manifest: Manifest, workers: int = 0) -> list[Batch]:
    data = DataConfig(manifest=f"{manifest.root}/manifest.json", clip=CLIP, augment=ALL, decode_workers=workers)
    return list(load_batches(source, manifest=manifest, labels={"cat": 0, "dog": 1}, data=data))


def content(batch: Batch, row: int) -> bytes:
    return bytes(batch.visual[row].numpy()) + bytes(batch.audio[row].numpy())


def rows(batches: list[Batch]) -> list[bytes]:
    return [content(batch, row) for batch in batches for row in range(len(batch.labels))]


def test_every_appearance_of_a_clip_is_another_and_exemplars_are_augmented_too(clips: Manifest) -> None:
    source = training(clips)
    batches = load(source, clips)
    assert all(batch.valid.all() for batch in batches)
    assert len(set(rows(batches))) == 16
    plain = rows(load(training(clips, AugmentConfig()), clips))
    assert len(set(plain)) == 4 + 3
    assert not set(rows(batches)) & set(plain)
    passes = [request.augment_seeds.epochs.tolist() for request in source if request.augment_seeds]
    assert passes == [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 2, 2]]
    assert all(request.augment_seeds is None for request in training(clips, AugmentConfig()))


@pytest.mark.slow
def test_the_draws_are_the_same_on_any_world_size_with_any_workers_and_after_a_resume(clips: Manifest) -> None:
    whole = load(training(clips), clips)
    assert rows(load(training(clips), clips, workers=2)) == rows(whole)
    for start in (1, 2, 3):
        assert rows(load(training(clips, start=start), clips)) == rows(whole[start:])
    ranks = [load(training(clips, world=World(rank=rank, size=2)), clips) for rank in range(2)]
    for all_rows, first, second in zip(whole, *ranks, strict=True):
        assert [content(all_rows, row) for row in range(4)] == [
            content(batch, row) for row in range(2) for batch in (first, second)
        ]


def test_batches_and_draws_of_the_network_do_not_disturb_each_other(clips: Manifest) -> None:
    data = DataConfig(manifest=f"{clips.root}/manifest.json", clip=CLIP, augment=ALL, decode_workers=0)
    source = training(clips, optim=OptimConfig(epochs=4, global_batch=2, global_replay_batch=2))
    expected = rows(load(source, clips))
    torch.manual_seed(0)
    batches, drawn = [], []
    arguments = {"manifest": clips, "labels": {"cat": 0, "dog": 1}, "data": data, "device": torch.device("cpu")}
    for batch in load_on_device(source, **arguments):
        batches.append(batch)
        drawn += [torch.nn.functional.dropout(torch.ones(100, 100), 0.5) for _ in range(40)]
    assert rows(batches) == expected
    torch.manual_seed(0)
    for mask in drawn:
        assert torch.equal(mask, torch.nn.functional.dropout(torch.ones(100, 100), 0.5))


def test_seed_and_step_draw_anew(clips: Manifest) -> None:
    first = [request.augment_seeds.seed_of(0, "cat-0") for request in training(clips) if request.augment_seeds]
    others = (training(clips, seed=4), training(clips, step=2))
    assert all(
        request.augment_seeds and request.augment_seeds.seed_of(0, "cat-0") not in first
        for other in others
        for request in other
    )


def test_one_pass_over_given_clips_is_never_augmented(clips: Manifest) -> None:
    numbers = clips.clips(["cat"], "train")[None]
    [batch] = load(FixedSampler(numbers), clips)
    plain = list(
        load_batches(
            FixedSampler(numbers),
            manifest=clips,
            labels={"cat": 0, "dog": 1},
            data=DataConfig(manifest="clips", clip=CLIP, decode_workers=0),
        )
    )
    assert rows([batch]) == rows(plain)


def test_request_can_be_pickled(clips: Manifest) -> None:
    request = next(iter(training(clips)))
    copied = pickle.loads(pickle.dumps(request))
    assert copied.augment_seeds.seed_of(1, "cat-1") == request.augment_seeds.seed_of(1, "cat-1")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("ave_ci", ["data.augment.flip=0.5"], "data.augment applies to clips, not to precomputed features"),
        ("demo", ["data.augment.flip=1.5"], "data.augment.flip: 1.5: Input should be less than or equal to 1"),
        ("demo", ["data.augment.time_mask=161"], "augment.time_mask=161 is more than clip.mel_frames=160"),
        ("demo", ["data.augment.mel_mask=33"], "augment.mel_mask=33 is more than clip.mel_bins=32"),
        ("demo", ["data.augment.cropp=0.5"], "data.augment.cropp: unknown key; did you mean 'crop'?"),
    ],
)
def test_impossible_augmentation_is_refused_in_one_line(name: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(name, words)
    assert "\n" not in str(raised.value)
    assert message in str(raised.value)
