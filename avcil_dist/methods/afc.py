"""Adaptive feature consolidation (Kang et al. 2022), as the baseline of Pian et al. 2023.

A head of proxies, NCA loss, and a distillation of features, weighted by their importance for the teacher's loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.config.method_options import AfcOptions
from avcil_dist.methods.base import Needs, Targets
from avcil_dist.methods.losses import cross_entropy, feature_discrepancy, proxy_nca
from avcil_dist.methods.nearest_mean import NearestMean
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output


class Afc(NearestMean):
    """NCA + λ √(step + 1) · feature discrepancy, on current clips and exemplars together.

    The teacher has the new classes' imprinted proxies beside its own, so that its loss is defined for clips of new
    classes. The importance of a clip's features is constant within a step.
    """

    Options = AfcOptions

    @property
    def needs(self) -> Needs:
        """A teacher and its importance, exemplars among the current clips, and a head of proxies."""
        return Needs(
            teacher=True,
            memory="join",
            selection="herding",
            means=self.options.predict == "nme",
            importance=True,
            network_spec=NetworkSpec(head="proxies", num_proxies=self.options.num_proxies),
        )

    def imprint(self, features: Sequence[Tensor], norm: float) -> Tensor:
        """Return the centres of K clusters of each class's unit-norm features, scaled to the length `norm`."""
        centres = [cluster_centres(of_class, self.options.num_proxies) for of_class in features]
        return norm * F.normalize(torch.cat(centres), dim=1)

    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return CE_all at step 0, afterwards NCA with the discrepancy."""
        if teacher is None:
            return {"loss": cross_entropy(output.logits, targets.labels)}
        assert teacher.importance is not None
        nca = proxy_nca(output.logits, targets.labels).sum() / max(1, len(targets.labels))
        discrepancy = feature_discrepancy(output.features(), teacher.features(), teacher.importance)
        weight = self.options.lambda_discrepancy * (self.context.step + 1) ** 0.5
        return {"loss": nca + weight * discrepancy, "nca": nca, "discrepancy": discrepancy}

    def importance_loss(self, labels: Tensor, output: Output) -> Tensor:
        """Return the NCA loss of each clip."""
        return proxy_nca(output.logits, labels)


def cluster_centres(features: Tensor, count: int) -> Tensor:
    """Return the centres (count, D) of k-means of unit-norm features (clips, D).

    With fewer different clips than centres, the clips are the centres, repeated in turn.
    """
    from sklearn.cluster import KMeans  # a second to import, and only this method needs it

    units = F.normalize(features.double(), dim=1)
    different = torch.unique(units.float().round(decimals=6), dim=0).to(units)
    if len(different) <= count:
        return different[torch.arange(count) % len(different)].float()
    clusters = KMeans(count, n_init=1, random_state=0).fit(units.numpy())
    return torch.from_numpy(clusters.cluster_centers_).float()


METHOD = Afc
