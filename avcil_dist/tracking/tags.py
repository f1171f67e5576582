"""Tags of the runs of a stream, and what may stand in those that a server returns.

A server is another program's word: a tag that becomes a path, a number or a digest here is checked first.
"""

import re
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avcil_dist.errors import TrackingError

STEP_TAG = "avcil.step"
STREAM_TAG = "avcil.stream_id"  # of the stream run: identifies the stream on any server
COMMITTED_TAG = "avcil.committed"  # of a step run: the sha256 of its COMMITTED.json, set once all files are uploaded
REFERENCE_TAG = "avcil.artifact_uri"  # of a step run whose files are not in MLflow: the folder with the files
DEVICE_TAG = "avcil.device"  # of a step run: the device that trained it
FOLDER_TAG = "avcil.stream"  # of the stream run
ORIGIN_RUN_TAG, ORIGIN_STEP_TAG, CHANGES_TAG = "avcil.fork_of", "avcil.fork_step", "avcil.changes"

ACCURACY_TAG = "avcil.mean_accuracy"  # of a version of a registered model
NOTE_TAG = "mlflow.note.content"  # the description of a run in MLflow's pages

STREAM_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ReceivedTags(BaseModel):
    """The tags of a run that are used here, as a server returned them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    stream: str | None = Field(None, alias=STREAM_TAG, pattern=rf"^{STREAM_ID.pattern}$")
    step: str | None = Field(None, alias=STEP_TAG, pattern=r"^[0-9]{1,6}$")
    committed: str | None = Field(None, alias=COMMITTED_TAG, pattern=r"^[0-9a-f]{64}$")
    reference: str | None = Field(None, alias=REFERENCE_TAG, max_length=4096)


def received_tags(tags: Mapping[str, str], run_id: str) -> ReceivedTags:
    """Return the tags of a run. Raises TrackingError, naming run and tag, for one that this program does not write."""
    try:
        return ReceivedTags.model_validate(dict(tags))
    except ValidationError as error:
        tag = error.errors()[0]["loc"][0]
        raise TrackingError(
            f"run {run_id}: its tag {tag} is not one that avcil-dist writes; give the run of another stream"
        ) from None
