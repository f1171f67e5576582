"""Load of all machines of a step, measured by a thread of each machine's first rank and collected by rank 0.

The other machines publish their values in the process group's store, so no folder needs to be shared.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from avcil_dist.system.machine_load import MachineLoad
from avcil_dist.training.observer import Observer
from avcil_dist.world import World

KEY = "avcil/load"

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def observed_load(
    store: TCPStore, world: World, observer: Observer, seconds: float | None, folder: str
) -> Iterator[None]:
    """Report the load of all machines to rank 0's observer every `seconds` while the block runs; None: never.

    `folder` is as for `MachineLoad`. Values are named by machine: `node_0/cpu_percent`.
    """
    if seconds is None or world.local_rank:
        yield
        return
    ended = threading.Event()
    arguments = (store.clone() if world.size > 1 else None, world, observer, seconds, MachineLoad(folder), ended)
    thread = threading.Thread(target=_report, args=arguments, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _report(
    store: TCPStore | None,
    world: World,
    observer: Observer,
    seconds: float,
    load: MachineLoad,
    ended: threading.Event,
) -> None:
    started, own = time.monotonic(), world.rank // world.local_size
    try:
        while not ended.wait(seconds):
            values = {f"node_{own}/{name}": value for name, value in load.measure().items()}
            if store is not None and not world.is_main:
                store.set(f"{KEY}/{world.rank}", json.dumps(values))
                continue
            for rank in range(world.local_size, world.size, world.local_size):
                if store is not None and store.check([f"{KEY}/{rank}"]):
                    values |= json.loads(store.get(f"{KEY}/{rank}"))
            observer.system(time.monotonic() - started, values)
    except dist.DistError:
        return  # the store is gone: the step ends
    except OSError as error:  # of a machine that does not show its counters
        _logger.warning("the load of this machine cannot be measured (%s)", error)
