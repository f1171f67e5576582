"""Kill the processes of small streams again and again, and compare what comes out with undisturbed streams.

python -m tests.soak --kills 100 --seed 1
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from launch.sandbox.cluster import Sandbox
from tests.helpers.mlflow_server import TrackingServer
from tests.slurm.conftest import missing
from tests.soak import scenes

# Kills of each kind among 100.
SHARES = {"trainer": 14, "rank": 14, "launcher": 14, "server": 14, "sender": 24, "supervisor": 12, "slurmd": 8}
ROUND = 50


def shares(kills: int, kinds: list[str]) -> dict[str, int]:
    """Divide the kills among the kinds in proportion to SHARES; the first kind takes the remainder."""
    total = sum(SHARES[kind] for kind in kinds)
    counts = {kind: kills * SHARES[kind] // total for kind in kinds}
    counts[kinds[0]] += kills - sum(counts.values())
    return counts


def run(folder: Path, options: argparse.Namespace) -> scenes.Soak:
    """Run all scenes in a folder, in rounds of at most ROUND kills. Returns their counts and faults."""
    (folder / "server").mkdir()
    server = TrackingServer(folder / "server", f"{folder}/artifacts", {})
    server.start()
    try:
        deadline = time.monotonic() + 60 * options.minutes
        soak = scenes.Soak(folder, server, random.Random(options.seed), deadline)
        for first in range(0, options.kills, ROUND):
            counts = shares(min(ROUND, options.kills - first), options.kinds.split(","))
            mixed = [kind for kind in ("trainer", "rank", "launcher", "server") for _ in range(counts.get(kind, 0))]
            soak.moment.shuffle(mixed)
            scenes.sender(soak, counts.get("sender", 0))
            scenes.local(soak, mixed)
            scenes.supervisor(soak, counts.get("supervisor", 0))
            if counts.get("slurmd") and not soak.is_over:
                with_slurm(soak, counts["slurmd"])
        return soak
    finally:
        server.kill()


def with_slurm(soak: scenes.Soak, count: int) -> None:
    """Run the scene of a cluster in a sandbox of its own."""
    if reason := missing():
        print(f"no kills of slurmd: {reason}", file=sys.stderr)
        return
    folder = Path(tempfile.mkdtemp(prefix="avcil-slurm-"))  # a socket's path must be short
    sandbox = Sandbox(folder)
    os.environ["SLURM_CONF"] = str(sandbox.conf)
    try:
        sandbox.up()
        scenes.slurmd(soak, sandbox, count)
    finally:
        sandbox.down()
        shutil.rmtree(folder, ignore_errors=True)


def table(soak: scenes.Soak, seconds: float) -> str:
    """The result in Markdown."""
    rows = "\n".join(f"| {kind} | {count} |" for kind, count in soak.kills.items())
    ended = ", ".join(f"{count} by {way}" for way, count in soak.streams.items())
    return (
        f"| killed (SIGKILL) | times |\n|---|---:|\n{rows}\n| all | {sum(soak.kills.values())} |\n\n"
        f"{sum(soak.streams.values())} streams ended ({ended}) in {seconds / 60:.0f} min; {soak.values} values of "
        f"metrics compared with the server, and all artifacts; faults: {len(soak.faults)}"
    )


def main() -> int:
    """Run the soak and print its table. Returns 1 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=240, help="no kill after that; the streams still end")
    parser.add_argument("--kinds", default=",".join(SHARES), help="of: " + ", ".join(SHARES))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    begun, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="avcil-soak-"))
    soak = run(folder, options)
    print(table(soak, time.monotonic() - begun))
    for fault in soak.faults:
        print(f"\n{fault}")
    if not soak.faults:
        shutil.rmtree(folder)
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
