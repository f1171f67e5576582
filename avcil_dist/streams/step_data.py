"""Data set of a committed step: the clips that it had."""

from pathlib import Path

from avcil_dist import storage
from avcil_dist.data.arrival import arrived
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.subset import limited, load_data
from avcil_dist.errors import DataError
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.summary import StepSummary


def data_of_step(step: StepArtifact | StepSummary, url: str | None = None) -> Manifest:
    """Return the data within `data.limit`, and with the training clips that have arrived by the step.

    `url` names the manifest where it is now, or another one: of other data than the step's all clips are returned.
    Raises DataError as `load_manifest` does, with the place at which a missing one was looked for.
    """
    config = step.config
    if url is None:
        recorded = config.data.manifest
        path = storage.local_path(recorded)
        if path is not None and not Path(path).exists():  # it may be relative to another folder than this one
            raise DataError(f"{Path(path).absolute()}: missing; --manifest names it where it is now")
        manifest = load_data(config.data)
    else:
        whole = load_manifest(url)
        manifest = limited(whole, config.data.limit)
        if manifest.content_hash != step.manifest_hash:
            return whole
    return arrived(manifest, step.scenario, config.scenario, step.step)
