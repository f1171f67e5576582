"""Export of a step: the files of a format in a new folder, which appears whole or not at all; upload to the hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError, StorageError
from avcil_dist.inference.exported import describe, input_records, write_config, write_weights
from avcil_dist.inference.predict import StoredModel, restore_step
from avcil_dist.reporting.model_card import CardFacts, Layout, model_card
from avcil_dist.storage.hub import check_upload, upload_folder
from avcil_dist.system.plugins import package_of
from launch.prediction import ModelRequest, load_stored

Format = Literal["safetensors", "onnx", "hub"]
LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]{0,99}")
# as the hub makes them for a new repository: large files are kept beside git
LARGE = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in ("*.safetensors", "*.onnx", "*.data"))


@dataclass(frozen=True)
class ExportReport:
    """The exported step, its classes, the bytes of all files, and the largest difference of an ONNX graph."""

    step: int
    num_classes: int
    size: int
    difference: float | None


def check_export(output: str, licence: str, kind: Format) -> Path:
    """Return the new folder of an export. Raises ConfigError for one that has files, and for missing packages."""
    if kind == "onnx":
        from avcil_dist.inference.onnx_export import check_export_packages

        check_export_packages()
    if not LICENCE.fullmatch(licence):
        raise ConfigError(f"--license: {licence!r}; give an identifier of the hub, such as apache-2.0 or cc-by-4.0")
    path = storage.local_path(output)
    if path is None:
        raise ConfigError(f"{output}: an export is written to a local folder; copy it from there")
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{output}: is there, and no empty folder; name a new one with --output")
    return folder


def export_model(request: ModelRequest, kind: Format, output: str, licence: str) -> ExportReport:
    """Write the files of a format to a new folder. Raises as `check_export` and `load_stored` do."""
    folder = check_export(output, licence, kind)
    stored = load_stored(request)
    with storage.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with storage.temporary_folder(str(folder.parent)) as temporary:
        new = temporary / "export"
        new.mkdir()
        difference = _write(new, stored, kind, licence)
        size = sum(path.stat().st_size for path in new.iterdir())
        with storage.writing(folder):
            new.replace(folder)
    artifact = stored.artifact
    return ExportReport(artifact.step, artifact.scenario.num_seen(artifact.step), size, difference)


def check_push(repository: str, kind: Format) -> None:
    """Raise ConfigError where an export of this format cannot be uploaded to a repository of the hub."""
    if kind != "hub":
        raise ConfigError("--push: uploads a repository of the hub; add --format hub")
    check_upload("--push", repository)


def push_export(repository: str, output: str, step: int, *, is_private: bool) -> str:
    """Upload an exported folder and return the url of the commit. Raises StorageError, which names the next try."""
    try:
        return upload_folder(repository, Path(output), f"avcil-dist: step {step}", is_private=is_private)
    except StorageError as error:
        raise StorageError(f"{error}; the export is complete: hf upload {repository} {output}") from None


def _write(folder: Path, stored: StoredModel, kind: Format, licence: str) -> float | None:
    """Write the card, the model and last its description; return the largest difference of an ONNX graph."""
    artifact = stored.artifact
    layout: Layout = "onnx" if kind == "onnx" else "features" if stored.shape else "clips"
    packages = () if kind == "onnx" else _packages(artifact.config)
    card = model_card(artifact, CardFacts(stored.num_clips, licence, layout, packages))
    storage.write_bytes(str(folder / "README.md"), card.encode())
    if kind == "hub":
        storage.write_bytes(str(folder / ".gitattributes"), LARGE.encode())
    about = describe(artifact, stored.shape, stored.encoders)
    if kind != "onnx":
        write_config(folder, "safetensors", write_weights(folder, artifact), artifact, about)
        return None
    from avcil_dist.inference.onnx_export import export_onnx

    network, method = restore_step(artifact, stored.shape, stored.source)
    shapes = {name: record["shape"] for name, record in input_records(artifact.config, stored.shape).items()}
    difference = export_onnx(network, method, shapes, folder / "model.onnx")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": storage.sha256_file(str(path))}
        for path in sorted(folder.glob("model.onnx*"))
    }
    write_config(folder, "onnx", files, artifact, about)
    return difference


def _packages(config: Config) -> tuple[str, ...]:
    """The packages whose plug-ins a configuration names in the parts that prediction needs."""
    model = config.model
    found = {package_of(config.method.name, "methods"), package_of(model.fusion, "fusions")}
    found |= {package_of(encoder.kind, "encoders") for encoder in (model.visual, model.audio)}
    return tuple(sorted(name for name in found if name))
