"""Codebook guides: distributions against their elements, objectives against closed forms, and training."""

from __future__ import annotations

import copy
import json
import math
import time
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
import torchvision
from by_hand import chain
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

import pyro_bnn as pb
from pyro_bnn import priors
from pyro_bnn.inference import MixtureELBO, fit
from pyro_bnn.likelihoods import Categorical as Classes
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    Codebook,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    WeightSharing,
    architectures,
    coding,
)
from pyro_bnn.models.weight_sharing.codebook import inverse_scale
from pyro_bnn.models.weight_sharing.merge_codes import absorb_outliers, follow
from pyro_bnn.models.weight_sharing.shared_normal import SharedNormal, code_length

N = 60


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, torch.sin(x[:, 0])


def sharing(sampling: Any = "codebook", codes: int = 12, prior: Any = None, **options: Any) -> Any:
    model = WeightSharing(chain(2, 16, 8, 1), Gaussian(0.3), N, prior=prior or priors.Normal(0.0, 0.7))
    guide = CodebookGuide(model, codes, sampling=sampling, **{"blend": 0.1, "outliers": 0.06, "smallest": 1} | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # deviations that differ by code
        for rho in (guide.book.rho, guide.book.outlier_rho):
            rho.copy_(-2 + 0.7 * torch.randn(rho.shape, generator=generator, dtype=rho.dtype))
    return model, guide


def elements(book: Codebook, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and deviations of the mixture of every weight, ``[n, 2]``, read off the codebook one by one."""
    loc, scale = book.means().detach(), book.scales().detach()
    out, mid = book.outliers.tolist(), book.between.tolist()
    rows = []
    for i, code in enumerate(book.codes().tolist()):
        if i in out:
            j = out.index(i)
            s = math.log1p(math.exp(float(book.outlier_rho[j].detach()))) + 1e-7
            rows.append((1.0, float(book.outlier_loc[j].detach()), s, 0.0, s))
        elif i in mid:
            j = mid.index(i)
            (a, b), t = book.pair[j].tolist(), float(book.alpha[j])
            m1, m2, s1, s2 = (float(v) for v in (loc[a], loc[b], scale[a], scale[b]))
            if soft:
                rows.append((t, m1, s1, m2, s2))
            else:
                s = math.hypot(t * s1, (1 - t) * s2)
                rows.append((1.0, t * m1 + (1 - t) * m2, s, 0.0, s))
        else:
            rows.append((1.0, float(loc[code]), float(scale[code]), 0.0, 1.0))
    t, m1, s1, m2, s2 = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return torch.stack([t, 1 - t], 1), torch.stack([m1, m2], 1), torch.stack([s1, s2], 1)


def distributions(guide: CodebookGuide) -> dict[str, SharedNormal]:
    return {
        name: SharedNormal(table, shape)
        for (name, shape), table in zip(guide.book.sites, guide.book.tables(guide.sampling == "mixture"), strict=True)
    }


# ------------------------------------------------------------------------------------------ distributions


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


# ------------------------------------------------------------------------------------------- KL divergences


PRIORS = {
    "normal": priors.Normal(0.1, 0.7),
    "laplace": priors.Laplace(0.0, 0.4),
    "mixture": priors.GaussianMixture([-0.3, 0.0, 0.4], [0.2, 0.05, 0.3], [1.0, 2.0, 1.0]),
}


def prior_site(model: Any, name: str) -> Any:
    x, y = data()
    return poutine.trace(model).get_trace(x, y).nodes[name]["fn"]


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
    used = book.scales()[book.usage(soft=True)[0] > 0].detach()
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
        kl = kl + kl_divergence(draw.nodes[name]["fn"].normal, prior_site(model, name)).sum()
    torch.testing.assert_close(loss, kl - density)


# ------------------------------------------------------------------------------------------------ the guide


def test_blending_at_both_ends_is_a_code() -> None:
    _, guide = sharing()
    book = guide.book
    for value, which in ((1.0, 0), (0.0, 1)):
        book.alpha.fill_(value)
        pair = book.pair[:, which].long()
        each = torch.cat([d.mean.flatten() for d in distributions(guide).values()])
        spread = torch.cat([d.variance.flatten() for d in distributions(guide).values()])
        torch.testing.assert_close(each[book.between], book.means()[pair])
        torch.testing.assert_close(spread[book.between], book.scales()[pair].square())


def test_as_many_codes_as_weights_are_the_mean_field() -> None:
    """A codebook of a mean field with a code for each weight has its means and deviations."""
    model = WeightSharing(chain(2, 8, 1), Gaussian(0.3), N)
    field = MeanFieldGuide(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    guide = CodebookGuide.from_mean_field(model, field, 24, blend=0.0, outliers=0.0, iterations=1)
    traces = [poutine.trace(g).get_trace(data()[0]).nodes for g in (guide, field)]
    for site in model.sites():
        ours, theirs = (t[site.name]["fn"] for t in traces)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-6, atol=1e-12)


def test_what_is_coded() -> None:
    """Weights of products by default; biases and others stay factorised, and normalisation layers points."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model = WeightSharing(net, Classes(), 10)
    guide = CodebookGuide(model, 8)
    assert [n for n, _ in guide.book.sites] == ["0.weight", "3.weight"]
    assert guide._blocks["loc"][0][0].name == "0.bias"
    every = CodebookGuide(model, 8, coded=".*")
    assert [n for n, _ in every.book.sites] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert len(every.loc) == 0 and every.member_biases() == []
    with pytest.raises(ValueError, match="no random parameter is the weight of a linear layer"):
        CodebookGuide(WeightSharing(net, Classes(), 10, select=".*bias"), 2)


def test_a_zero_code_and_constrained_entropy() -> None:
    """The mean of code 0 stays 0 in training, where others move; a rate leaves fewer bits in the labels."""
    x, y = data()
    model, guide = sharing(zero=True, codes=16)
    before = guide.book.means().detach().clone()
    fit(model, guide, (x, y), epochs=5, lr=0.05, progress=False, seed=0)
    after = guide.book.means().detach()
    assert float(after[0]) == float(before[0]) == 0.0 and (after[1:] != before[1:]).all()
    assert guide.compression_report()["trainable"] == 2 * len(guide.book) + 2 * len(guide.book.outliers) - 1
    free, constrained = (sharing(codes=16, rate=rate)[1].compression_report() for rate in (0.0, 10.0))
    assert constrained["label_entropy"] < free["label_entropy"] - 0.2


@pytest.mark.parametrize("prior", ["normal", "hierarchical", "horseshoe", "student", "mixture", "own"])
@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_training_saving_and_loading(tmp_path: Any, sampling: str, prior: str) -> None:
    """Under every kind of prior the loss falls, and a saved posterior predicts bit for bit the same."""
    x, y = data()
    chosen: Any = {
        "normal": priors.Normal(),
        "hierarchical": priors.HierarchicalNormal(),
        "horseshoe": priors.Horseshoe(),
        "student": priors.StudentT(),
        "mixture": PRIORS["mixture"],
        "own": {r".*weight": priors.CodebookPrior(), ".*": priors.Normal()},
    }[prior]
    net = chain(2, 16, 8, 1).float()
    model = WeightSharing(net, Gaussian(), N, prior=chosen)
    guide = CodebookGuide(model, 12, sampling=sampling, blend=0.1, outliers=0.05)  # type: ignore[arg-type]
    posterior = fit(model, guide, (x.float(), y.float()), epochs=60, lr=0.02, batch_size=20, progress=False, seed=0)
    assert sum(posterior.losses[-15:]) < sum(posterior.losses[:15])
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net)
    for a, b in ((posterior.sample(3, seed=1), loaded.sample(3, seed=1)), (posterior.draws(2, 4), loaded.draws(2, 4))):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(
        posterior.predict(x.float(), 3, seed=0).per_member, loaded.predict(x.float(), 3, seed=0).per_member
    )
    assert isinstance(loaded.model, WeightSharing) and isinstance(loaded.guide, CodebookGuide)
    for name, mean in loaded.guide.means_of_network().items():
        assert torch.equal(mean, loaded.model.core().parameters_by_name()[name])
    draws = Predictive(model, guide=posterior.guide, num_samples=2)(x.float())["obs"]
    assert draws.shape[0] == 2 and bool(torch.isfinite(draws).all())
    # what was loaded trains on
    more = fit(loaded.model, loaded.guide, (x.float(), y.float()), epochs=1, progress=False)
    assert all(math.isfinite(v) for v in more.losses)


def test_users_own_svi() -> None:
    x, y = data()
    model, guide = sharing(prior=priors.Normal())
    pyro.set_rng_seed(0)
    before = guide.book.loc.detach().clone()
    with pyro.get_param_store().scope():
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        losses = [engine.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) and not torch.equal(before, guide.book.loc)


def test_prefix_and_dense_models() -> None:
    x, y = data()
    model = Dense(chain(2, 8, 1), Gaussian(0.3), N, prefix="one")
    guide = CodebookGuide(model, 5)
    assert [n for n, _ in guide.book.sites] == ["one.0.weight", "one.2.weight"]
    assert all(math.isfinite(v) for v in fit(model, guide, (x, y), epochs=2, progress=False).losses)


NETWORKS: dict[str, Any] = {
    "resnet": lambda: (architectures.resnet18(3), torch.randn(4, 3, 16, 16)),
    "vit": lambda: (torchvision.models.vit_b_16(image_size=32, num_classes=3), torch.randn(4, 3, 32, 32)),
}


def test_a_residual_network_with_batch_normalisation() -> None:
    """One global codebook over all convolutions; statistics move in training and not in prediction."""
    torch.manual_seed(0)
    net, x = NETWORKS["resnet"]()
    y = torch.tensor([0, 1, 2, 0])
    model = WeightSharing(net, Classes(), 4)
    guide = CodebookGuide(model, 32, init_scale=1e-3, iterations=3)
    report = guide.compression_report()
    assert report["weights"] == sum(p.numel() for p in net.parameters() if p.dim() > 1) > 1e7
    assert report["per_trainable"] > 50 and report["of_mean_field"] < 0.2 and report["of_network"] < 0.4
    posterior = fit(model, guide, (x, y), epochs=2, batch_size=4, progress=False, seed=0)
    before = {n: b.clone() for n, b in model.core().net.named_buffers()}
    assert int(before["bn1.num_batches_tracked"]) == 2
    assert bool(torch.isfinite(posterior.predict(x, 2).probs).all())
    assert all(torch.equal(b, before[n]) for n, b in model.core().net.named_buffers())


@pytest.mark.slow
def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    net, x = NETWORKS["vit"]()
    model = WeightSharing(net, Classes(), 4)
    start = time.perf_counter()
    guide = CodebookGuide(model, 64, init_scale=1e-3, iterations=3)
    assert time.perf_counter() - start < 600
    names = [n for n, _ in guide.book.sites]
    assert len(names) == 50 and "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in names
    posterior = fit(model, guide, (x, torch.tensor([0, 1, 2, 0])), epochs=1, batch_size=4, progress=False, seed=0)
    assert bool(torch.isfinite(posterior.predict(x, 1).probs).all())


# ------------------------------------------------------------------------------------------- shared values


def test_weights_that_share_values(tmp_path: Any) -> None:
    """Sites are codes and outliers; the function is that of weights put together by hand; each code has one KL."""
    x, y = data()
    source = sharing()[1].book
    net = chain(2, 16, 8, 1)
    model = WeightSharing(net, Gaussian(0.3), N, prior=priors.Normal(0.0, 0.7), shared=source)
    assert [s.name for s in model.sites()] == ["codes", "outliers", "0.bias", "2.bias", "4.bias"]
    guide = model.shared_guide()
    draw = poutine.trace(guide).get_trace(x, y).nodes
    z, o = draw["codes"]["value"].flatten(), draw["outliers"]["value"].flatten()
    weights = []
    out, mid = source.outliers.tolist(), source.between.tolist()
    for i, code in enumerate(source.codes().tolist()):
        if i in out:
            weights.append(o[out.index(i)])
        elif i in mid:
            j = mid.index(i)
            (a, b), t = source.pair[j].tolist(), source.alpha[j]
            weights.append(t * z[a] + (1 - t) * z[b])
        else:
            weights.append(z[code])
    flat, state, start = torch.stack(weights), {}, 0
    for name, shape in source.sites:
        state[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    state |= {n: draw[n]["value"].reshape(-1) for n in ("0.bias", "2.bias", "4.bias")}
    f = model.function(x, {n: draw[n]["value"] for n in (s.name for s in model.sites())}, N)
    torch.testing.assert_close(f[0], torch.func.functional_call(net, state, (x,)), rtol=1e-10, atol=1e-12)
    q = draw["codes"]["fn"]
    torch.testing.assert_close(q.variance.flatten(), source.spread[:, 0, 0], rtol=1e-6, atol=1e-14)
    torch.manual_seed(0)
    loss = MixtureELBO().differentiable_loss(model.eval(), guide, x, y)
    torch.manual_seed(0)
    draw = poutine.trace(guide).get_trace(x, y).nodes
    f = model.function(x, {n: draw[n]["value"] for n in (s.name for s in model.sites())}, N)
    kl = 0.0
    for site in model.sites():
        normal = draw[site.name]["fn"]
        p = Normal(torch.zeros_like(normal.mean), 0.7)
        kl = kl + kl_divergence(Normal(normal.mean, normal.variance.sqrt()), p).sum()
    torch.testing.assert_close(loss, kl - Normal(f[0, :, 0], 0.3).log_prob(y).sum())
    posterior = fit(model, guide, (x, y), epochs=30, lr=0.01, progress=False, seed=0)
    assert sum(posterior.losses[-5:]) < sum(posterior.losses[:5])
    posterior.save(tmp_path / "p")
    names = [n for n in load_file(tmp_path / "p" / "tensors.safetensors") if n.startswith("network.")]
    assert names == ["network.0.bias", "network.2.bias", "network.4.bias"]
    loaded = pb.load(tmp_path / "p", net)
    assert torch.equal(posterior.predict(x, 3, seed=0).per_member, loaded.predict(x, 3, seed=0).per_member)
    with pytest.raises(ValueError, match="its guide is model.shared_guide"):
        CodebookGuide(model, 3)
    with pytest.raises(ValueError, match="is a property of the model"):
        CodebookGuide(WeightSharing(net, Gaussian(0.3), N), 3, sampling="shared")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shared_guide\(\) is for a model with shared weights"):
        WeightSharing(net, Gaussian(0.3), N).shared_guide()
    with pytest.raises(ValueError, match="the codebook is for another network"):
        WeightSharing(chain(2, 5, 1), Gaussian(0.3), N, shared=source)


# ---------------------------------------------------------------------------------------- merging in training


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_merged_codes_take_labels_and_pairs_along(sampling: str) -> None:
    """Every weight has the code that its code went into, at the moments of the two; compacting changes no weight."""
    _, guide = sharing(sampling, codes=20)
    book = guide.book
    before, codes, pair = book.mixture(), book.codes().clone(), book.pair.clone()
    into = book.merge(tightness=4.0)
    alive = book.usage(soft=True)[0] > 0
    assert 1 < int(alive.sum()) < 18
    special = torch.zeros(len(codes), dtype=torch.bool)
    special[book.outliers] = special[book.between] = True
    assert torch.equal(book.codes()[~special].long(), into[codes[~special].long()])
    assert torch.equal(book.pair.long(), into[pair.long()])
    for k in alive.nonzero().flatten().tolist():
        parts = (into == k) & (before.weights > 0)
        share = before.weights[parts] / before.weights[parts].sum()
        torch.testing.assert_close(
            book.means()[k].detach(), (share * before.means[parts, 0]).sum(), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            book.scales()[k].detach(), (share * before.means[parts, 1]).sum(), rtol=1e-9, atol=1e-12
        )
    one = {n: (d.mean, d.variance) for n, d in distributions(guide).items()}
    smaller = book.compact()
    closed = (book.pair[:, 0] == book.pair[:, 1]).sum()
    assert closed > 0 and len(smaller.between) == len(book.between) - int(closed)
    assert len(smaller) == int(alive.sum())
    soft = sampling == "mixture"
    lengths = []
    for own in (book, smaller):
        pi = own.log_shares(soft)
        lengths.append(sum(float(code_length(table, pi, 1.0).detach()) for table in own.tables(soft)))
    # a dead code counts as a thousandth of a weight in pi
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    for (name, shape), table in zip(smaller.sites, smaller.tables(sampling == "mixture"), strict=True):
        d = SharedNormal(table, shape)
        assert torch.equal(d.mean, one[name][0]) and torch.equal(d.variance, one[name][1])


def test_merging_again_without_training_changes_nothing() -> None:
    """The units of merging are those of the first codes: fewer codes are farther apart, and do not merge for that."""
    _, guide = sharing(codes=30)
    book = guide.book
    units = book.units.clone()
    first = book.merge(tightness=4.0)
    same = torch.arange(len(book))
    assert 5 < int((book.usage()[0] > 0).sum()) < len(book) - 3 and not torch.equal(first, same)
    assert torch.equal(book.merge(tightness=4.0), same)
    smaller = book.compact()
    assert torch.equal(smaller.units, units) and torch.equal(coding_round(smaller).units, units)
    assert torch.equal(smaller.merge(tightness=4.0), torch.arange(len(smaller)))


def coding_round(book: Codebook) -> Codebook:
    return coding.decode(coding.describe(book), coding.encode(book))


def test_outliers_return_to_a_code_that_costs_them_little() -> None:
    """By the divergence from the code to the outlier: a code's wide ellipse in the plane is no reason."""
    _, guide = sharing(outliers=0.1)
    book = guide.book
    assert len(book.outliers) >= 4
    with torch.no_grad():
        book.spread[3] *= 1e8
        book.outlier_loc[0], book.outlier_rho[0] = book.loc[3], book.rho[3]
        s = book.scales()[3]
        book.outlier_rho[1:4] = book.rho[3]
        book.outlier_loc[1] = 50.0
        others = book.loc.sort().values
        assert float(others.diff().min()) >= 0
        book.loc[3] = 100.0  # no other code is near
        book.outlier_loc[0], book.outlier_loc[2], book.outlier_loc[3] = 100.0, 100.0 + 0.9 * s, 100.0 + 1.1 * s
    absorb_outliers(book)
    new = book.labels[book.outliers]
    assert int(new[0]) == int(new[2]) == 3 and int(new[1]) >= len(book) and int(new[3]) >= len(book)
    assert len(book.compact().outliers) <= len(book.outliers) - 2


def test_draws_of_merged_pairs_are_the_same_after_loading(tmp_path: Any) -> None:
    """sampling="mixture": the choice between two codes that are one by now takes no random numbers."""
    x = data()[0].float()
    model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
    guide = CodebookGuide(model, 24, sampling="mixture", blend=0.3)
    fresh = copy.deepcopy(guide.book)
    guide.book.merge(tightness=3.0)
    pair = guide.book.pair
    closed = (pair[:, 0] == pair[:, 1]).double().mean()
    assert 0 < float(closed) < 1
    copied = CodebookGuide(model, fresh, sampling="mixture")
    copied.load_state_dict(guide.state_dict())
    posterior = pb.Posterior(model, guide)
    posterior.save(tmp_path / "p")
    expected = posterior.predict(x, 5, seed=0).per_member
    assert torch.equal(pb.load(tmp_path / "p", chain(2, 16, 8, 1).float()).predict(x, 5, seed=0).per_member, expected)
    assert torch.equal(pb.Posterior(model, copied).predict(x, 5, seed=0).per_member, expected)


def test_absorbing_outliers_after_a_merger() -> None:
    """Dead codes take none, labels are those of all K codes, and what has returned once does not move again."""
    _, guide = sharing(codes=30, outliers=0.1)
    book = guide.book
    into = book.merge(tightness=4.0)
    dead = (into != torch.arange(len(into))).nonzero().flatten()
    k = int((into == torch.arange(len(into))).nonzero()[-1])
    assert len(dead) > 2 and int(dead[0]) < k  # so that places among living codes are not labels
    with torch.no_grad():
        book.loc[k], book.outlier_loc[:] = 90.0, 200.0
        book.outlier_loc[0], book.outlier_loc[1] = 90.0, float(book.loc[dead[0]])
        book.loc[dead[0]] = book.outlier_loc[1] = 70.0
        book.outlier_rho[1] = book.rho[dead[0]]
        s = book.scales()[k]
        # KL(code || outlier) of an outlier that is broader: log 2 + 1/8 - 1/2 = .32; the other way round it is .81
        book.outlier_rho[0] = inverse_scale(2 * s)
        book.outlier_loc[2], book.outlier_rho[2] = 90.0, inverse_scale(s / 2)  # and here .81
    assert absorb_outliers(book) == 1
    new = book.labels[book.outliers]
    assert int(new[0]) == k and (new[1:] >= len(book)).all()
    with torch.no_grad():
        book.loc[0] = 90.0
        book.rho[0] = book.outlier_rho[0]
    assert absorb_outliers(book) == 0 and int(book.labels[book.outliers[0]]) == k


def test_the_units_are_those_of_codes_that_have_weights() -> None:
    sites = [("w", (4000,))]
    g = torch.Generator().manual_seed(0)
    loc, scale = torch.randn(4000, generator=g), torch.full((4000,), 0.1)
    book = Codebook.fit(sites, loc, scale, 64, rate=4.0, distance="divergence", between=0.0, outliers=0.0, smallest=0)
    assert len(book) < 64
    apart = torch.cdist(*(torch.stack([book.means(), book.scales()], 1).detach().double(),) * 2).square()
    least = apart.fill_diagonal_(math.inf).amin(1)
    # the Wasserstein distance of codes is at least that of their centres
    assert float(book.units[0]) >= float(least.median()) * (1 - 1e-6)
    assert float(book.units[1]) == pytest.approx(float(book.spread.diagonal(dim1=1, dim2=2).sum(1).median()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["wasserstein", "divergence"])
def test_codes_of_half_precision_weights(dtype: torch.dtype, distance: Any) -> None:
    """As many codes, and as close, as for the same weights in float32; and counts that do not overflow."""
    g = torch.Generator().manual_seed(0)
    loc = (0.04 * torch.randn(150_000, generator=g)).to(dtype)
    scale = torch.full((150_000,), 1e-3)
    errors = []
    for d in (torch.float32, dtype):
        book = Codebook.fit(
            *([("w", (150_000,))], loc.to(d), scale.to(d), 16),
            **{"distance": distance, "between": 0.0, "outliers": 0.0, "iterations": 5},
        )
        errors.append(float((book.means()[book.codes().long()].float() - loc.float()).square().mean().sqrt()))
        held, _ = book.usage()
        assert int(held.sum()) == 150_000 and bool(torch.isfinite(book.log_shares()).all())
    assert errors[1] < 1.1 * errors[0] < 0.01


def test_places_of_outliers_follow_a_state_that_is_loaded() -> None:
    """Two codebooks of the same shapes, whose outliers and pairs lie in different sites."""
    books = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = WeightSharing(chain(2, 16, 8, 1), Gaussian(0.3), N)
        with torch.no_grad():
            model.core().parameters_by_name()["0.weight" if seed else "2.weight"][:] *= 10
        books.append(CodebookGuide(model, 6, blend=0.1, outliers=0.06, smallest=0).book)
    one, two = books
    assert {n: v.shape for n, v in one.state_dict().items()} == {n: v.shape for n, v in two.state_dict().items()}
    assert one._outlier_starts != two._outlier_starts
    two.load_state_dict(one.state_dict())
    for a, b in zip(one.tables(), two.tables(), strict=True):
        assert torch.equal(a.loc[a.labels.long()], b.loc[b.labels.long()])


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_state_of_the_optimiser_follows_a_merger(optim: str) -> None:
    """Momentum is that of codes that were one from the start; root mean squares add up, and others stay as they are."""
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    merged = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    kinds: Any = {
        "sgd": lambda q: torch.optim.SGD([q], lr=0.1, momentum=0.9),
        "adamw": lambda q: torch.optim.AdamW([q]),
    }
    ours, theirs = kinds[optim](p), kinds[optim](merged)
    into = torch.tensor([0, 1, 2, 1, 4])
    torch.manual_seed(0)
    for _ in range(4):
        p.grad = torch.randn(5, dtype=torch.float64)
        sums = torch.zeros(5, dtype=torch.float64).index_add_(0, into, p.grad)
        merged.grad = sums[[0, 1, 2, 4]]
        ours.step()
        theirs.step()
    old = {n: v.clone() for n, v in ours.state[p].items()}
    follow(ours, p, into)
    key = "momentum_buffer" if optim == "sgd" else "exp_avg"
    state = ours.state[p]
    torch.testing.assert_close(state[key][[0, 1, 2, 4]], theirs.state[merged][key])
    assert float(state[key][3]) == 0.0
    if optim == "adamw":
        square = (old["exp_avg_sq"][1].sqrt() + old["exp_avg_sq"][3].sqrt()) ** 2
        torch.testing.assert_close(state["exp_avg_sq"][1], square)
        assert torch.equal(state["exp_avg_sq"][[0, 2, 4]], old["exp_avg_sq"][[0, 2, 4]])
        assert float(square) >= float(theirs.state[merged]["exp_avg_sq"][1])
        assert float(state["step"]) == 4


def test_merging_on_a_schedule(tmp_path: Any) -> None:
    """Codes merge at the epochs asked for; training goes on, resumes from a checkpoint, and fewer codes are stored."""
    x, y = (v.float() for v in data())

    def train(epochs: int, checkpoint: Any = None) -> tuple[Any, MergeCodes]:
        model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
        guide = CodebookGuide(model, 24, blend=0.05, outliers=0.05)
        merge = MergeCodes(start=2, stop=6, every=2, tightness=2.0)
        posterior = fit(
            *(model, guide, (x, y)),
            **{
                "epochs": epochs,
                "callbacks": [merge],
                "checkpoint": checkpoint,
                "seed": 0,
                "progress": False,
                "lr": 0.01,
            },
        )
        return posterior, merge

    posterior, merge = train(9)
    assert [epoch for epoch, _, _ in merge.history] == [2, 4, 6]
    left = merge.history[-1][1]
    report = posterior.guide.compression_report()
    assert report["codes"] == left < len(posterior.guide.book)
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", chain(2, 16, 8, 1).float())
    assert len(loaded.guide.book) == left  # type: ignore[attr-defined]
    assert torch.equal(posterior.predict(x, 2, seed=0).per_member, loaded.predict(x, 2, seed=0).per_member)
    train(5, tmp_path / "run")
    resumed, later = train(9, tmp_path / "run")
    assert later.history == merge.history[2:] and resumed.losses == posterior.losses
    with pytest.raises(ValueError, match="start=3, stop=2, every=1"):
        MergeCodes(start=3, stop=2)
    dense = Dense(chain(2, 1).float(), Gaussian(0.3), N)
    with pytest.raises(TypeError, match="MergeCodes is for a CodebookGuide, the guide is a MeanFieldGuide"):
        fit(dense, MeanFieldGuide(dense), (x, y), epochs=1, callbacks=[MergeCodes()], progress=False)


def test_a_gradient_keeps_codes_apart() -> None:
    x, y = (v.float() for v in data())
    counts = []
    for limit in (math.inf, 1e-9):
        model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
        guide = CodebookGuide(model, 24)
        fit(
            *(model, guide, (x, y)),
            **{
                "epochs": 1,
                "callbacks": [MergeCodes(tightness=4.0, gradient_limit=limit)],
                "progress": False,
                "seed": 0,
            },
        )
        counts.append(guide.compression_report()["codes"])
    assert counts[0] < counts[1] == len(guide.book)
    guide.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="gradient_limit needs the gradient of the last step, which is gone"):
        MergeCodes(gradient_limit=1.0)(SimpleNamespace(guide=guide, epoch=1, model=model, optimizer=None))


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input() -> None:
    model = WeightSharing(chain(2, 4, 1), Gaussian(0.3), N)
    for codes, message in ((13, "codes=13, but there are only 12 weights"), (0, "codes=0: expected the number")):
        with pytest.raises(ValueError, match=message):
            CodebookGuide(model, codes, blend=0.0, outliers=0.0)
    with pytest.raises(ValueError, match="sampling='paper': expected one of 'codebook', 'mixture'"):
        CodebookGuide(model, 3, sampling="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_scale=0"):
        CodebookGuide(model, 3, init_scale=0)
    with pytest.raises(ValueError, match="outliers=1.5: expected a share"):
        CodebookGuide(model, 3, outliers=1.5)
    with pytest.raises(TypeError, match=r"takes a pyro_bnn.models.WeightSharing, got Rank1"):
        CodebookGuide(pb.models.Rank1(chain(2, 1), Gaussian(0.3), N), 3)  # type: ignore[arg-type]
    field = MeanFieldGuide(model, 2)
    with pytest.raises(ValueError, match="mixture of 2 components"):
        CodebookGuide.from_mean_field(model, field, 3)
    other = WeightSharing(chain(2, 5, 1), Gaussian(0.3), N)
    with pytest.raises(ValueError, match="the guide is for another model: it has no site '0.weight'"):
        CodebookGuide.from_mean_field(other, MeanFieldGuide(model), 3)
    with pytest.raises(ValueError, match=r"for another network: '0.weight' has shape \(4, 2\) there and \(5, 2\)"):
        CodebookGuide(other, CodebookGuide(model, 3).book)
    net = chain(2, 4, 1)
    with torch.no_grad():
        net[2].weight[0, 1] = math.nan
    with pytest.raises(ValueError, match="'2.weight' holds 1 NaN or infinite values"):
        CodebookGuide(WeightSharing(net, Gaussian(0.3), N), 3)
    with pytest.raises(RuntimeError, match="make a CodebookGuide for this model first"):
        WeightSharing(net, Gaussian(0.3), N, prior=priors.CodebookPrior())(data()[0])
    with pytest.raises(ValueError, match="the prior of '0.bias' is a CodebookPrior"):
        CodebookGuide(WeightSharing(chain(2, 4, 1), Gaussian(0.3), N, prior=priors.CodebookPrior()), 3)
    own = {r".*weight": priors.CodebookPrior(), ".*": priors.Normal()}
    model, first = sharing(prior=own)
    CodebookGuide(model, 5)
    with pytest.raises(ValueError, match="is the codebook of another guide"):
        fit(model, first, data(), epochs=1, progress=False)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_weights_and_one_code(value: float) -> None:
    """All weights alike take one code, and no more; and one code does for any network."""
    net = chain(2, 4, 1)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    model = WeightSharing(net, Gaussian(0.3), N)
    with pytest.raises(ValueError, match="codes=2, but only 1 distinct"):
        CodebookGuide(model, 2)
    for own in (model, WeightSharing(chain(2, 4, 1), Gaussian(0.3), N)):
        guide = CodebookGuide(own, 1, outliers=0.0)
        assert len(guide.book) == 1 and guide.compression_report()["label_bits"] == 0
        losses = fit(own, guide, data(), epochs=2, progress=False).losses
        assert all(math.isfinite(v) for v in losses)


def test_damaged_files(tmp_path: Any) -> None:
    net = chain(2, 16, 1).float()
    model = WeightSharing(net, Gaussian(0.3), N)
    guide = CodebookGuide(model, 6, blend=0.1, outliers=0.1, smallest=0)
    assert len(guide.book) == 6
    path = tmp_path / "p"
    pb.Posterior(model, guide).save(path)
    file = path / "tensors.safetensors"
    whole, text = file.read_bytes(), (path / "posterior.json").read_text()

    def damaged(change: Any) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def require(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pb.load(path, net)
        file.write_bytes(whole)
        (path / "posterior.json").write_text(text)

    file.write_bytes(whole[:-7])
    require("truncated or damaged")
    damaged(lambda t: t.pop("guide.codebook.labels"))
    require("labels is missing")
    damaged(lambda t: t.update({"guide.codebook.labels": t["guide.codebook.labels"][:-1].clone()}))
    require("48 values of 3 bits take 18 bytes")
    damaged(lambda t: t["guide.codebook.labels"].fill_(255))
    require("labels outside of 0 to 5")
    damaged(lambda t: t["guide.codebook.between"].fill_(255))
    require("damaged")
    damaged(lambda t: t.update({"guide.codebook.rho": t["guide.codebook.rho"][:-1].clone()}))
    require(r"rho has shape \(5,\), expected \(6,\)")
    content = json.loads(text)
    content["guide"]["codebook"]["sites"][0][0] = "9.weight"
    (path / "posterior.json").write_text(json.dumps(content))
    require("'9.weight' is no random parameter of this one")
    with pytest.raises(ValueError, match="is for another network"):
        pb.load(path, chain(2, 17, 1).float())
