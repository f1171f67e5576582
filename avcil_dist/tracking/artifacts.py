"""Step artifacts to MLflow and back: the files themselves, or a reference to where they are.

Whatever way they go, a step's run holds the digest of its `COMMITTED.json`, which holds those of
all other files. What comes back is held against them.
"""

import json
import tempfile
from pathlib import Path, PurePosixPath

from mlflow import MlflowClient
from mlflow.entities import Run

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ArtifactError, DataError
from avcil_dist.streams.artifact import step_url
from avcil_dist.streams.commit import COMMITTED
from avcil_dist.tracking.client import COMMITTED_TAG, REFERENCE_TAG, reported

REFERENCE = "REFERENCE.json"


def upload_step(
    client: MlflowClient,
    run_id: str,
    tracking: TrackingConfig,
    stream: str,
    step: int,
    *,
    stream_id: str,
    sent: set[str],
) -> dict[str, str]:
    """Bring a committed step to its run, the commit record last; the tags that say so.

    `sent` holds the files that are there already, and takes those that go. Raises DataError where the step
    is gone.
    """
    folder = step_url(stream, step)
    data = storage.read_bytes(storage.join(folder, COMMITTED))
    committed = json.loads(data)
    tags = {COMMITTED_TAG: storage.sha256(data)}
    place = f"step_{step:03d}"
    if tracking.artifacts == "full":
        with storage.local_copy(folder) as local:
            for name in (*sorted(committed["files"]), COMMITTED):
                if name not in sent:
                    client.log_artifact(run_id, str(Path(local, name)), artifact_path=place)
                    sent.add(name)
        return tags
    uri = _absolute(folder)
    if tracking.artifact_uri:
        uri = storage.join(tracking.artifact_uri, stream_id, place)
        with storage.local_copy(folder) as local:
            for name in (*sorted(committed["files"]), COMMITTED):
                if name not in sent:
                    storage.upload(Path(local, name), storage.join(uri, name))
                    sent.add(name)
    reference = {"uri": uri, "files": committed["files"]}
    client.log_text(run_id, json.dumps(reference, indent=1, sort_keys=True), f"{place}/{REFERENCE}")
    client.log_text(run_id, data.decode(), f"{place}/{COMMITTED}")
    return tags | {REFERENCE_TAG: uri}


def download_step(client: MlflowClient, uri: str, run: Run, step: int, stream: str) -> None:
    """Bring a step from its run to the folder of a stream; it is committed there when every digest is right.

    Raises ArtifactError, naming the file, for what is missing or damaged; TrackingError as the server fails.
    """
    place, source = f"step_{step:03d}", run.data.tags.get(REFERENCE_TAG)
    folder = step_url(stream, step)
    with tempfile.TemporaryDirectory() as temporary:

        def fetch(name: str) -> Path:
            if source:
                return _from_reference(source, name, Path(temporary))
            with reported(uri):
                return Path(client.download_artifacts(run.info.run_id, f"{place}/{name}", temporary))

        commit = fetch(COMMITTED)
        _check(commit, run.data.tags[COMMITTED_TAG], run, place)
        storage.remove_tree(folder)
        for name, record in json.loads(commit.read_bytes())["files"].items():
            if PurePosixPath(name).name != name:
                raise ArtifactError(f"run {run.info.run_id}: {place}/{COMMITTED}: {name!r} is no file of a step")
            file = fetch(name)
            _check(file, record["sha256"], run, place)
            storage.upload(file, storage.join(folder, name))
            file.unlink()
        storage.upload(commit, storage.join(folder, COMMITTED))


def _from_reference(source: str, name: str, folder: Path) -> Path:
    url = storage.join(source, name)
    try:
        (folder / name).write_bytes(storage.read_bytes(url))
    except DataError:
        raise ArtifactError(
            f"{url}: missing; this step's files are kept by reference, and resuming needs that place too"
        ) from None
    return folder / name


def _check(file: Path, digest: str, run: Run, place: str) -> None:
    if storage.sha256_file(str(file)) != digest:
        raise ArtifactError(
            f"run {run.info.run_id}: {place}/{file.name}: damaged, its digest is not the one committed; "
            "resume from an earlier step with --from-step"
        )


def _absolute(folder: str) -> str:
    local = storage.local_path(folder)
    return folder if local is None else Path(local).as_uri()
