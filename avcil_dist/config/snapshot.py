"""Settings of snapshots."""

from pydantic import Field, PositiveFloat, PositiveInt

from avcil_dist.config.section import Operational, PathText, Section


class SnapshotConfig(Section):
    """Checkpoints inside a step. A killed job loses no more than the work since the last one."""

    every_minutes: Operational[PositiveFloat] = Field(
        10.0, le=1_000_000, description="Maximum time between two snapshots, in minutes."
    )
    every_iterations: Operational[PositiveInt | None] = Field(
        None, description="Maximum number of iterations between two snapshots. Default: no limit."
    )
    folder: Operational[PathText | None] = Field(
        None, description="Folder or url of the snapshots. Default: inside the folder of the stream."
    )
