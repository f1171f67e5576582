"""Kernels and transfers on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from avcil_dist.data.batch import Batch
from avcil_dist.data.clip_cache import ClipCache, EntrySpec
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.loader import load_batches, load_on_device
from avcil_dist.data.manifest import load_manifest
from data_shards.random_features import make_feature_shards
from tests.helpers import triton_kernels
from tests.helpers.reading import digest, labels_of, training_source

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_triton_kernels_give_what_torch_gives() -> None:
    triton_kernels.main("cuda")


@pytest.mark.parametrize("tier", ["none", "host", "device"])
def test_batches_on_the_device_are_those_on_a_cpu(tmp_path: Path, tier: str) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=4, clips={"train": 12}))
    source = training_source(manifest, epochs=3, exemplars=manifest.clips(["class_000"], "train")[:5])

    def batches(device: torch.device, store: ClipCache | None) -> list[str]:
        labels = labels_of(manifest)
        loaded = load_on_device(
            source,
            manifest=manifest,
            labels=labels,
            data=source.data,
            device=device,
            clip_cache=store,
        )
        return [digest(in_host_memory(batch)) for batch in loaded]

    device = torch.device("cuda", 0)
    kind = EntrySpec.of(manifest, ClipInputs.of(source.data.clip))
    store = None if tier == "none" else ClipCache(source.clips, kind, device if tier == "device" else None)
    assert batches(device, store) == batches(torch.device("cpu"), None)


def test_batches_of_cached_clips_are_page_locked(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path, classes=4, clips={"train": 12}))
    source = training_source(manifest, epochs=3, exemplars=manifest.clips(["class_000"], "train")[:5])
    store = ClipCache(source.clips, EntrySpec.of(manifest, ClipInputs.of(source.data.clip)), None)
    labels = labels_of(manifest)
    batches = load_batches(source, manifest=manifest, labels=labels, data=source.data, pin=True, clip_cache=store)
    assert all(tensor.is_pinned() for batch in batches for tensor in batch.tensors)


def in_host_memory(batch: Batch) -> Batch:
    moved = {name: getattr(batch, name).cpu() for name in ("visual", "audio", "labels", "valid")}
    return replace(batch, **moved)
