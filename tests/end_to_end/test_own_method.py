"""The example package beside a built wheel, without a checkout: trained, killed, resumed, used for prediction."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_shards.build import build_shards
from data_shards.synthetic import SyntheticSpec, render_dataset

ROOT = Path(__file__).parents[2]
WORDS = (
    "method=own_replay",
    "model.visual={kind: mean_colour, dim: 16}",
    "model.audio.dim=16",
    "optim.epochs=2",
    "optim.global_batch=6",
    "data.clip.mel_frames=48",
    "tracking.register_as=none",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages, installed from wheels; all others are those of this environment."""
    folder = tmp_path_factory.mktemp("own")
    for name, source in (("avcil", ROOT), ("own", ROOT / "examples" / "own_method")):
        copy = folder / f"{name}-source"  # a build leaves its traces where the source is
        ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__", "tests")
        shutil.copytree(source, copy, ignore=ignored)
        words = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(copy)]
        subprocess.run([sys.executable, *words], check=True)
    wheels = [str(path) for path in folder.glob("*.whl")]
    words = ["-m", "pip", "install", "--no-deps", "-q", "--target", str(folder / "site"), *wheels]
    subprocess.run([sys.executable, *words], check=True)
    return folder / "site"


def environment(site: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def run(site: Path, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment(site), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def kill_after(file: Path, site: Path, folder: Path, *words: str) -> None:
    """Run Python as `run` does, and kill it, with the processes that it started, as soon as a file is there."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment(site),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_the_package_trains_continues_after_a_kill_resumes_and_predicts_without_a_checkout(
    site: Path, tmp_path: Path
) -> None:
    clips = {"train": 6, "val": 2, "test": 2}
    listing = render_dataset(tmp_path / "clips", SyntheticSpec(num_classes=4, clips=clips, seconds=1.0, size=32))
    build_shards(listing, str(tmp_path / "shards"), clips_per_shard=8, min_seconds=0.1)
    avcil = ("-m", "avcil_dist")
    train = (*avcil, "train", "demo", "data.manifest=shards/manifest.json", *WORDS)
    stream = tmp_path / "runs" / "demo-own_replay-seed0"
    kill_after(stream / "step_000" / "COMMITTED.json", site, tmp_path, *train)
    assert not (stream / "step_001" / "COMMITTED.json").exists()
    continued = run(site, tmp_path, *train)
    assert "step 0 of 2" not in continued.stderr
    assert "step 1 of 2" in continued.stderr
    weights = (stream / "step_001" / "model.safetensors").read_bytes()
    shutil.rmtree(stream)
    resumed = run(site, tmp_path, *avcil, "resume", "demo-own_replay-seed0", "--from-step", "0", "--fork", "seed=1")
    assert "demo-fork-own_replay-seed1" in resumed.stdout
    forked = tmp_path / "runs" / "demo-fork-own_replay-seed1"
    assert (forked / "step_001" / "COMMITTED.json").is_file()
    assert (forked / "step_001" / "model.safetensors").read_bytes() != weights
    clip = next((tmp_path / "clips").rglob("*.mp4"))
    code = (
        "import sys, avcil_dist as avcil; assert avcil.__file__.startswith(sys.argv[3]);"
        "stream = avcil.Stream(sys.argv[1]); print(stream.predict([sys.argv[2]])[0].class_name)"
    )
    predicted = run(site, tmp_path, "-c", code, str(forked), str(clip), str(site))
    assert predicted.stdout.startswith("class_00")
    assert "own_replay: Replay with smoothed labels." in run(site, tmp_path, *avcil, "methods").stdout


def test_the_packages_own_tests_pass(site: Path, tmp_path: Path) -> None:
    tests = ROOT / "examples" / "own_method" / "tests"
    run(
        site,
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tests}",
        "-c",
        os.devnull,
        str(tests),
    )
