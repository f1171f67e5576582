"""RanPAC: ridge regression on a random ReLU projection of fixed features, without a constant.

Source: McDonnell et al. 2023 (arXiv 2307.02251), its second phase: the prompts or adapters that the paper trains at
step 0 are not part of it.
"""

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.method_options import RanpacOptions
from avcil_dist.methods.sums_head import RidgeHead
from avcil_dist.models.outputs import Output


class Ranpac(RidgeHead):
    """Ridge regression on h = relu(xR), the entries of R standard normal, γ chosen on validation clips."""

    Options = RanpacOptions

    def phi(self, output: Output) -> Tensor:
        """Return h (B, M), float32."""
        features = torch.cat(self.features(output), dim=1)
        return torch.relu(features @ self.directions(features))

    def spread(self, columns: int) -> np.float32:
        """Return 1: the directions are not scaled."""
        return np.float32(1)


METHOD = Ranpac
