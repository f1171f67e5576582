"""Experience replay: cross-entropy over all seen classes, on current clips and exemplars. The simplest rehearsal.

Source: Chaudhry et al. 2019 (arXiv 1902.10486), there in one pass over the data.
"""

from avcil_dist.methods.base import Needs
from avcil_dist.methods.finetune import Finetune


class Er(Finetune):
    """CE_all on each batch of current clips and its batch of exemplars."""

    @property
    def needs(self) -> Needs:
        """Replay."""
        return Needs(memory="replay")


METHOD = Er
