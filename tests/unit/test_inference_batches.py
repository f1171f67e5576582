"""Batches of an inference pass on one rank: each clip once, padding, and the limit of damaged clips."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.data.batch import Batch
from avcil_dist.data.sampler import Request
from avcil_dist.errors import DataError
from avcil_dist.training import inference_pass
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.world import World

pytestmark = pytest.mark.usefixtures("one_rank")

CLIPS = np.arange(100, 110)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of each load; of the clips, 103, 105 and 109 are damaged, the last two without a name."""
    settings: list[dict[str, Any]] = []

    def load(source: Any, **given: Any) -> Iterator[Batch]:
        settings.append(given)
        for request in source:
            assert isinstance(request, Request)
            rows = torch.tensor(request.clips)[:, None].float()
            valid = torch.from_numpy(~np.isin(request.clips, [-1, 103, 105, 109]))
            faults = tuple(f"clip {clip}: damaged" for clip in request.clips if clip == 103)
            yield Batch(rows, rows, rows[:, 0].long(), valid, len(rows), faults, clips=request.clips)

    monkeypatch.setattr(inference_pass, "load_on_device", load)
    return settings


def make_pass(max_bad_fraction: float) -> InferencePass:
    parts: Any = SimpleNamespace(labels={"a": 0}, max_bad_fraction=max_bad_fraction)
    return InferencePass(parts, parts, parts, World(), torch.device("cpu"), clip_cache=parts)


def test_every_clip_comes_once_in_order_and_the_last_batch_is_padded(loads: list[dict[str, Any]]) -> None:
    batches = list(make_pass(1.0).batches(CLIPS, global_batch=4))
    assert [len(batch.clips) for batch in batches] == [4, 4, 4]
    assert np.concatenate([batch.clips for batch in batches]).tolist() == [*CLIPS.tolist(), -1, -1]
    inference = make_pass(1.0)
    assert loads == [
        {
            "manifest": inference.manifest,
            "labels": {"a": 0},
            "data": inference.data,
            "inputs": None,
            "noise": None,
            "device": torch.device("cpu"),
            "clip_cache": inference.clip_cache,
            "lethal": {},
        }
    ]
    [whole] = inference.batches(CLIPS)
    assert len(whole.clips) == 64
    assert loads[-1]["lethal"] is inference.lethal  # one record for all passes


@pytest.mark.parametrize("allowed", [0.3, 0.31])
def test_as_many_damaged_clips_as_allowed_are_no_error(loads: list[dict[str, Any]], allowed: float) -> None:
    assert len(list(make_pass(allowed).batches(CLIPS, global_batch=4))) == 3


def test_more_damaged_clips_are_an_error_after_the_last_batch(loads: list[dict[str, Any]]) -> None:
    batches = make_pass(0.29).batches(CLIPS, global_batch=4)
    for _ in range(3):
        next(batches)
    with pytest.raises(
        DataError, match=r"^3 of 10 clips are damaged, data.max_bad_fraction allows 3; the first: clip 103: damaged$"
    ):
        next(batches)
