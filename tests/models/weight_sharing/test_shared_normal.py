"""The distribution of weights that share Gaussians: against its elements, and KL divergences against closed forms."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from coded_networks import PRIORS, N, distributions, elements, prior_site, sharing
from pyro import poutine
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from pyro_bnn import priors
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    CodebookGuide,
    WeightSharing,
)
from pyro_bnn.models.weight_sharing.shared_normal import SharedNormal


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_every_weight_has_its_own_distribution(sampling: str) -> None:
    """Density, mean and variance equal those of the weights one by one; and so do draws, within 5 standard errors."""
    _, guide = sharing(sampling)
    book = guide.book
    assert len(book.outliers) >= 2 and len(book.between) > 10
    t, m, s = elements(book, sampling == "mixture")
    each = MixtureSameFamily(Categorical(t), Normal(m, s))
    found = distributions(guide)
    torch.testing.assert_close(torch.cat([d.mean.flatten() for d in found.values()]), each.mean)
    torch.testing.assert_close(torch.cat([d.variance.flatten() for d in found.values()]), each.variance)
    torch.manual_seed(0)
    draws = torch.cat([d.expand((4, 1)).rsample((5000,)).flatten(3) for d in found.values()], -1)
    assert draws.shape[:3] == (5000, 4, 1)
    start = 0
    for d in found.values():
        n = d.event_shape.numel()
        value = draws[:7, ..., start : start + n].reshape((7, 4, 1) + d.event_shape)
        expected = each.log_prob(draws[:7])[..., start : start + n].sum(-1)
        torch.testing.assert_close(d.log_prob(value), expected)
        start += n
    flat = draws.flatten(0, 2)
    errors = (flat.mean(0) - each.mean) / (each.variance / len(flat)).sqrt()
    fourth = 3 * each.variance.square() * 2  # at most that of these mixtures
    spread = (flat.var(0) - each.variance) / (fourth / len(flat)).sqrt()
    assert float(errors.abs().max()) < 5 and float(spread.abs().max()) < 5
    # weights of one code share no noise
    same = (book.codes() == book.codes().mode().values).nonzero().flatten()[:2]
    assert abs(float(torch.corrcoef(flat[:, same].T)[0, 1])) < 5 / math.sqrt(len(flat))


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_the_gradient_of_a_code_is_the_sum_of_those_of_its_weights(sampling: str) -> None:
    _, guide = sharing(sampling)
    book = guide.book
    for name, d in distributions(guide).items():
        table = d.table
        torch.manual_seed(5)
        value = d.expand((3,)).rsample()
        upstream = torch.randn_like(value)
        got = torch.autograd.grad(value, [book.loc, book.rho], upstream, retain_graph=True)
        loc, scale = (v.detach().expand(3, -1).clone().requires_grad_() for v in (table.loc, table.scale))
        torch.manual_seed(5)
        noise = torch.randn(3, d.event_shape.numel(), dtype=torch.float64)
        labels = table.labels.long().expand(3, -1).clone()
        if table.pairs is not None:
            first = torch.rand(3, len(table.pairs.alpha), dtype=torch.float64) < table.pairs.alpha
            codes = torch.where(first, table.pairs.codes[:, 0], table.pairs.codes[:, 1])
            labels[:, table.pairs.place] = codes
        by_hand = loc.gather(1, labels) + scale.gather(1, labels) * noise
        torch.testing.assert_close(by_hand.view_as(value), value, msg=name)
        of_loc, of_scale = torch.autograd.grad(by_hand, [loc, scale], upstream.view_as(by_hand))
        back = [table.loc, table.scale]
        expected = torch.autograd.grad(back, [book.loc, book.rho], [of_loc.sum(0), of_scale.sum(0)], retain_graph=True)
        torch.testing.assert_close(got, expected)


def test_a_code_of_many_weights_in_bfloat16_has_their_whole_gradient() -> None:
    """Its sum is made in single precision: one in bfloat16 ends at 256, where adding 1 changes nothing."""
    net = nn.Linear(200, 100, bias=False).to(torch.bfloat16)
    guide = CodebookGuide(WeightSharing(net, Gaussian(0.3), N), 1, blend=0.0, outliers=0.0)
    (table,) = guide.book.tables()
    SharedNormal(table, net.weight.shape).rsample().sum().backward()
    assert guide.book.loc.grad is not None
    assert float(guide.book.loc.grad) == pytest.approx(20_000, rel=0.01)


@pytest.mark.parametrize("prior", ["normal", "laplace"])
def test_the_divergence_is_the_sum_over_weights(prior: str) -> None:
    model, guide = sharing("codebook", prior=PRIORS[prior])
    _, m, s = elements(guide.book, False)
    of = Normal(0.1, 0.7) if prior == "normal" else torch.distributions.Laplace(0.0, 0.4)
    p = of.expand(m[:, 0].shape)
    expected = kl_divergence(Normal(m[:, 0], s[:, 0]), type(p)(p.loc.double(), p.scale.double())).sum()
    total = sum(kl_divergence(d, prior_site(model, n)).sum() for n, d in distributions(guide).items())
    torch.testing.assert_close(total, expected)


def test_the_divergence_given_a_sampled_scale() -> None:
    """Of every site from Normals with the layer's own tau, as of independent weights; in each of several plates."""
    model, guide = sharing("codebook", prior=priors.HierarchicalNormal())
    with pyro.plate("several", 3, dim=-3):
        trace = poutine.trace(model.sample_latents).get_trace()
    _, m, s = elements(guide.book, False)
    start = 0
    for name, d in distributions(guide).items():
        n = d.event_shape.numel()
        tau, p = trace.nodes[f"{name}_tau"]["value"], trace.nodes[name]["fn"]
        assert tau.shape == (3, 1, 1)
        each = Normal(m[start : start + n, 0], s[start : start + n, 0])
        expected = kl_divergence(each, Normal(torch.zeros_like(tau[..., None]), tau[..., None])).sum(-1)
        torch.testing.assert_close(kl_divergence(d.expand((3, 1, 1)), p), expected)
        start += n


@pytest.mark.parametrize(
    ("sampling", "prior"), [("mixture", "normal"), ("codebook", "mixture"), ("mixture", "mixture")]
)
def test_where_there_is_no_closed_form_it_is_a_bound(sampling: str, prior: str) -> None:
    """At least the Monte Carlo estimate, less 4 standard errors; and near it where codes are narrow."""
    model, guide = sharing(sampling, prior=PRIORS[prior])
    with torch.no_grad():
        for rho in (guide.book.rho, guide.book.outlier_rho):
            rho.sub_(3)
    torch.manual_seed(0)
    for name, d in distributions(guide).items():
        p = prior_site(model, name)
        d = d.expand(p.batch_shape)
        bound = kl_divergence(d, p).sum()
        w = d.rsample((4000,))
        terms = (d.log_prob(w) - p.log_prob(w)).flatten()
        assert float(bound) > float(terms.mean() - 4 * terms.std() / math.sqrt(4000))
        pairs = 0 if d.table.pairs is None else len(d.table.pairs.alpha)  # at most log 2 each
        assert float(bound) < float(terms.mean()) + 0.02 * d.event_shape.numel() + math.log(2) * pairs


def test_a_prior_with_one_component_is_the_normal() -> None:
    one = sharing("codebook", prior=priors.GaussianMixture([0.0], [0.7]))
    other = sharing("codebook", prior=priors.Normal(0.0, 0.7))
    for name, d in distributions(one[1]).items():
        torch.testing.assert_close(
            kl_divergence(d, prior_site(one[0], name)), kl_divergence(d, prior_site(other[0], name))
        )
