"""Frozen encoders of a configuration, and the record of them that a manifest of their features has.

With the record, clips that are no part of the data set become features in the same way, and the digests show that the
weights are the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import yaml
from torch import Tensor, nn

from avcil_dist import storage
from avcil_dist.config.encoders import trained_part
from avcil_dist.config.schema import Config, Precision
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml, flatten
from avcil_dist.config.yaml_text import parse_yaml
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import EncoderRecord
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.models.encoders.base import Encoder
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder, clip_inputs
from avcil_dist.models.precision import precision_context
from avcil_dist.seeds import derive_seed

RECORDED = ("data.clip.", "model.visual.", "model.audio.")  # beginnings of the settings that decide on the features
SEED = "seed"  # of random weights
PRECISION = "engine.precision"


@dataclass(frozen=True)
class FrozenEncoders:
    """The two encoders on their device, the preparation of their inputs, and the shape of their features.

    They compute in `precision`.
    """

    visual: Encoder
    audio: Encoder
    inputs: ClipInputs
    device: torch.device
    shape: Mapping[str, int]
    precision: Precision = "float32"

    @torch.inference_mode()
    def encode(self, visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return visual (B, T, S, D) and audio (B, D) features of prepared clips, float32."""
        with precision_context(self.precision, self.device):
            return self.visual(visual.to(self.device)).float(), self.audio(audio.to(self.device)).float()

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of the weights of each encoder."""
        return {"visual": weights_digest(self.visual), "audio": weights_digest(self.audio)}


def build_frozen_encoders(config: Config, device: torch.device) -> FrozenEncoders:
    """Build the encoders of a configuration. Raises ConfigError for encoders that are not frozen or do not fit."""
    for name, section in (("visual", config.model.visual), ("audio", config.model.audio)):
        if trained_part(section) is None:
            raise ConfigError(
                f"model.{name}.kind: {section.kind} has no weights to compute features with; use a transformer"
            )
        if trained_part(section) != "frozen":
            raise ConfigError(
                f"model.{name}.train: {trained_part(section)}; features are computed by frozen encoders; set frozen"
            )
    clip, inputs = config.data.clip, clip_inputs(config.model, config.data.clip)
    torch.manual_seed(derive_seed(config.seed, "weights", 0))
    visual = build_visual_encoder(config.model.visual, clip, None).to(device).eval()
    audio = build_audio_encoder(config.model.audio, clip, None).to(device).eval()
    if visual.dim != audio.dim:
        raise ConfigError(f"model.visual.dim={visual.dim}, model.audio.dim={audio.dim}: features have one dimension")
    with torch.inference_mode():
        tokens = visual(torch.zeros(1, *inputs.pictures.shape, device=device))
    shape = {"frames": tokens.shape[1], "positions": tokens.shape[2], "dim": tokens.shape[3]}
    return FrozenEncoders(visual, audio, inputs, device, shape, config.engine.precision)


def record_encoders(config: Config, digests: Mapping[str, str]) -> EncoderRecord:
    """Return the record of the encoders of a configuration, whose weights have these digests."""
    settings = {key: value for key, value in flatten(config).items() if key.startswith(RECORDED) or key == SEED}
    if config.engine.precision != "float32":
        settings[PRECISION] = config.engine.precision
    return EncoderRecord(settings=settings, sha256=dict(digests))


def recorded_encoders(record: EncoderRecord, base: Config, where: str, device: torch.device) -> FrozenEncoders:
    """Build the encoders that a manifest records; all other settings are those of `base`.

    Plug-ins are looked up among installed packages: a manifest names no code. Raises ConfigError for settings that
    this version cannot use, and DataError, naming `where`, for weights with another digest.
    """
    document = parse_yaml(config_to_yaml(base))
    for section in ("visual", "audio"):
        document["model"][section] = {}
    document["engine"]["precision"] = "float32"
    for key, value in record.settings.items():
        *sections, leaf = key.split(".")
        node = document
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    try:
        config = config_from_yaml(yaml.safe_dump(document))
    except ConfigError as error:
        raise ConfigError(f"{where}: its encoders: {error}; name them by --encoders") from None
    encoders = build_frozen_encoders(config, device)
    check_digests(encoders, record, where)
    return encoders


def check_digests(encoders: FrozenEncoders, record: EncoderRecord, where: str) -> None:
    """Raise DataError unless the weights are those that made the features of `where`."""
    recorded: dict[str, str] = dict(record.sha256.items())
    for name, digest in encoders.digests.items():
        if recorded.get(name) != digest:
            raise DataError(
                f"{where}: its features are of other {name} weights (sha256 {recorded.get(name, '')[:12]}…, these "
                f"are {digest[:12]}…); name the weights that made them by --encoders"
            )


def weights_digest(encoder: nn.Module) -> str:
    """Return a sha256 of the names, shapes and values of all weights."""
    digests = [
        [name, list(tensor.shape), storage.sha256(tensor.contiguous().cpu().numpy().tobytes())]
        for name, tensor in encoder.state_dict().items()
    ]
    return storage.sha256(json.dumps(digests).encode())
