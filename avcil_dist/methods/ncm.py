"""Nearest class mean by cosine, from sums over clips of fixed features.

Source: Mensink et al. 2013, here with the cosine and without a learned metric. Of the sums, only H is kept.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from avcil_dist.methods.feature_sums import TARGETS
from avcil_dist.methods.sums_head import SumsHead


class Ncm(SumsHead):
    """Scores φ·μ_c / ‖μ_c‖: the cosine with each class mean, times the length of φ."""

    has_gram = False

    def head(self, sums: Mapping[str, Tensor], rows: Tensor | None) -> Tensor:
        """Return class sums of length 1, and zeros for the constant."""
        totals = sums[TARGETS] if rows is None else sums[TARGETS][rows]
        return F.pad(F.normalize(totals[:-1], dim=0, eps=0), (0, 0, 0, 1)).nan_to_num()


METHOD = Ncm
