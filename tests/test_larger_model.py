"""Networks inside a user's own hierarchical model: the example of the documentation, by SVI and by NUTS."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_bnn as pb


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / "hierarchical.py"
    spec = importlib.util.spec_from_file_location("hierarchical", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_svi_with_two_networks_in_the_users_own_guide_recovers_the_group_effects(example: ModuleType) -> None:
    """Proves that two prefixed networks, group latents and user plates fit together under minibatch SVI.

    A group of about 50 samples fixes its effect to noise / sqrt(50) = 0.04; the bound of 0.2 is five times that.
    """
    data = example.simulate(400)
    pyro.clear_param_store()
    store_before = dict(pyro.get_param_store().items())
    posterior = example.fit(data, epochs=120)
    mean, _ = example.effects(posterior)
    assert (mean - data.effects).abs().max() < 0.2
    noise = posterior.sample(100, seed=0)["noise"].mean()
    assert abs(noise - example.NOISE) < 0.1
    prediction = posterior.predict(data.x, num_samples=20, seed=0, return_site="obs")
    residual = (prediction.mean - data.y).square().mean().sqrt()
    assert residual < 1.3 * example.NOISE
    assert dict(pyro.get_param_store().items()) == store_before


@pytest.mark.slow
def test_nuts_on_the_same_model_recovers_the_group_effects(example: ModuleType) -> None:
    """Proves that the model without any guide is an ordinary Pyro model for MCMC, with both networks' latents.

    A group of about 25 samples fixes its effect to 0.06; the bound of 0.35 allows for the curve that is learnt too.
    """
    data = example.simulate(200)
    pyro.set_rng_seed(0)
    model = example.Hierarchical(200, hidden=3)
    kernel = NUTS(model, max_tree_depth=5, target_accept_prob=0.7)
    mcmc = MCMC(kernel, num_samples=60, warmup_steps=100, disable_progbar=True)
    mcmc.run(data.x, data.y)
    samples = mcmc.get_samples()
    assert {"curve.0.weight.s", "slope.0.weight.s", "effect", "noise"} <= samples.keys()
    effect = samples["effect"].reshape(60, -1)
    effect = effect - effect.mean(-1, keepdim=True)
    assert (effect.mean(0) - data.effects).abs().max() < 0.35
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    assert posterior.predict(data.x, num_samples=10, return_site="obs").per_member.shape[:2] == torch.Size([10, 1])
