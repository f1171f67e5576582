"""Accuracy of methods over seeds, with a paired test.

    python -m tests.benchmarks.methods CONFIG --methods avcil,anchored optim.epochs=10

All streams run in this process, one after the other; a second call continues. The table has mean accuracy, last
accuracy and average forgetting in %, mean ± sample deviation over seeds, the mean difference of the mean accuracy to
the first method, and the p of the two-sided t-test of paired seeds.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from scipy.stats import ttest_rel

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.stream import next_step, stream_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.preflight import preflight
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World


def run(config: Config) -> StreamMetrics:
    """Run the steps of a stream that are not committed; return its metrics."""
    scenario = preflight(config, [1], restart=False)
    for step in range(next_step(stream_url(config), scenario.num_steps), scenario.num_steps):
        step_in_group(config, step, world=World(), observers=[], device=torch.device("cpu"), stop=StopRequest())
    return load_artifact(stream_url(config), scenario.num_steps - 1).metrics


def spread(values: Sequence[float | None]) -> str:
    """Return mean ± sample deviation in %."""
    found = 100 * np.array(values, dtype=float)
    return f"{found.mean():.1f} ± {found.std(ddof=1):.1f}" if len(found) > 1 else f"{found.mean():.1f}"


def main() -> None:
    """Run all streams and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", required=True, help="separated by commas; NAME+KEY=VALUE for a setting of one")
    parser.add_argument("--seeds", default="1,2,3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    first: list[float] = []
    print("| method | mean | last | forgetting | difference | p | memory, MB |\n|---|---|---|---|---|---|---|")
    for words in arguments.methods.split(","):
        name, *own = words.split("+")
        found = []
        for seed in arguments.seeds.split(","):
            base = load_config(arguments.config)
            output = storage.join(base.output, words.replace("+", "_"))
            settings = [f"method={name}", f"seed={seed}", f"output={output}", *arguments.settings, *own]
            found.append(run(load_config(arguments.config, settings)))
        means = [metrics.mean_accuracy for metrics in found]
        first = first or means
        difference = np.subtract(means, first)
        p = ttest_rel(means, first).pvalue if difference.any() else 1.0
        size = found[0].memory
        print(
            f"| `{words}` | {spread(means)} | {spread([metrics.seen_accuracy[-1] for metrics in found])} | "
            f"{spread([metrics.average_forgetting for metrics in found])} | {100 * difference.mean():+.1f} | {p:.3f} | "
            f"{size.bytes / 1e6 if size else 0:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
