"""Uris of tracking servers and databases: which one a stream uses, checked before anything is sent there."""

import os
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from avcil_dist import storage
from avcil_dist.config.schema import TrackingConfig
from avcil_dist.errors import ConfigError
from avcil_dist.text.redaction import redacted

VARIABLE = "MLFLOW_TRACKING_URI"
SQLITE = "sqlite:///"
SERVERS = ("http", "https", "databricks")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # module: package


def tracking_uri(tracking: TrackingConfig, output: str, *, earlier: str | None = None) -> str:
    """Return the uri of the server or database of a stream.

    The first of: `tracking.uri`, the variable MLFLOW_TRACKING_URI, `earlier` (where the stream was sent before), a
    sqlite database in the output folder.

    Raises ConfigError for an output folder on object storage, where sqlite cannot work, for a uri that MLflow does
    not support, for one with a secret, and for a database without its driver.
    """
    variable = os.environ.get(VARIABLE, "").strip()
    if tracking.uri is not None:
        return _checked(tracking.uri, "tracking.uri")
    if variable:
        return _checked(with_uri(tracking, variable, VARIABLE).uri or "", VARIABLE)
    return _checked(earlier, "tracking.uri") if earlier else default_uri(output)


def default_uri(output: str) -> str:
    """Return the uri of the database in the output folder. Raises ConfigError for a path that no such uri can have."""
    path = str(local_folder(output) / "mlflow.db")
    uri = f"{SQLITE}{path}"
    if make_url(uri).database != path:  # MLflow would make its folder in another place as well if it were quoted
        raise ConfigError(
            f"output: {output}: a `?`, or a `%` before two hexadecimal digits, cannot be in the path of a tracking "
            "database; give another output, or tracking.uri"
        )
    return uri


def with_uri(tracking: TrackingConfig, uri: str | None, source: str = "--uri") -> TrackingConfig:
    """Return the settings with another server or database. Raises ConfigError for a uri that contains a password."""
    try:
        return TrackingConfig.model_validate(tracking.model_dump() | {"uri": uri})
    except ValidationError as error:
        raise ConfigError(f"{source}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None


def is_server(uri: str) -> bool:
    """Whether the uri is that of a server, not of a database."""
    return uri.split(":")[0].split("+")[0] in SERVERS


def is_sqlite(uri: str) -> bool:
    """Whether the uri is that of an sqlite database: a file that the processes of a single machine may write to."""
    return uri.split(":")[0].split("+")[0] == "sqlite"


def database_path(uri: str) -> Path | None:
    """The path of a sqlite database; None for other databases and servers."""
    if not is_sqlite(uri):
        return None
    path = make_url(uri).database
    return Path(path).absolute() if path and not path.startswith("file:") else None


def local_folder(output: str) -> Path:
    """The output folder as a path. Raises ConfigError when it is on object storage."""
    path = storage.local_path(output)
    if path is None:
        raise ConfigError(
            f"output: {output}: a tracking database cannot be on object storage; "
            "give tracking.uri a server, or output a local folder"
        )
    return Path(path).absolute()


def _checked(uri: str, source: str) -> str:
    kind = uri.split(":")[0].split("+")[0]
    if kind in DATABASES and "://" in uri:
        _check_database(uri, source)
    elif kind in ("http", "https"):
        _check_address(uri, source)
    elif kind != "databricks":
        raise ConfigError(
            f"{source}: {uri}: neither a server (http://…) nor a database ({SQLITE}…); "
            "without it the runs go to a database in the output folder"
        )
    return uri


def _check_address(uri: str, source: str) -> None:
    try:
        parts = urlsplit(uri)
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address or any(letter.isspace() for letter in uri):
        raise ConfigError(f"{source}: {uri}: not an address; give it as http://HOST:PORT")


def _check_database(uri: str, source: str) -> None:
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        package = DRIVERS.get(error.name or "", error.name)
        raise ConfigError(f"{source}: {redacted(uri)}: its driver is missing; run pip install {package}") from None
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        raise ConfigError(f"{source}: {redacted(uri)}: not the url of a database ({error})") from None
