"""Forward transfer: the effect of the steps so far on classes that come next, measured in the features.

A network of a step has no outputs for later classes, so the published FWT (Lopez-Paz and Ranzato 2017, eq. 4: accuracy
on a task just before it is learnt, less that of an untrained network) is taken of a nearest-mean classifier on the
features: means of the task's training clips, its test clips classified among the task's classes.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from avcil_dist.errors import DataError
from avcil_dist.inference.predict import remove_modality
from avcil_dist.inference.step_predictions import StepRequest, loaded, restored
from avcil_dist.models.network import HeadedNetwork, Network
from avcil_dist.seeds import derive_seed
from avcil_dist.training.build import network_after
from avcil_dist.training.incremental_step import Step
from avcil_dist.world import World


def forward_transfer(request: StepRequest, step: int, world: World) -> float | None:
    """Return FWT of task `step + 1`: nearest-mean accuracy by the network of `step`, less that by the initial network.

    None where the network has no trained features, so that nothing can transfer. All ranks of `world` call it. Raises
    as `predict_step` does; DataError for a class of the task without a readable training clip.
    """
    artifact, manifest = loaded(replace(request, step=step))
    with restored(request, artifact, manifest, world) as (own, network):
        if not isinstance(network, HeadedNetwork):
            return None
        torch.manual_seed(derive_seed(own.config.seed, "weights", 0))
        initial = network_after(own.config, manifest.shape, own.scenario, own.method, 0).to(own.device)
        if request.condition.modality:
            remove_modality(initial, own.method, request.condition.modality)
        return _accuracy(own, network, request) - _accuracy(own, initial, request)


def _accuracy(step: Step, network: Network, request: StepRequest) -> float:
    """The nearest-mean accuracy on the clips of the task after `step`."""
    names = step.scenario.new(step.number + 1)
    inference = replace(step.inference(), noise=request.condition.noise)
    train = inference.class_features(network, {name: step.manifest.clips([name], "train") for name in names})
    for name in names:
        if not len(train[name].features):
            raise DataError(f"class {name!r}: none of its training clips can be read; restore its shards")
    test = inference.class_features(network, {name: step.manifest.clips([name], request.split) for name in names})
    return nearest_mean_accuracy(
        {name: train[name].features for name in names}, {name: test[name].features for name in names}
    )


def nearest_mean_accuracy(train: Mapping[str, Tensor], test: Mapping[str, Tensor]) -> float:
    """Return the share of test features (clips, D) whose nearest class mean (squared L2, unit length) is their own."""
    means = torch.stack([normalize(features.double()).mean(dim=0) for features in train.values()])
    correct = [
        (torch.cdist(normalize(features.double()), means).argmin(dim=1) == label).numpy()
        for label, features in enumerate(test[name] for name in train)
    ]
    return float(np.concatenate(correct).mean())
