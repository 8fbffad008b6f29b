"""The axis of the classes: segmented images and sequences, as `F.cross_entropy` has them or with classes last."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb

N, SIDE = 6, 4


def images(classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, SIDE, SIDE), torch.randint(0, classes, (N, SIDE, SIDE))


class ClassesLast(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.movedim(1, -1)


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 7), (5, 3, 3), (5, 3, 4, 4), (5, 3, 3, 3), (5, 2, 3, 4, 5)])
def test_log_probabilities_are_those_of_cross_entropy(shape: tuple[int, ...]) -> None:
    """Proves it for any number of axes, also where all have one length, with and without axes for members."""
    likelihood = pb.likelihoods.Categorical(class_dim=1)
    f = torch.randn(4, 2, *shape)
    y = torch.randint(0, shape[1], shape[:1] + shape[2:])
    found = likelihood.given(f, y, lead=3).log_prob(y)
    for draw in range(4):
        for member in range(2):
            loss = F.cross_entropy(f[draw, member], y, reduction="none")
            assert torch.allclose(found[draw, member], -loss.reshape(5, -1).sum(1), atol=1e-5)
    last = pb.likelihoods.Categorical(class_dim=-1)
    assert torch.equal(last.given(f.movedim(3, -1), y, lead=3).log_prob(y), found)
    counted = pb.likelihoods.Categorical(class_dim=1 - len(shape))
    assert torch.equal(counted.given(f, y, lead=3).log_prob(y), found)


@pytest.mark.parametrize("classes", [3, SIDE])
def test_segmentation_through_all_that_reads_labels(classes: int, tmp_path: Path) -> None:
    """Proves that a network with classes on axis 1 is the one with classes last: in training, predictions, scores, log
    likelihoods, after loading, and for ArviZ."""
    x, y = images(classes)
    net = nn.Conv2d(2, classes, 3, padding=1)
    found = []
    for one, class_dim in ((net, 1), (ClassesLast(net), -1)):
        model = pb.models.Dense(one, pb.likelihoods.Categorical(class_dim=class_dim), N)
        guide = pb.models.MeanFieldGuide(model)
        posterior = pb.inference.fit(model, guide, (x, y), epochs=3, lr=0.05, progress=False, seed=0)
        found.append(posterior)
        path = tmp_path / str(class_dim)
        posterior.save(path)
        loaded = pb.load(path, one)
        assert torch.equal(loaded.log_likelihood(x, y, seed=0), posterior.log_likelihood(x, y, seed=0))
    first, last = found
    predictions = [posterior.predict(x, seed=0) for posterior in found]
    assert predictions[0].probs.shape == (N, SIDE, SIDE, classes)
    assert torch.allclose(predictions[0].probs.sum(-1), torch.ones(N, SIDE, SIDE), atol=1e-5)
    assert torch.allclose(predictions[0].probs, predictions[1].probs, atol=1e-5)
    assert torch.allclose(first.log_likelihood(x, y, seed=0), last.log_likelihood(x, y, seed=0), atol=1e-4)
    scores = [pb.diagnostics.evaluate(posterior, (x, y), seed=0) for posterior in found]
    assert scores[0].keys() == scores[1].keys() and "nll" in scores[0]
    for name in scores[0]:
        assert scores[0][name] == pytest.approx(scores[1][name], abs=1e-4), name
    data = [pb.diagnostics.to_arviz(posterior, x, y, num_samples=20, seed=0) for posterior in found]
    assert data[0]["log_likelihood"]["obs"].shape == (1, 20, N)
    values = [torch.as_tensor(one["log_likelihood"]["obs"].values) for one in data]
    assert torch.allclose(values[0], values[1], atol=1e-3)


@pytest.mark.parametrize("model", [pb.models.Rank1, pb.models.Bella, pb.models.SpikeSlab, pb.models.WeightSharing])
def test_every_model_trains_on_segmented_images(model: type) -> None:
    x, y = images(3)
    built = model(nn.Conv2d(2, 3, 3, padding=1), pb.likelihoods.Categorical(class_dim=1), N)
    guides = {pb.models.Rank1: pb.models.Rank1Guide, pb.models.Bella: pb.models.ParticleGuide}
    guide = guides.get(model, pb.models.MeanFieldGuide)(built, 2)
    posterior = pb.inference.fit(built, guide, (x, y), epochs=1, progress=False)
    assert torch.allclose(posterior.predict(x).probs.sum(-1), torch.ones(N, SIDE, SIDE), atol=1e-5)


@pytest.mark.parametrize("classes", [3, SIDE, 5])
def test_the_axis_of_the_classes_is_never_guessed(classes: int) -> None:
    """Proves that classes on axis 1 are refused without class_dim, where they fit and where they might."""
    model = pb.models.Dense(nn.Conv2d(2, classes, 3, padding=1), pb.likelihoods.Categorical(), N)
    with pytest.raises(ValueError, match=r"axis 1.*Categorical\(class_dim=1\).*class_dim=-1"):
        pb.inference.fit(model, pb.models.MeanFieldGuide(model), images(classes), epochs=1, progress=False)


def test_sequences_whose_length_is_the_number_of_classes_are_refused_until_they_say() -> None:
    x, y = torch.randn(N, 5, 2), torch.randint(0, 5, (N, 5))
    model = pb.models.Dense(nn.Linear(2, 5), pb.likelihoods.Categorical(), N)
    with pytest.raises(ValueError, match="may be on axis 1 or on the last one"):
        pb.inference.fit(model, pb.models.MeanFieldGuide(model), (x, y), epochs=1, progress=False)
    model = pb.models.Dense(nn.Linear(2, 5), pb.likelihoods.Categorical(class_dim=-1), N)
    pb.inference.fit(model, pb.models.MeanFieldGuide(model), (x, y), epochs=1, progress=False)


@pytest.mark.parametrize("class_dim", [0, 1.0, True, "1"])
def test_what_is_no_axis_is_refused(class_dim: object) -> None:
    with pytest.raises(ValueError, match="expected the axis of the classes"):
        pb.likelihoods.Categorical(class_dim=class_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("class_dim", [2, -2])
def test_an_axis_that_the_output_lacks_is_refused(class_dim: int) -> None:
    with pytest.raises(ValueError, match="without such an axis"):
        pb.likelihoods.Categorical(class_dim=class_dim).given(torch.randn(5, 3), None)


def test_labels_are_counted_on_the_right_axis() -> None:
    likelihood = pb.likelihoods.Categorical(class_dim=1)
    with pytest.raises(ValueError, match="label 3, but the network has 3 outputs"):
        likelihood.check(torch.full((2, 8, 8), 3), torch.randn(2, 3, 8, 8))
