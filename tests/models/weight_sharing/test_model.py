"""The model of weight sharing: the codebook of the guide as its prior, and the objective under a given prior."""

from __future__ import annotations

import math

import pytest
import torch
from coded_networks import N, data, distributions, elements, prior_site, sharing
from pyro import poutine
from torch.distributions import Normal, kl_divergence

from pyro_bnn import priors
from pyro_bnn.inference import MixtureELBO


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_with_the_codebook_as_prior_the_divergence_is_the_length_of_the_code(sampling: str) -> None:
    """Without outliers and pairs N times the entropy of the labels, in nats; in general ``sum_i KL(r_i || pi)``, which
    no Monte Carlo estimate of the true divergence exceeds."""
    own = {r".*weight": priors.CodebookPrior(slab=0.8), ".*": priors.Normal()}
    model, guide = sharing(sampling, prior=own, blend=0.0, outliers=0.0)
    shares = torch.bincount(guide.book.codes()).double() / len(guide.book.labels)
    total = sum(kl_divergence(d, prior_site(model, n)).sum() for n, d in distributions(guide).items())
    entropy = -torch.xlogy(shares, shares).sum() * len(guide.book.labels)
    torch.testing.assert_close(total, entropy, rtol=1e-4, atol=0)  # pi_0 is a thousandth of a weight, not none
    assert guide.compression_report()["label_entropy"] == pytest.approx(
        float(entropy) / len(guide.book.labels) / math.log(2), rel=1e-9
    )
    model, guide = sharing(sampling, prior=own)
    book = guide.book
    pi = book.log_shares(sampling == "mixture").exp()
    t, m, s = elements(book, sampling == "mixture")
    expected = 0.0
    for i, code in enumerate(book.codes().tolist()):
        if i in book.between.tolist() and sampling == "mixture":
            j = book.between.tolist().index(i)
            for share, k in zip(t[i].tolist(), book.pair[j].tolist(), strict=True):
                expected += share * math.log(share / float(pi[1 + k])) if share > 0 else 0.0
        elif i in book.outliers.tolist() or i in book.between.tolist():
            slab = Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
            expected += float(kl_divergence(Normal(m[i, 0], s[i, 0]), slab)) - math.log(float(pi[0]))
        else:
            expected -= math.log(float(pi[1 + code]))
    found = distributions(guide)
    bounds = {n: kl_divergence(d, prior_site(model, n)).sum() for n, d in found.items()}
    assert sum(b.item() for b in bounds.values()) == pytest.approx(expected, rel=1e-9)
    torch.manual_seed(0)
    for name, d in found.items():
        p = prior_site(model, name)
        w = d.expand(p.batch_shape).rsample((1000,))
        terms = (d.log_prob(w) - p.log_prob(w)).flatten()
        assert bounds[name].item() > float(terms.mean() - 4 * terms.std() / math.sqrt(1000))
    # the prior of precisions enters the model once
    x, y = data()
    trace = poutine.trace(poutine.replay(model, trace=poutine.trace(guide).get_trace(x, y))).get_trace(x, y)
    trace.compute_log_prob()
    used = book.scales()[book.weights_per_code(soft=True) > 0].detach()
    gamma = torch.distributions.Gamma(torch.tensor(2.0).double(), torch.tensor(1e-4).double()).log_prob(used**-2)
    torch.testing.assert_close(trace.nodes["weight_prior"]["log_prob_sum"], gamma.sum())


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_the_objective_is_the_one_of_independent_weights(sampling: str) -> None:
    """The ELBO by hand: N/B times the expected log likelihood at the draw, minus the sum of divergences."""
    x, y = data()
    model, guide = sharing(sampling)
    torch.manual_seed(0)
    loss = MixtureELBO().differentiable_loss(model, guide, x[:20], y[:20])
    torch.manual_seed(0)
    draw = poutine.trace(guide).get_trace(x[:20], y[:20])
    f = model.function(x[:20], {s.name: draw.nodes[s.name]["value"] for s in model.sites()}, 20)
    density = Normal(f.squeeze(0).squeeze(-1), 0.3).log_prob(y[:20]).sum() * N / 20
    t, m, s = elements(guide.book, sampling == "mixture")
    kl = (t * (math.log(0.7) - s.log() + (s**2 + m**2) / (2 * 0.49) - 0.5)).sum()
    for name in ("0.bias", "2.bias", "4.bias"):
        kl = kl + kl_divergence(draw.nodes[name]["fn"].in_full, prior_site(model, name)).sum()
    torch.testing.assert_close(loss, kl - density)
