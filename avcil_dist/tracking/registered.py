"""Models of MLflow's registry by name, downloaded and loaded without MLflow's loaders: nothing of them is executed.

`mlflow.pyfunc.load_model` imports the module that a model names, which is right for a model of one's own and wrong for
any name on a server.
"""

import re
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from avcil_dist import storage
from avcil_dist.errors import ArtifactError, TrackingError
from avcil_dist.inference.predict import StoredModel
from avcil_dist.text.redaction import redacted
from avcil_dist.tracking.artifacts import transfer
from avcil_dist.tracking.client import connect
from avcil_dist.tracking.faults import reported
from avcil_dist.tracking.registry import ABOUT, MODEL_FOLDER, load_described

MODEL_NAME = re.compile(
    r"(?:models:/)?(?P<name>[A-Za-z0-9_.-]+)(?:@(?P<alias>[A-Za-z0-9_.-]+)|/(?P<version>[0-9]+|latest))?"
)
LATEST = "latest"


def load_registered(uri: str, model: str) -> StoredModel:
    """Load `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME`; the alias or version `latest` is the newest.

    Raises TrackingError for a name that is not registered on the server, ArtifactError for damaged files.
    """
    named = MODEL_NAME.fullmatch(model)
    if named is None:
        raise TrackingError(f"{model}: no folder of a stream and no name of a model, such as models:/NAME@latest")
    with reported(uri), storage.temporary_folder() as temporary:
        client = connect(uri)
        version = _version(client, uri, named["name"], named["alias"], named["version"])
        where = f"models:/{version.name}/{version.version}"
        # of the run, not of the version's source: a server has no say over what is opened here
        folder = Path(
            transfer(
                lambda: client.download_artifacts(version.run_id, MODEL_FOLDER, str(temporary)), storage.MAX_JSON_BYTES
            )
        )
        found = sorted(folder.rglob(ABOUT))
        if not found:
            raise ArtifactError(f"{where}: has no {ABOUT}; it is no model of this program")
        about, artifact, _ = load_described(str(found[0].parent))
    return StoredModel(artifact, about.shape, about.encoders, source=where, recorded_in=where)


def _version(client: MlflowClient, uri: str, name: str, alias: str | None, number: str | None) -> ModelVersion:
    """The version of a model that an alias or a number names. Raises TrackingError where there is none."""
    versions = client.search_model_versions(f"name = '{name}'")
    if not versions:
        raise TrackingError(
            f"{name}: neither a folder with committed steps nor a model registered at {redacted(uri)}; "
            "--uri names another server or database"
        )
    newest = max(versions, key=lambda version: int(version.version))
    if number == LATEST:
        chosen = [newest]
    elif number is not None:
        chosen = [version for version in versions if str(version.version) == number]
    else:
        try:
            chosen = [client.get_model_version_by_alias(name, alias or LATEST)]
        except MlflowException:
            chosen = [newest] if alias in (None, LATEST) else []
    if not chosen:
        raise TrackingError(
            f"{name}: has no {f'version {number}' if number else f'alias {alias}'} at {redacted(uri)}; the newest "
            f"version is {newest.version}"
        )
    return chosen[0]
