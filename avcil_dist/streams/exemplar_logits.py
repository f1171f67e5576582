"""Logits that are kept with the exemplars, from the time at which each was stored: a file of the step artifact.

Source: Buzzega et al. 2020 (DER++, arXiv 2004.07211).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.errors import ArtifactError

FILE = "exemplars.safetensors"


@dataclass(frozen=True)
class ExemplarLogits:
    """Row i is that of the memory's exemplar i, class by class.

    `values` (E, C) are logits of C classes, float32; the first `counts` (E,) of them, int64, are known, the others 0.
    An exemplar that could not be read when it was stored has a count of 0.
    """

    values: Tensor
    counts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.values.nbytes + self.counts.nbytes

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the content of the file."""
        return {"logits": self.values, "counts": self.counts}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, num_exemplars: int, num_classes: int, source: str
    ) -> "ExemplarLogits":
        """Return the logits that the file `source` has. Raises ArtifactError for those of another memory."""
        values, counts = tensors.get("logits"), tensors.get("counts")
        fits = (
            len(tensors) == 2
            and values is not None
            and counts is not None
            and (values.dtype, counts.dtype) == (torch.float32, torch.int64)
            and values.shape == (num_exemplars, num_classes)
            and counts.shape == (num_exemplars,)
            and bool(((counts >= 0) & (counts <= num_classes)).all())
        )
        if not fits:
            raise ArtifactError(f"{source}: not the logits of the exemplars of this step; run the step again")
        assert values is not None
        assert counts is not None
        return cls(values, counts)


def updated_logits(
    before: ExemplarMemory, stored: ExemplarLogits | None, after: ExemplarMemory, new: ExemplarLogits
) -> ExemplarLogits:
    """Return the logits of the memory `after` a step: those of the exemplars kept from `before`, then `new`.

    `stored` are those of `before`; None where it is empty. `new` has the rows of the classes that `before` does not
    have, and all classes of the network as columns.
    """
    if stored is None:
        return new
    rows, first = [], 0
    for name, keys in before.keys.items():
        kept = len(after.keys[name])  # a class keeps its first exemplars
        rows.append(torch.arange(first, first + kept))
        first += len(keys)
    kept_rows = torch.cat(rows)
    num_more = new.values.shape[1] - stored.values.shape[1]
    values = torch.cat([F.pad(stored.values[kept_rows], (0, num_more)), new.values])
    return ExemplarLogits(values, torch.cat([stored.counts[kept_rows], new.counts]))
