"""Time of small streams, of which much is their start: `python -m tests.benchmarks.small_runs`.

AV-CIL on random features of the size of a 40-class set with 2,520 clips of (16, 256) tokens: 5 steps of 8 classes,
batches of 128 clips and 64 exemplars.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_shards.random_features import make_feature_shards

CONFIG = """\
extends: ks_ci
name: small
data: {manifest: shards/manifest.json}
scenario: {classes_per_step: 8}
optim: {global_batch: 128, global_replay_batch: 64}
"""


def seconds(folder: Path, *words: str) -> float:
    """Run `avcil` in a folder; return the time from its start to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "avcil_dist", *words], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--streams", type=int, default=2, help="of the sweep")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        clips = {"train": 45, "val": 8, "test": 10}
        make_feature_shards(folder / "shards", classes=40, clips=clips, frames=8, positions=2, dim=256)  # type: ignore[arg-type]
        (folder / "small.yaml").write_text(CONFIG)
        for epochs in dict.fromkeys((1, arguments.epochs)):
            found = seconds(folder, "train", "small.yaml", f"optim.epochs={epochs}", f"output=train-{epochs}")
            print(f"one stream, 5 steps of {epochs} epochs: {found:.1f} s", flush=True)
        seeds = ",".join(str(seed) for seed in range(arguments.streams))
        for parallel in dict.fromkeys((1, arguments.streams)):
            words = (f"seed={seeds}", f"optim.epochs={arguments.epochs}", f"output=sweep-{parallel}")
            found = seconds(folder, "sweep", "small.yaml", *words, "--parallel", str(parallel))
            print(f"sweep of {arguments.streams} streams, {parallel} at a time: {found:.1f} s", flush=True)


if __name__ == "__main__":
    main()
