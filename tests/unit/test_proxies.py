"""Head of proxies, proxies from cluster centres, and prediction by nearest means."""

import pytest
import torch
from sklearn.cluster import KMeans
from torch.nn import functional as F

from avcil_dist.methods.afc import cluster_centres
from avcil_dist.methods.nearest_mean import class_means, nearness
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.heads import ProxyHead, grow_proxies
from avcil_dist.models.network import AudioNetwork

DIM, PROXIES = 6, 3


def test_a_logit_is_the_similarity_to_the_nearest_proxies() -> None:
    head = ProxyHead(2, 2, 0, num_proxies=2)
    with torch.no_grad():
        head.proxies.copy_(torch.tensor([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [-3.0, 0.0]]))
    logits = head(torch.tensor([[0.1, 0.0]]))
    near, right_angle, opposite = 0.0, -2.0, -4.0
    weights = torch.tensor([near, right_angle]).softmax(dim=0)
    assert logits[0, 0].item() == pytest.approx(float(weights[0] * near + weights[1] * right_angle))
    assert logits[0, 1].item() == pytest.approx(opposite)


def test_growing_freezes_the_old_proxies_and_copies_the_new_ones() -> None:
    head = ProxyHead(DIM, 2, 0, PROXIES)
    new = torch.randn(PROXIES, DIM)
    grown = grow_proxies(head, 3, new)
    assert grown.num_classes == 3
    assert torch.equal(grown.frozen, head.proxies)
    assert torch.equal(grown.proxies, new)
    feature = torch.randn(4, DIM)
    torch.testing.assert_close(grown(feature)[:, :2], head(feature))
    grown(feature).sum().backward()
    assert grown.proxies.grad.abs().sum() > 0
    assert head.proxies.grad is None
    assert [name for name, _ in grown.named_parameters()] == ["proxies"]


def test_growing_twice_freezes_both() -> None:
    head = grow_proxies(ProxyHead(DIM, 1, 0, PROXIES), 2, torch.randn(PROXIES, DIM))
    grown = grow_proxies(head, 4, torch.randn(2 * PROXIES, DIM))
    assert torch.equal(grown.frozen, torch.cat([head.frozen, head.proxies]))


def test_proxies_of_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="proxies of 2 classes"):
        grow_proxies(ProxyHead(DIM, 1, 0, PROXIES), 3, torch.randn(PROXIES, DIM))


def test_a_network_with_proxies_loads_what_it_saved() -> None:
    network = AudioNetwork(Precomputed(DIM), 3, ProxyHead(DIM, 3, 2, PROXIES))
    other = AudioNetwork(Precomputed(DIM), 3, ProxyHead(DIM, 3, 2, PROXIES))
    other.load_state_dict(network.state_dict())
    visual, audio = torch.zeros(2, 1, 1, DIM), torch.randn(2, DIM)
    torch.testing.assert_close(other(visual, audio).logits, network(visual, audio).logits)


def test_centres_are_those_of_the_clusters() -> None:
    corners = F.normalize(torch.eye(4)[:3] + 0.05, dim=1)
    clips = corners.repeat_interleave(20, dim=0) + 0.01 * torch.randn(60, 4)
    centres = cluster_centres(clips, 3)
    nearest = torch.cdist(corners, F.normalize(centres, dim=1)).min(dim=1)
    assert nearest.values.max() < 0.02
    assert sorted(nearest.indices.tolist()) == [0, 1, 2]


def test_centres_of_few_clips_depend_neither_on_their_order_nor_on_their_length() -> None:
    few = torch.randn(4, 4)
    other = (few * torch.tensor([[1.0], [7.0], [0.2], [3.0]]))[[2, 0, 3, 1]]
    torch.testing.assert_close(cluster_centres(few, 4), cluster_centres(other, 4))


def test_a_class_of_one_clip_has_proxies_that_are_all_that_clip() -> None:
    clip = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(cluster_centres(clip, 10), torch.tensor([[0.6, 0.8]]).expand(10, 2))
    torch.testing.assert_close(cluster_centres(clip.repeat(30, 1), 4), torch.tensor([[0.6, 0.8]]).expand(4, 2))


def test_clips_that_differ_by_rounding_alone_are_one_clip() -> None:
    clips = torch.tensor([[1.0, 0.0], [1.0, 1e-7], [0.0, 1.0]])
    centres = cluster_centres(clips, 3)
    assert len(torch.unique(centres, dim=0)) == 2
    torch.testing.assert_close(cluster_centres(clips[:2], 2), torch.tensor([[1.0, 0.0]]).expand(2, 2))


def test_centres_are_those_of_one_run_of_k_means_from_seed_0() -> None:
    clips = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    units = F.normalize(clips.double(), dim=1).numpy()
    expected = torch.from_numpy(KMeans(7, n_init=1, random_state=0).fit(units).cluster_centers_).float()
    centres = cluster_centres(clips, 7)
    torch.testing.assert_close(centres, expected, rtol=0, atol=0)
    for other in (
        KMeans(7, n_init=10, random_state=0),
        KMeans(7, n_init=1, random_state=1),
    ):
        found = torch.from_numpy(other.fit(units).cluster_centers_).float()
        assert (found.sort(dim=0).values - centres.sort(dim=0).values).abs().max() > 0.01


def test_random_proxies_have_unit_variance_divided_by_the_dimension() -> None:
    torch.manual_seed(0)
    head = ProxyHead(64, 40, 20, num_proxies=10)
    for proxies in (head.frozen, head.proxies):
        assert proxies.shape == (200, 64)
        assert proxies.std().item() == pytest.approx(1 / 8, rel=0.03)
        assert abs(proxies.mean().item()) < 0.01


def test_the_mean_norm_is_over_old_and_new_proxies() -> None:
    head = ProxyHead(2, 2, 1, num_proxies=1)
    head.frozen.copy_(torch.tensor([[3.0, 4.0]]))
    with torch.no_grad():
        head.proxies.copy_(torch.tensor([[0.0, 1.0]]))
    assert head.mean_norm == 3


def test_fewer_different_clips_than_proxies_are_taken_in_turn() -> None:
    centres = cluster_centres(torch.eye(2), 5)
    assert torch.equal(centres.sum(dim=0).sort().values, torch.tensor([2.0, 3.0]))


def test_means_are_of_unit_vectors_and_without_padding() -> None:
    means = class_means([torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.tensor([[3.0, 4.0]])])
    torch.testing.assert_close(means, torch.tensor([[0.5, 0.5], [0.6, 0.8]]))


def test_the_nearest_mean_has_the_largest_score() -> None:
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.1]])
    feature = torch.tensor([[5.0, 1.0], [0.0, 0.2]])
    scores = nearness(feature, means)
    expected = -(F.normalize(feature, dim=1)[:, None] - means).square().sum(2)
    torch.testing.assert_close(scores, expected)
    assert scores.argmax(dim=1).tolist() == [0, 1]


def test_a_class_without_exemplars_is_never_predicted() -> None:
    means = class_means([torch.zeros(0, 2), torch.tensor([[1.0, 0.0]])])
    assert nearness(torch.tensor([[-1.0, 0.0], [0.0, 1.0]]), means).argmax(dim=1).tolist() == [1, 1]
