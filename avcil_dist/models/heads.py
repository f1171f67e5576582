"""Classification heads that grow with the class stream."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearHead(nn.Linear):
    """Linear head: one row and one bias per class, in the order of arrival."""

    def __init__(
        self, dim: int, num_classes: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(dim, num_classes, device=device, dtype=dtype)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return self.out_features


class ProxyHead(nn.Module):
    """Local similarity classifier: several proxies per class, those of old classes frozen.

    The similarity of a clip and a proxy is the negative squared distance of their unit vectors. A class's logit is
    the mean of its proxies' similarities, weighted by their softmax.
    Source: Douillard et al. 2020 (PODNet), Kang et al. 2022 (AFC).
    """

    def __init__(self, dim: int, num_classes: int, num_frozen: int, num_proxies: int) -> None:
        """Make random proxies; those of the first `num_frozen` classes take no gradient."""
        super().__init__()
        self.num_proxies = num_proxies
        self.frozen: Tensor
        self.register_buffer("frozen", torch.randn(num_frozen * num_proxies, dim) / dim**0.5)
        self.proxies = nn.Parameter(torch.randn((num_classes - num_frozen) * num_proxies, dim) / dim**0.5)

    @property
    def num_classes(self) -> int:
        """Number of classes of the head."""
        return (len(self.frozen) + len(self.proxies)) // self.num_proxies

    @property
    def mean_norm(self) -> float:
        """Mean length of all proxies."""
        return float(torch.cat([self.frozen, self.proxies.detach()]).norm(dim=1).mean())

    def forward(self, feature: Tensor) -> Tensor:
        """Return logits (B, C) of features (B, D)."""
        proxies = F.normalize(torch.cat([self.frozen, self.proxies]), dim=1)
        similarity = 2 * F.normalize(feature, dim=1) @ proxies.T - 2  # of unit vectors: -|a - b|² = 2ab - 2
        by_class = similarity.unflatten(1, (-1, self.num_proxies))
        return (by_class.softmax(dim=2) * by_class).sum(dim=2)


Head = LinearHead | ProxyHead


def grow_linear(head: LinearHead, num_classes: int, num_features: int | None = None) -> LinearHead:
    """Return a head for `num_classes` classes: a copy of the old rows and biases, and new ones freshly drawn.

    With `num_features`, more than before, the old rows have new weights behind the old ones. New numbers have
    nn.Linear's default initialisation, from torch's global generator. Its spread depends on the number of features, not
    on that of classes. Raises ValueError when the head would shrink.
    """
    old, old_features = head.num_classes, head.in_features
    if num_classes < old:
        raise ValueError(f"a head of {old} classes cannot grow to {num_classes}")
    width = num_features or old_features
    grown = LinearHead(width, num_classes, device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        grown.weight[:old, :old_features] = head.weight
        grown.bias[:old] = head.bias
    return grown


@torch.no_grad()
def zero_rows(head: LinearHead, first: int) -> None:
    """Set the rows and biases of a head from class `first` on to zero."""
    head.weight[first:] = 0
    head.bias[first:] = 0


def grow_proxies(head: ProxyHead, num_classes: int, new: Tensor) -> ProxyHead:
    """Return a head for `num_classes` classes: all old proxies frozen, and `new` (new classes · proxies, D) trained.

    Raises ValueError when `new` has not the shape of the new classes' proxies.
    """
    dim = head.frozen.shape[1]
    if new.shape != ((num_classes - head.num_classes) * head.num_proxies, dim):
        raise ValueError(f"{tuple(new.shape)} are not the proxies of {num_classes - head.num_classes} classes")
    grown = ProxyHead(dim, num_classes, head.num_classes, head.num_proxies).to(head.frozen)
    with torch.no_grad():
        grown.frozen.copy_(torch.cat([head.frozen, head.proxies]))
        grown.proxies.copy_(new)
    return grown
