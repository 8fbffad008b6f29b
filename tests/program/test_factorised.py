"""The KL divergence of a block of sites, which is summed part by part, against torch's in float64."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_bnn.program.divergences import kl_of_sites
from pyro_bnn.program.factorised import NormalBlock

SHAPES = [torch.Size([300, 400]), torch.Size([400]), torch.Size([7, 90, 100])]  # three parts, of which none ends a site
PRIORS = [(0.0, 1.0), (0.5, 0.1), (-1.0, 3.0)]


def block(members: int, shapes: list[torch.Size]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = members, sum(shape.numel() for shape in shapes)
    loc = torch.randn(size, dtype=torch.float64, generator=generator)
    return loc.requires_grad_(), (0.01 + torch.rand(size, dtype=torch.float64, generator=generator)).requires_grad_()


def expected(loc: Tensor, scale: Tensor, shapes: list[torch.Size], priors: list[tuple[float, float]]) -> Tensor:
    m, s = (
        torch.cat([torch.full((n.numel(),), p[i]).double() for n, p in zip(shapes, priors, strict=True)])
        for i in (0, 1)
    )
    return kl_divergence(Normal(loc, scale), Normal(m, s)).sum(-1)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("sites", [1, 3])
def test_a_large_block_has_the_divergence_and_gradients_of_its_elements(members: int, sites: int) -> None:
    shapes, priors = SHAPES[:sites], PRIORS[:sites]
    loc, scale = block(members, shapes)
    parts = NormalBlock(loc, scale, shapes).parts()
    whole = [
        dist.Normal(torch.tensor(m).double(), torch.tensor(s).double()).expand(shape).to_event(len(shape))
        for (m, s), shape in zip(priors, shapes, strict=True)
    ]
    kl, reference = kl_of_sites(parts, whole), expected(loc, scale, shapes, priors)
    assert kl is not None
    assert kl.shape == (members,)
    assert torch.allclose(kl, reference, rtol=1e-12)
    weight = torch.arange(1.0, members + 1, dtype=torch.float64)
    found = torch.autograd.grad((kl * weight).sum(), (loc, scale), create_graph=True)
    exact = torch.autograd.grad((reference * weight).sum(), (loc, scale), create_graph=True)
    for own, other in zip(found, exact, strict=True):
        assert torch.allclose(own, other, rtol=1e-12)
    for own, other in zip(
        torch.autograd.grad((kl * weight).sum(), (loc, scale)), exact, strict=True
    ):  # the way without a graph of the gradient is another
        assert torch.allclose(own, other, rtol=1e-12)
    twice = torch.autograd.grad(sum(g.sum() for g in found), scale)[0]
    assert torch.allclose(twice, torch.autograd.grad(sum(g.sum() for g in exact), scale)[0], rtol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_priors_that_vary_along_some_axes_alone(axis: int) -> None:
    """Parameters that are expanded along members, rows of a weight or its columns are those of every element."""
    loc, scale = block(3, [torch.Size([4, 5])])
    (part,) = NormalBlock(loc, scale, [torch.Size([4, 5])]).parts()
    sizes = [3, 4, 5]
    shape = [n if i == axis else 1 for i, n in enumerate(sizes)]
    m, s = (torch.rand(shape, dtype=torch.float64).add(0.5).expand(sizes) for _ in range(2))
    prior = dist.Normal(m, s).to_event(2)
    reference = kl_divergence(Normal(loc.view(3, 4, 5), scale.view(3, 4, 5)), Normal(m, s)).sum((1, 2))
    torch.testing.assert_close(kl_of_sites([part], [prior]), reference)
    torch.testing.assert_close(kl_divergence(part, prior), reference)
