"""Networks that compare their samples with fixed texts, as a classifier of CLIP does: some weights meet no sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb

N, TEXTS = 6, 3


def by_matmul(pictures: Tensor, texts: Tensor) -> Tensor:
    return pictures @ texts.mean(1).mT


def by_last_word(pictures: Tensor, texts: Tensor) -> Tensor:
    """Picks the last word of each text by two lists of indices, as CLIP does."""
    return pictures @ texts[torch.arange(TEXTS), torch.tensor([1, 3, 2])].t()


def by_einsum(pictures: Tensor, texts: Tensor) -> Tensor:
    return torch.einsum("nd,cd->nc", pictures, texts.amax(1))


def by_checked_shape(pictures: Tensor, texts: Tensor) -> Tensor:
    assert texts.shape[0] == TEXTS
    return pictures @ texts.mean(1).mT


COMPARISONS = [by_matmul, by_last_word, by_einsum, by_checked_shape]


class ZeroShot(nn.Module):
    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.pictures, self.texts, self.compare = nn.Linear(4, 5), nn.Linear(2, 5), compare
        self.register_buffer("words", torch.randn(TEXTS, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.compare(self.pictures(x), self.texts(self.words))


@pytest.mark.parametrize("kind", [pb.models.Rank1, pb.models.Bella])
@pytest.mark.parametrize("compare", COMPARISONS)
def test_weights_that_meet_no_sample_are_refused_by_name(
    compare: Callable[..., Tensor], kind: type[pb.models.Rank1 | pb.models.Bella]
) -> None:
    """Proves that whatever the network raises at the odd shape becomes one message, whose remedy works."""
    model, x = kind(ZeroShot(compare), pb.likelihoods.Categorical(), N), torch.randn(N, 4)
    with pytest.raises(RuntimeError, match=r"(?s)'texts.weight'.*does not depend on the sample. Leave it out"):
        model(x)
    model = kind(ZeroShot(compare), pb.likelihoods.Categorical(), N, select="pictures")
    guide = pb.models.MeanFieldGuide(model)
    assert pb.Posterior(model, guide).predict(x, 2, seed=0).probs.shape == (N, TEXTS)


@pytest.mark.parametrize("compare", COMPARISONS)
def test_whole_weights_may_meet_no_sample(compare: Callable[..., Tensor]) -> None:
    model = pb.models.Dense(ZeroShot(compare), pb.likelihoods.Categorical(), N)
    f = pb.Posterior(model, pb.models.MeanFieldGuide(model)).predict(torch.randn(N, 4), 3, seed=0)
    assert f.probs.shape == (N, TEXTS)
