"""The scale of the loss in fp16: as large as it can be without gradients that overflow."""

from dataclasses import dataclass

GROW_AFTER = 2000  # steps without overflow, after Micikevicius et al. 2018


@dataclass
class LossScale:
    """Halved by an overflow, doubled after 2,000 steps without one. Equal on all ranks."""

    value: float = 2.0**16
    num_good: int = 0

    @property
    def is_smallest(self) -> bool:
        """Whether an overflow is the gradient's own doing: there is nothing left to halve."""
        return self.value <= 1

    def update(self, *, overflowed: bool) -> None:
        """Take account of a step."""
        if overflowed:
            self.value, self.num_good = max(1.0, self.value / 2), 0
        elif self.num_good + 1 == GROW_AFTER:
            self.value, self.num_good = self.value * 2, 0
        else:
            self.num_good += 1
