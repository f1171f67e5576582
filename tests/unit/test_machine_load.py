"""Load of this machine, and its way to rank 0's observer."""

import time
from collections.abc import Mapping
from pathlib import Path

from torch.distributed import HashStore

from avcil_dist.system.machine_load import MachineLoad
from avcil_dist.training.observer import Observer
from avcil_dist.training.system_metrics import observed_load
from avcil_dist.world import World


class Loads(Observer):
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def system(self, seconds: float, values: Mapping[str, float]) -> None:
        self.values.append(dict(values))


def test_the_load_has_processors_memory_and_disk(tmp_path: Path) -> None:
    load = MachineLoad(str(tmp_path))
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    values = load.measure()
    assert 0 <= values["cpu_percent"] <= 100
    assert 0.1 < values["memory_used_gb"] < 1e5
    assert 0 < values["disk_percent"] <= 100
    assert all(value >= 0 for value in values.values())
    assert "disk_percent" not in MachineLoad(str(tmp_path / "none")).measure()


def test_the_load_is_reported_at_an_interval_by_the_first_rank_of_a_machine_alone(tmp_path: Path) -> None:
    first, second = Loads(), Loads()
    with (
        observed_load(HashStore(), World(), first, 0.05, str(tmp_path)),
        observed_load(HashStore(), World(1, 2, 1, 2), second, 0.05, str(tmp_path)),
        observed_load(HashStore(), World(), second, None, str(tmp_path)),
    ):
        deadline = time.monotonic() + 30
        while len(first.values) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(first.values) >= 2
    assert all(name.startswith("node_0/") for name in first.values[0])
    assert second.values == []
