"""Renderer of a labelled audio-visual data set of mp4 files, for tests, tutorials and measurements.

A class is a combination of a texture, a motion and a pulsing tone. In each clip one shape pulses in time with the
tone. Silent shapes with the looks of other classes are elsewhere in the picture and do not pulse. So the label is in
the picture, in the sound, and in which part of the picture makes the sound.

In a hard data set classes share looks and tones: only a look together with a tone is a class. Silent shapes pulse too,
out of time; a second, weaker tone of another class is out of time with all of them; picture and sound have more noise.
"""

import colorsys
import csv
import io
import math
import multiprocessing
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from pydantic import JsonValue

from avcil_dist import storage
from avcil_dist.data.clip_table import Region
from avcil_dist.data.shard import SPLITS
from avcil_dist.errors import ConfigError
from avcil_dist.seeds import generator
from avcil_dist.system.process_start import starting_worker
from data_shards.workers import begin_worker

# A class's number times such an irrational, modulo 1, spreads any number of classes evenly over a parameter;
# a different irrational for each parameter makes the parameters independent.
IRRATIONALS = np.array(
    [0.6180340, 0.4142136, 0.7320508, 0.3166248, 0.6457513, 0.3588989, 0.7958315, 0.3851648, 0.5677644]
)
CHUNK_CLIPS = 8
PULSES = (1.0, 3.0)  # Hz, of the shapes and tones of hard clips


@dataclass(frozen=True)
class SyntheticSpec:
    """Specification of a data set: clips per class and split, seconds, pixels (square), Hz."""

    num_classes: int = 8
    clips: Mapping[str, int] = field(default_factory=lambda: {"train": 40, "val": 8, "test": 10})
    seconds: float = 2.0
    size: int = 64
    frames_per_second: int = 10
    sample_rate: int = 16_000
    num_distractors: int = 2
    seed: int = 0
    hard: bool = False

    @property
    def num_looks(self) -> int:
        """Number of looks that the classes of a hard data set share; they share as many tones, or one less."""
        return math.ceil(math.sqrt(self.num_classes))

    def look_of(self, number: int) -> tuple[int, int]:
        """Return the numbers of the look and of the tone of a class."""
        return (number % self.num_looks, number // self.num_looks) if self.hard else (number, number)

    @property
    def picture_noise(self) -> float:
        """Deviation of the noise of a pixel, from 0 to 1."""
        return 0.12 if self.hard else 0.03

    @property
    def sound_noise(self) -> float:
        """Deviation of the noise of the sound."""
        return 0.04 if self.hard else 0.01

    @property
    def num_clips(self) -> int:
        """Total number of clips."""
        return self.num_classes * sum(self.clips.values())


@dataclass(frozen=True)
class _ClassLook:
    """Look and sound of a class. Angles in radians, rates in Hz; stripes are per shape radius."""

    colours: np.ndarray
    orientation: float
    stripes: float
    direction: float
    orbits: bool
    speed: float
    pitch: float
    pulse: float
    brightness: float


def render_dataset(
    folder: Path, spec: SyntheticSpec, *, progress: Callable[[], None] | None = None, processes: int = 1
) -> Path:
    """Write `folder/<split>/<class>/<key>.mp4` and `folder/clips.csv`; return the csv's path.

    The csv has path, label, split, and the part of the picture that makes the sound (see `sounding_region`);
    `folder/regions.json` has that part by key.
    The bytes depend on the spec alone, not on `processes`. Existing clips are kept, so a second run continues an
    interrupted one. `progress` is called once a clip. Raises ConfigError for a spec that cannot be rendered, or a
    folder that holds clips of another spec.
    """
    _check(folder, spec)
    clips = [
        (split, number, index)
        for split in SPLITS
        for number in range(spec.num_classes)
        for index in range(spec.clips.get(split, 0))
    ]
    chunks = [clips[i : i + CHUNK_CLIPS] for i in range(0, len(clips), CHUNK_CLIPS)]
    render = partial(_render_chunk, folder, spec)
    if processes == 1:
        regions = _collected(map(render, chunks), progress)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=begin_worker)
        try:
            with starting_worker("workers"):
                rendered = pool.map(render, chunks)
            regions = _collected(rendered, progress)
        finally:
            pool.shutdown(cancel_futures=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label", "split", "region"])
    rows.writerows(
        [_clip_path(*clip), class_name(clip[1]), clip[0], " ".join(map(repr, regions[_clip_key(*clip)]))]
        for clip in clips
    )
    storage.write_bytes(str(folder / "clips.csv"), text.getvalue().encode())
    storage.write_json(str(folder / "regions.json"), regions)
    return folder / "clips.csv"


def class_name(number: int) -> str:
    """The name of a rendered class: `class_007`."""
    return f"class_{number:03d}"


def render_clip(spec: SyntheticSpec, split: str, number: int, index: int) -> bytes:
    """Render one mp4 (H.264 and AAC) of class `number`."""
    random = generator(spec.seed, "synthetic clip", split, number, index)
    pulse_phase = random.uniform(0, 2 * np.pi)
    look = _sounding_look(spec, number, random)
    frames = _render_frames(spec, number, look, pulse_phase, random)
    return _encode(spec, frames, _render_sound(spec, number, look, pulse_phase, random))


def sounding_region(spec: SyntheticSpec, split: str, number: int, index: int) -> Region:
    """Return top, left, bottom, right of the cell of the sounding shape, as fractions of the picture."""
    random = generator(spec.seed, "synthetic clip", split, number, index)
    random.uniform(0, 2 * np.pi)
    look = _sounding_look(spec, number, random)
    _background(spec, random)  # the same draws as in `render_clip`
    row, column, cell = _shapes(spec, number, look, random)[0][1]
    return row / spec.size, column / spec.size, (row + cell) / spec.size, (column + cell) / spec.size


def _check(folder: Path, spec: SyntheticSpec) -> None:
    unknown = sorted(spec.clips.keys() - set(SPLITS))
    if unknown:
        raise ConfigError(f"clips: {unknown[0]!r} is none of {', '.join(SPLITS)}")
    if spec.num_classes < 1 or spec.num_clips < 1 or min(spec.clips.values()) < 0:
        raise ConfigError("at least one class and one clip are needed to render a data set")
    if spec.size % 2 or spec.size < 32:
        raise ConfigError(f"size: {spec.size}; give an even number (H.264) of at least 32 pixels (the shapes)")
    if spec.seconds * spec.frames_per_second < 1:
        raise ConfigError(f"seconds: {spec.seconds}; a clip needs at least one frame")
    spec_file = str(folder / "spec.json")
    look = {name: value for name, value in asdict(spec).items() if name != "clips" and (name != "hard" or value)}
    if storage.exists(spec_file) and storage.read_json(spec_file, dict[str, JsonValue], "settings") != look:
        raise ConfigError(f"{folder}: holds clips rendered with other settings; give another folder, or remove it")
    storage.write_json(spec_file, look)


def _collected(chunks: Iterable[dict[str, Region]], progress: Callable[[], None] | None) -> dict[str, Region]:
    """The regions of all chunks by key, in order; `progress` is called once a clip."""
    regions: dict[str, Region] = {}
    for chunk in chunks:
        regions |= chunk
        for _ in chunk:
            if progress:
                progress()
    return regions


def _render_chunk(folder: Path, spec: SyntheticSpec, clips: list[tuple[str, int, int]]) -> dict[str, Region]:
    for clip in clips:
        path = folder / _clip_path(*clip)
        if not path.exists():
            storage.write_bytes(str(path), render_clip(spec, *clip))
    return {_clip_key(*clip): sounding_region(spec, *clip) for clip in clips}


def _clip_path(split: str, number: int, index: int) -> str:
    return f"{split}/{class_name(number)}/{_clip_key(split, number, index)}.mp4"


def _clip_key(split: str, number: int, index: int) -> str:
    return f"{split}-{number:03d}-{index:05d}"


def _class_look(number: int) -> _ClassLook:
    hue, pitch, orientation, stripes, direction, speed, contrast, pulse, bright = (number * IRRATIONALS) % 1.0
    pair = (hue, (hue + 0.3 + 0.4 * contrast) % 1.0)
    return _ClassLook(
        colours=np.array([colorsys.hsv_to_rgb(pair[0], 0.85, 1.0), colorsys.hsv_to_rgb(pair[1], 0.85, 0.55)]),
        orientation=np.pi * orientation,
        stripes=0.4 + 0.8 * stripes,
        direction=2 * np.pi * direction,
        orbits=number % 2 == 1,
        speed=0.4 + 0.8 * speed,
        pitch=150.0 * 10.0**pitch,
        pulse=1.0 + 2.0 * pulse,
        brightness=0.3 + 0.6 * bright,
    )


def _sounding_look(spec: SyntheticSpec, number: int, random: np.random.Generator) -> _ClassLook:
    """Look and sound of a clip of class `number`; in a hard data set the pulse is the clip's, not the class's."""
    look, tone = map(_class_look, spec.look_of(number))
    if not spec.hard:
        return look
    return replace(look, pitch=tone.pitch, brightness=tone.brightness, pulse=random.uniform(*PULSES))


def _loudness(look: _ClassLook, phase: float, times: np.ndarray) -> np.ndarray:
    """The envelope of the tone and of its shape, in [0, 1]."""
    return (0.5 + 0.5 * np.sin(2 * np.pi * look.pulse * times + phase)) ** 2


def _render_frames(
    spec: SyntheticSpec, number: int, sounding: _ClassLook, pulse_phase: float, random: np.random.Generator
) -> np.ndarray:
    """(T, size, size, 3) uint8."""
    picture = _background(spec, random)
    times = np.arange(len(picture), dtype=np.float32) / spec.frames_per_second
    steady = np.full(len(picture), 0.4, dtype=np.float32)
    for index, (look, (row, column, cell)) in enumerate(_shapes(spec, number, sounding, random)):
        if index == 0:
            strength = _loudness(look, pulse_phase, times)
        else:
            strength = _loudness(look, random.uniform(0, 2 * np.pi), times) if spec.hard else steady
        _draw_shape(picture[:, row : row + cell, column : column + cell], look, times, strength, random)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def _background(spec: SyntheticSpec, random: np.random.Generator) -> np.ndarray:
    """(T, size, size, 3) float32: a grey ramp with noise."""
    num_frames, size = round(spec.seconds * spec.frames_per_second), spec.size
    level, slope = random.uniform(0.2, 0.4), random.uniform(-0.1, 0.1, 2)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    background = level + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    noise = spec.picture_noise * random.standard_normal((num_frames, size, size), dtype=np.float32)
    return np.repeat((background + noise).astype(np.float32)[..., None], 3, axis=-1)


def _shapes(
    spec: SyntheticSpec, number: int, sounding: _ClassLook, random: np.random.Generator
) -> list[tuple[_ClassLook, tuple[int, int, int]]]:
    """Looks of the sounding shape, then of the silent ones, with row, column and side of the cell that each moves in.

    The cells do not overlap, so the shapes do not.
    """
    own = spec.look_of(number)[0]
    others = sorted({spec.look_of(other)[0] for other in range(spec.num_classes)} - {own})
    distractors = random.permutation(others)[: spec.num_distractors]
    looks = [sounding]
    for other in distractors:
        look = _class_look(int(other))
        looks.append(replace(look, pulse=random.uniform(*PULSES)) if spec.hard else look)
    side = int(np.ceil(np.sqrt(len(looks))))
    cell = spec.size // side
    places = [divmod(int(position), side) for position in random.permutation(side * side)[: len(looks)]]
    return [(look, (row * cell, column * cell, cell)) for look, (row, column) in zip(looks, places, strict=True)]


def _draw_shape(
    canvas: np.ndarray, look: _ClassLook, times: np.ndarray, strength: np.ndarray, random: np.random.Generator
) -> None:
    """Draw one moving disc into `canvas` (T, cell, cell, 3); `strength` (T,) is its brightness and size."""
    cell = canvas.shape[1]
    phase = 2 * np.pi * look.speed * times + random.uniform(0, 2 * np.pi)
    along, across = np.sin(phase), np.cos(phase) if look.orbits else np.zeros_like(phase)
    turn = np.exp(1j * look.direction)
    path = 0.14 * cell * (along + 1j * across) * turn
    centre = cell * (0.5 + random.uniform(-0.04, 0.04, 2))
    radius = cell * random.uniform(0.24, 0.28) * (0.75 + 0.4 * strength)

    grid = np.arange(cell, dtype=np.float32)
    dx = (grid[None, None, :] - (centre[0] + path.real)[:, None, None]).astype(np.float32)
    dy = (grid[None, :, None] - (centre[1] + path.imag)[:, None, None]).astype(np.float32)
    disc = np.clip(radius[:, None, None] - np.sqrt(dx * dx + dy * dy) + 0.5, 0, 1).astype(np.float32)
    wave = look.stripes * 2 * np.pi / radius.mean()
    stripes = np.sin(wave * (dx * np.float32(np.cos(look.orientation)) + dy * np.float32(np.sin(look.orientation))))
    mix = (0.5 + 0.5 * np.tanh(3 * stripes)).astype(np.float32)[..., None]
    colours = look.colours.astype(np.float32)
    shape = (colours[0] * mix + colours[1] * (1 - mix)) * (0.35 + 0.65 * strength)[:, None, None, None]
    canvas += disc[..., None] * (shape.astype(np.float32) - canvas)


def _render_sound(
    spec: SyntheticSpec, number: int, look: _ClassLook, pulse_phase: float, random: np.random.Generator
) -> np.ndarray:
    """(samples,) float32: the class's tone under its envelope, and noise; in a hard data set a weaker tone too."""
    times = np.arange(round(spec.seconds * spec.sample_rate)) / spec.sample_rate
    tone = _tone(spec, look, times, random)
    loudness = (0.1 + 0.9 * _loudness(look, pulse_phase, times)).astype(np.float32)
    noise = np.float32(spec.sound_noise) * random.standard_normal(times.size, dtype=np.float32)
    sound = np.float32(0.2 * random.uniform(0.5, 1.5)) * tone * loudness + noise
    tones = sorted({spec.look_of(other)[1] for other in range(spec.num_classes)} - {spec.look_of(number)[1]})
    if spec.hard and tones:
        other = replace(_class_look(int(random.choice(tones))), pulse=random.uniform(*PULSES))
        envelope = _loudness(other, random.uniform(0, 2 * np.pi), times).astype(np.float32)
        sound += np.float32(0.08) * _tone(spec, other, times, random) * envelope
    return sound


def _tone(spec: SyntheticSpec, look: _ClassLook, times: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(samples,) float32: the look's pitch, a little out of tune, and its harmonics."""
    pitch = look.pitch * 2.0 ** random.normal(0, 0.01)
    tone = np.zeros(times.size, dtype=np.float32)
    for harmonic in range(1, 5):
        if harmonic * pitch < 0.45 * spec.sample_rate:
            angle = (2 * np.pi * harmonic * pitch * times + random.uniform(0, 2 * np.pi)) % (2 * np.pi)
            tone += np.float32(look.brightness ** (harmonic - 1)) * np.sin(angle.astype(np.float32))
    return tone


def _encode(spec: SyntheticSpec, frames: np.ndarray, sound: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream("libx264", rate=spec.frames_per_second)
        video.width, video.height, video.pix_fmt, video.thread_count = spec.size, spec.size, "yuv420p", 1
        video.options = {"preset": "ultrafast", "crf": "26"}
        audio: Any = container.add_stream("aac", rate=spec.sample_rate, layout="mono")
        audio.options = {"aac_coder": "fast"}
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(sound.clip(-1, 1)[None], format="fltp", layout="mono")
        block.sample_rate = spec.sample_rate
        container.mux(audio.encode(block))
        container.mux(audio.encode(None))
    return buffer.getvalue()
