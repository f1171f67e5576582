"""Upload of step artifacts to MLflow and download from it: the files themselves, or a reference to them.

In both cases the step's run has the digest of its `COMMITTED.json`, which has the digests of all other files.
A download verifies every file against them.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Run

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ArtifactError, AvcilError, ConfigError, DataError, StorageError
from avcil_dist.streams.commit import COMMITTED, parse_commit, verify_file
from avcil_dist.streams.summary import StepCommit, step_url
from avcil_dist.tracking.faults import FAULTS, bounded, reason_of, reported, transfer_seconds
from avcil_dist.tracking.tags import COMMITTED_TAG, DEVICE_TAG, REFERENCE_TAG, received_tags

T = TypeVar("T")

REFERENCE = "REFERENCE.json"


def transfer(call: Callable[[], T], num_bytes: int, check: Callable[[], None] = lambda: None) -> T:
    """Return `call()`, one call of MLflow that moves `num_bytes`, within `transfer_seconds`; `check` as in `bounded`.

    Raises one of FAULTS, or StorageError for the errors of the libraries through which MLflow reaches a storage.
    """
    try:
        return bounded(call, transfer_seconds(num_bytes), check)
    except (*FAULTS, AvcilError):
        raise
    except Exception as error:  # of boto3, google.cloud, azure, …: whatever library the server's storage needs
        raise StorageError(f"{type(error).__name__}: {reason_of(error)}") from None


def upload_step(
    client: MlflowClient,
    run_id: str,
    tracking: TrackingConfig,
    stream: str,
    step: int,
    *,
    stream_id: str,
    uploaded: set[str],
) -> dict[str, str]:
    """Upload a committed step to its run, `COMMITTED.json` last. Returns the tags that mark the run as committed.

    `uploaded` holds the names of files that were uploaded before; new ones are added. Only files that the commit
    lists are sent, each compared with its digest just before. Raises DataError when the step no longer exists,
    ArtifactError for a damaged one.
    """
    folder = step_url(stream, step)
    data = storage.read_bytes(storage.join(folder, COMMITTED), max_bytes=storage.MAX_JSON_BYTES)
    commit = parse_commit(data, StepCommit, storage.join(folder, COMMITTED))
    files = {name: digest.model_dump() for name, digest in commit.files.items()}
    tags = {COMMITTED_TAG: storage.sha256(data)} | ({DEVICE_TAG: commit.device} if commit.device else {})
    name = f"step_{step:03d}"

    def upload_files(upload: Callable[[Path], None]) -> None:
        for file in (*sorted(files), COMMITTED):
            if file not in uploaded:
                with storage.local_copy(storage.join(folder, file)) as local:
                    if file != COMMITTED:
                        verify_file(str(local.parent), file, commit)
                    upload(local)
                uploaded.add(file)

    if tracking.artifacts == "full":

        def log(path: Path) -> None:
            transfer(lambda: client.log_artifact(run_id, str(path), artifact_path=name), path.stat().st_size)

        upload_files(log)
        return tags
    uri = _absolute(folder)
    if tracking.artifact_uri:
        uri = storage.join(tracking.artifact_uri, stream_id, name)
        upload_files(lambda path: storage.upload(path, storage.join(uri, path.name)))
    reference = {"uri": uri, "files": files}
    for text, file in ((json.dumps(reference, indent=1, sort_keys=True), REFERENCE), (data.decode(), COMMITTED)):
        transfer(lambda text=text, file=file: client.log_text(run_id, text, f"{name}/{file}"), len(text))  # type: ignore[misc]
    return tags | {REFERENCE_TAG: uri}


def download_step(client: MlflowClient, uri: str, run: Run, step: int, stream: str) -> None:
    """Download a step from its run to the folder of a stream; it is committed there once every file is verified.

    Raises ArtifactError, naming the file, for a missing or damaged one; TrackingError when the server fails.
    """
    name, tags = f"step_{step:03d}", received_tags(run.data.tags, run.info.run_id)
    folder = step_url(stream, step)
    if tags.committed is None:
        raise ArtifactError(f"run {run.info.run_id}: {name} is not committed there")
    with storage.temporary_folder() as temporary:

        def fetch(file: str, num_bytes: int = storage.MAX_JSON_BYTES) -> Path:
            if tags.reference:
                return _from_reference(tags.reference, file, temporary, num_bytes)

            def check() -> None:
                if _folder_bytes(temporary) > num_bytes + storage.MAX_JSON_BYTES:
                    raise ArtifactError(f"run {run.info.run_id}: {name}/{file}: larger than committed")

            with reported(uri):
                path = f"{name}/{file}"
                return Path(
                    transfer(lambda: client.download_artifacts(run.info.run_id, path, str(temporary)), num_bytes, check)
                )

        commit = fetch(COMMITTED)
        _verify(commit, tags.committed, run, name)
        listed = parse_commit(commit.read_bytes(), StepCommit, f"run {run.info.run_id}: {name}/{COMMITTED}")
        storage.remove_tree(folder)
        for file, digest in listed.files.items():
            path = fetch(file, digest.size)
            _verify(path, digest.sha256, run, name)
            storage.upload(path, storage.join(folder, file))
            path.unlink()
        storage.upload(commit, storage.join(folder, COMMITTED))


def _folder_bytes(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed since
            size += path.stat().st_size
    return size


def _from_reference(source: str, file: str, folder: Path, max_bytes: int) -> Path:
    try:
        url = storage.join(storage.check_url(source), file)
    except ConfigError as error:
        raise ArtifactError(f"the tag {REFERENCE_TAG}: {error}") from None
    try:
        size = storage.size(url)
        if size > max_bytes:
            raise ArtifactError(f"{url}: damaged, it has {size} bytes; resume from an earlier step with --from-step")
        (folder / file).write_bytes(storage.read_bytes(url))
    except DataError:
        raise ArtifactError(
            f"{url}: missing; the files of this step are kept by reference: resuming needs access to that folder"
        ) from None
    return folder / file


def _verify(path: Path, digest: str, run: Run, name: str) -> None:
    if storage.sha256_file(str(path)) != digest:
        raise ArtifactError(
            f"run {run.info.run_id}: {name}/{path.name}: damaged, its digest is not the one committed; "
            "resume from an earlier step with --from-step"
        )


def _absolute(folder: str) -> str:
    local = storage.local_path(folder)
    return folder if local is None else Path(local).as_uri()
