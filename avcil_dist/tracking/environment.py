"""MLflow's environment: what the user means for the way to a server stays, what would change a call is removed.

MLflow reads about 250 variables, most of them at each call. `MLFLOW_ENABLE_ASYNC_LOGGING`, for example, makes a call
return before the server has the values. So this is a list of what is kept, not of what is removed.
"""

import os
import warnings
from collections.abc import Mapping

from avcil_dist.system.variables import set_missing_variables, set_variables, unset_variables

REQUEST_SECONDS = 60  # one request, from the connection to the last byte of the answer
# Credentials, certificates, storage of artifacts, workspace, connections, transfer of large files, verbosity.
KEPT = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "MLFLOW_WORKSPACE",
    "MLFLOW_ENABLE_WORKSPACES",
    "MLFLOW_ENABLE_DB_SDK",
    "MLFLOW_UC_OSS_TOKEN",
    "MLFLOW_ALLOW_HTTP_REDIRECTS",
    "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE",
    "MLFLOW_PYARROW_EXTRA_CONF",
)
KEPT_PREFIXES = (
    "MLFLOW_S3_",
    "MLFLOW_GCS_",
    "MLFLOW_KERBEROS_",
    "MLFLOW_MYSQL_SSL_",
    "MLFLOW_HTTP_POOL_",
    "MLFLOW_HTTP_TCP_",
    "MLFLOW_SQLALCHEMYSTORE_POOL",
    "MLFLOW_MULTIPART_",
    "MLFLOW_ENABLE_MULTIPART_",
    "MLFLOW_ENABLE_PROXY_MULTIPART_",
)
# Read when MLflow, or another tracker's package, is imported.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING", "WANDB_ERROR_REPORTING": "false"}
# Where the user has set one of these, and it is kept, the user's value wins.
OURS = QUIET | {
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # MLflow's seven retries block a call for minutes; the sender retries instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_SECONDS),
    # Files from this size on are uploaded in parts, directly to the object storage of the server.
    "MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE": str(100 << 20),
}
# Packages whose warnings are no errors even under `PYTHONWARNINGS=error`, where they would end a call.
FOREIGN = (
    r"(mlflow|sqlalchemy|alembic|pydantic|google|flask|requests|urllib3|boto3|botocore|s3fs|fsspec|pandas|importlib"
    r"|avcil_dist\.tracking)(\.|$)"
)


def mlflow_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which MLflow's calls mean what this package means by them."""
    kept = {
        name: value
        for name, value in environment.items()
        if not name.startswith(("MLFLOW_", "_MLFLOW_")) or name in KEPT or name.startswith(KEPT_PREFIXES)
    }
    return OURS | kept


def quiet_import() -> None:
    """Set what MLflow reads when it is imported, unless the user has set it. The rest stays as it is.

    Its warning about type hints of its own is no concern of the user, and is not shown.
    """
    set_missing_variables(QUIET)
    warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType", category=UserWarning)


def isolate() -> None:
    """Give this process MLflow's environment, before a server is called. It may be called again."""
    wanted = mlflow_environment(os.environ)
    unset_variables([name for name in os.environ if name not in wanted])
    set_variables(wanted)
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("default", module=FOREIGN)
