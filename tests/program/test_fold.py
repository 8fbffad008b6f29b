"""How a model lays out latents whose plates differ: members and draws become one axis."""

from __future__ import annotations

import torch
from torch import nn

from pyro_bnn.likelihoods import Categorical
from pyro_bnn.models import Rank1


def test_members_that_all_draws_share_are_repeated_for_each_draw() -> None:
    """A latent with the axes of members alone, beside others with one of draws on the left; and all other shapes."""
    model = Rank1(nn.Linear(2, 3), Categorical(), 10)
    lead = torch.Size([4, 3])
    members = torch.randn(3, 1, 5)
    folded = model.fold(members, 1, lead)
    assert folded.shape == (12, 1, 5)
    torch.testing.assert_close(folded.view(4, 3, 1, 5), members.expand(4, 3, 1, 5))
    draws = torch.randn(4, 1, 1, 5)
    torch.testing.assert_close(model.fold(draws, 1, lead).view(4, 3, 1, 5), draws.expand(4, 3, 1, 5))
    both = torch.randn(4, 3, 6, 5)
    torch.testing.assert_close(model.fold(both, 1, lead), both.view(12, 6, 5))
    assert model.fold(torch.randn(1, 6, 5), 1, lead).shape == (1, 6, 5)
    assert model.fold(torch.randn(5), 1, lead).shape == (1, 1, 5)
