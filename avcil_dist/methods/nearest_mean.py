"""Prediction by the nearest mean of exemplars (Rebuffi et al. 2017), for the methods that offer it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def class_means(exemplars: Sequence[Tensor]) -> Tensor:
    """(C, D) float32: the mean of each class's unit-norm features (n, D); NaN for a class without exemplars."""
    rows = [F.normalize(features.double(), dim=1) for features in exemplars]
    dim = next((features.shape[1] for features in rows if len(features)), 0)
    none = torch.full((dim,), torch.nan, dtype=torch.float64)
    return torch.stack([features.mean(dim=0).cpu() if len(features) else none for features in rows]).float()


def nearness(feature: Tensor, means: Tensor) -> Tensor:
    """(B, C): the negative squared distance of unit-norm features (B, D) to class means (C, D).

    A class without a mean is infinitely far: it is never predicted.
    """
    units, centres = F.normalize(feature, dim=1), means.to(feature)
    distance = units.square().sum(1, keepdim=True) - 2 * units @ centres.T + centres.square().sum(1)
    return -distance.nan_to_num(nan=torch.inf)
