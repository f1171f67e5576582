"""Export of a step's network and the scores of its method as one ONNX graph, compared with the network by onnxruntime.

The graph computes in float32, by operations of plain torch: the attention writes its maps, which its kernels never do.
The number of clips in a batch is free. The packages are those of the extra `export`.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import Method
from avcil_dist.models.attention.module import AudioGuidedAttention
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Divergence

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
TOLERANCE = 1e-4  # of a score, relative to the largest one if that is above 1
BATCHES = (1, 3)  # clips of the batches that are compared
MAX_FILE = 1 << 30  # bytes of weights in the graph's own file, which protobuf bounds at 2 GiB
SCORES = "scores"  # the output
MAX_SHOWN = 200  # characters of a foreign error


class ScoringModule(nn.Module):
    """Class scores (B, C) of the inputs that a step's network has: `visual`, `audio`, or both, in this order."""

    def __init__(self, network: Network, method: Method) -> None:
        super().__init__()
        self.network, self.method = network, method
        parts = {"visual": network.visual_encoder, "audio": network.audio_encoder}
        self.names = [name for name, encoder in parts.items() if encoder is not None]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the method's scores, float32. The input of a modality that the network lacks is never read."""
        given = dict(zip(self.names, inputs, strict=True))
        return self.method.scores(self.network(given.get("visual", inputs[0]), given.get("audio", inputs[0]))).float()


class _PlainAttention(nn.Module):
    """The attention by its maps, in differentiable operations that every exporter has."""

    def __init__(self, attention: AudioGuidedAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, audio: Tensor, visual: Tensor, teacher: None = None) -> tuple[Tensor, Divergence | None]:
        """Return pooled tokens (B, D), as `AudioGuidedAttention` does without a teacher."""
        spatial, temporal = self.attention.maps(audio, visual)
        return ((spatial * visual).sum(dim=2) * temporal).sum(dim=1), None


def check_export_packages() -> None:
    """Check that the packages of the export are installed. Raises ConfigError, naming the extra."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx: {', '.join(missing)} not installed; run: pip install 'avcil-dist[export]'")


def export_onnx(network: Network, method: Method, shapes: Mapping[str, Sequence[int]], path: Path) -> float:
    """Write the network and its scores to `path`, and return the largest difference from the network.

    `shapes` are those of a clip's inputs, by name. Weights of more than a GiB are in `path`.data. The network is left
    in float32 on the processor. Raises ConfigError for a model that cannot be exported, and for a graph that differs by
    more than `TOLERANCE`.
    """
    network.cpu().eval().precision = "float32"
    module = ScoringModule(network, method).eval()
    batches = [_made_inputs(module.names, shapes, size) for size in BATCHES]
    with torch.inference_mode():
        expected = [module(*inputs).numpy() for inputs in batches]
    attention = getattr(network, "attention", None)
    if isinstance(attention, AudioGuidedAttention):
        network.attention = _PlainAttention(attention)
    try:
        _write(module, batches[-1], path)
    finally:
        if attention is not None:
            network.attention = attention
    return _compare(path, module.names, batches, expected)


def _made_inputs(names: Sequence[str], shapes: Mapping[str, Sequence[int]], size: int) -> list[Tensor]:
    """Normally distributed inputs, as normalised pictures, filterbanks and features are on average."""
    random = torch.Generator().manual_seed(size)
    return [torch.randn(size, *shapes[name], generator=random) for name in names]


def _write(module: ScoringModule, inputs: Sequence[Tensor], path: Path) -> None:
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                module,
                tuple(inputs),
                str(path),
                input_names=list(module.names),
                output_names=[SCORES],
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                opset_version=OPSET,
                external_data=size > MAX_FILE,
                dynamo=True,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        text = " ".join(str(error.__cause__ or error).split())[:MAX_SHOWN]
        raise ConfigError(
            f"--format onnx: torch cannot export the method {type(module.method).__name__} on this network ({text}); "
            "use --format safetensors"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the exporter's remarks on its own internals: faults are exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _compare(
    path: Path, names: Sequence[str], batches: Sequence[Sequence[Tensor]], expected: Sequence[np.ndarray]
) -> float:
    """Return the largest difference of onnxruntime's scores. Raises ConfigError above the tolerance."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as faults

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    largest = 0.0
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for inputs, wanted in zip(batches, expected, strict=True):
            given: dict[str, Any] = {name: part.numpy() for name, part in zip(names, inputs, strict=True)}
            [found] = session.run([SCORES], given)
            largest = max(largest, difference(found, wanted))
    except (faults.Fail, faults.InvalidArgument, faults.InvalidGraph, faults.NotImplemented) as error:
        text = " ".join(str(error).split())[:MAX_SHOWN]
        raise ConfigError(
            f"--format onnx: onnxruntime cannot run the graph ({text}); use --format safetensors"
        ) from None
    if largest > TOLERANCE:
        raise ConfigError(
            f"--format onnx: the graph's scores differ from the network's by {largest:.1e}, more than {TOLERANCE:g}; "
            "it is not kept; use --format safetensors"
        )
    return largest


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference of scores, relative to the largest score if that is above 1.

    Equal infinities, the scores of a class without a mean, do not differ. Infinity for a NaN and for unequal shapes.
    """
    if found.shape != wanted.shape:
        return math.inf
    finite = np.isfinite(wanted)
    if not (np.array_equal(found[~finite], wanted[~finite]) and np.isfinite(found[finite]).all()):
        return math.inf
    scale = max(1.0, float(np.abs(wanted[finite]).max(initial=0)))
    return float(np.abs(found[finite] - wanted[finite]).max(initial=0)) / scale
