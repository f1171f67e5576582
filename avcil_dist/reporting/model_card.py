"""Model card of an exported step: `README.md` with the front matter of the Hugging Face hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

import avcil_dist
from avcil_dist.reporting.formats import MARKDOWN
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.text.visible import visible

TASK = "video-classification"  # of the hub's list
UNKNOWN = "unknown"  # of the hub's list of licences
LABELS = {
    "seen_accuracy": "seen accuracy: correct clips of all classes, after the last step",
    "mean_accuracy": "mean of the seen accuracies after each step",
    "average_forgetting": "average forgetting: negative where later steps helped",
    "backward_transfer": "backward transfer",
    "task_il_accuracy": "Task-IL accuracy: only the classes of the clip's own step compete",
    "top5_accuracy": "top-5 accuracy",
    "mean_average_precision": "macro mAP",
    "source_disjoint_accuracy": "seen accuracy on clips of videos without a training clip",
}
Layout = Literal["clips", "features", "onnx"]


@dataclass(frozen=True)
class CardFacts:
    """Facts that the artifact does not have: clips of each split, the licence, and how the files are read.

    `packages` are those whose plug-ins the model needs.
    """

    counts: Mapping[str, int]
    licence: str
    layout: Layout
    packages: Sequence[str] = ()


def model_card(artifact: StepArtifact, facts: CardFacts) -> str:
    """Return the text of a step's model card. Names of classes are shown without markup."""
    environment = Environment(  # noqa: S701 - text for a Markdown renderer; the filter `escaped` takes its markup
        loader=PackageLoader("avcil_dist", "reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["escaped"] = escaped
    config, metrics = artifact.config, artifact.metrics
    modality = {"both": "videos with sound", "audio": "sounds", "visual": "videos"}[config.model.modality]
    return environment.get_template("model_card.md.j2").render(
        front=front_matter(artifact, facts.licence).to_yaml(),
        name=config.stream_name,
        inputs=modality,
        classes=_classes(artifact),
        metrics=metrics,
        steps=_steps(artifact),
        method=config.method.label,
        version=avcil_dist.__version__,
        values=_values(metrics),
        benchmark=config.name,
        counts=", ".join(f"{count} {split}" for split, count in facts.counts.items()),
        manifest_hash=artifact.manifest_hash,
        settings=f"Seed {config.seed}, {config.optim.epochs} epochs in each step that trains.",
        licence_text=_licence(facts.licence),
        packages=", ".join(f"`{name}`" for name in facts.packages),
        use=_use(facts.layout),
    )


def front_matter(artifact: StepArtifact, licence: str) -> ModelCardData:
    """Return the front matter: library, licence, tags, and the metrics in the form of the hub."""
    config, metrics = artifact.config, artifact.metrics
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=config.name,
            dataset_name=config.name,
            dataset_split="test",
            metric_type="accuracy" if name.endswith("accuracy") else name,
            metric_name=re.split(r":| \(", label)[0],
            metric_value=round(value, 6),
        )
        for name, label in LABELS.items()
        if (value := metrics.scalars().get(name)) is not None
    ]
    return ModelCardData(
        license=licence,
        library_name="avcil-dist",
        pipeline_tag=TASK,
        tags=["audio-visual", "class-incremental-learning", "continual-learning", config.method.label],
        model_name=config.stream_name,
        eval_results=results,
    )


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line."""
    return MARKDOWN.sub(r"\\\g<0>", visible(text))


def _values(metrics: StreamMetrics) -> list[tuple[str, float]]:
    scalars = metrics.scalars()
    return [(label, scalars[name]) for name, label in LABELS.items() if name in scalars]


def _steps(artifact: StepArtifact) -> list[dict[str, object]]:
    metrics = artifact.metrics
    return [
        {
            "step": step,
            "num_new": len(artifact.scenario.new(step)),
            "seen": metrics.seen_accuracy[step],
            "tasks": ", ".join(f"{value:.4f}" for value in metrics.accuracy[step]),
        }
        for step in range(artifact.step + 1)
    ]


def _classes(artifact: StepArtifact) -> list[dict[str, object]]:
    return [
        {"name": name, "step": step, "accuracy": artifact.metrics.per_class.get(name)}
        for step in range(artifact.step + 1)
        for name in artifact.scenario.new(step)
    ]


def _licence(licence: str) -> str:
    if licence == UNKNOWN:
        return "Not stated. Ask those who trained the model; the clips have licences of their own."
    return f"`{licence}`, of these weights. The clips and the pre-trained encoders have licences of their own."


def _use(layout: Layout) -> str:
    if layout == "onnx":
        return ONNX_USE
    return FEATURES_USE if layout == "features" else CLIPS_USE


CLIPS_USE = """With avcil-dist installed, in the folder of these files:

```bash
avcil predict . clip.mp4 --top 5
```

```python
from pathlib import Path
from avcil_dist.inference.exported import load_predictor

predictor = load_predictor(".")
scores = predictor.score_clips([("clip.mp4", Path("clip.mp4").read_bytes())])
print(predictor.classes[scores[0].argmax()])
```"""
FEATURES_USE = """The inputs are features; `config.json` has their shapes, and the encoders that made them, if known.
With avcil-dist installed, in the folder of these files:

```bash
avcil predict . clip.mp4 --top 5   # encodes the clip first; --encoders names encoders that are not known
```

```python
import torch
from avcil_dist.inference.exported import load_export, load_predictor

predictor, shape = load_predictor("."), load_export(".").shape
visual = torch.zeros(1, shape["frames"], shape["positions"], shape["dim"])  # features of one clip
scores = predictor.score_features(visual, torch.zeros(1, shape["dim"]))
print(predictor.classes[scores[0].argmax()])
```"""
ONNX_USE = """`model.onnx` maps the inputs of `config.json` to `scores` (clips, classes); the number of clips is free.
In the folder of these files, with `pip install onnxruntime`:

```python
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
inputs = {given.name: np.zeros((1, *given.shape[1:]), np.float32) for given in session.get_inputs()}  # one clip
[scores] = session.run(["scores"], inputs)
print(json.load(open("config.json"))["classes"][scores[0].argmax()])
```

For clips, `config.json` has the preparation: `visual` are frames (frames, 3, height, width), scaled to 0 … 1, less
`mean`, divided by `std`; `audio` is the log-mel filterbank at `sample_rate`, less `mean`, divided by twice `std`
(`avcil_dist/data/inputs.py` computes both)."""
