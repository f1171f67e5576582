"""Joint training: in each step a fresh network on all data of all seen classes. The upper bound."""

from avcil_dist.methods.base import Needs
from avcil_dist.methods.finetune import Finetune


class Joint(Finetune):
    """Cross-entropy as in fine-tuning, with other data and other initial weights."""

    @property
    def needs(self) -> Needs:
        """All data, and a fresh network."""
        return Needs(all_data=True, fresh_network=True)


METHOD = Joint
