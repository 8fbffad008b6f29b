"""ArviZ groups for a user's own Pyro model, which chooses the names of its sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bnn.diagnostics.arviz.arrays import Budget, Variables, enumerated, outputs, plain
from pyro_bnn.diagnostics.arviz.densities import log_guide
from pyro_bnn.inputs import Inputs, inputs, targets
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.posterior import foreign
from pyro_bnn.program.model import BayesianNetwork

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


def is_of_own_model(posterior: Posterior) -> bool:
    """Whether the model is a user's own, without a likelihood of this package that says what its outputs mean."""
    model = posterior.model
    return not isinstance(model, BayesianNetwork) and not isinstance(getattr(model, "likelihood", None), Likelihood)


def groups_of_own_model(
    posterior: Posterior,
    x: Inputs,
    y: Tensor | None,
    wanted: tuple[str, ...],
    observed_site: str | None,
    settings: dict[str, Any],
    chains: int,
    budget: Budget,
) -> dict[str, Variables]:
    """The groups ``log_likelihood``, ``posterior_predictive`` and ``prior_predictive`` of the site that observes y.

    :raises ValueError: when it is unclear which site observes y, or a density is NaN.
    """
    n, seed, tree = settings["num_samples"], settings["seed"], dict[str, Variables]()
    if "log_likelihood" in wanted and y is not None:
        likelihood = posterior.log_likelihood(x, y, n, seed=seed, observed_site=observed_site).flatten(0, 1)
        if likelihood.isnan().any():
            raise ValueError("the log-density of y under the posterior is NaN: look at the scales of the model")
        budget.take("log_likelihood/obs", likelihood.numel())
        tree["log_likelihood"] = {"obs": enumerated(likelihood.cpu().double(), 1, chains)}
    predictive = [group for group in ("posterior_predictive", "prior_predictive") if group in wanted]
    if predictive:
        site = _site(posterior, x, y, observed_site, seed)
        for group in predictive:
            if group == "posterior_predictive":
                values = posterior.predict(x, n, seed=seed, return_site=site).outputs.flatten(0, 1)
            else:
                values = foreign.predict_from_prior(posterior.model, inputs(x, None), n, seed, site).flatten(0, 1)
            values = plain(values.reshape(n, -1) if values.dim() == 1 else values, 2)
            budget.take(f"{group}/obs", values.numel())
            of_chains = chains if group == "posterior_predictive" else 1
            tree[group] = {"obs": enumerated(values, 1, of_chains, *outputs(values.dim() - 2))}
    return tree


def importance_densities(
    posterior: Posterior, x: Inputs, y: Tensor, n: int, seed: int, observed_site: str | None
) -> tuple[Tensor, Tensor]:
    """``log p(all data, theta)`` and ``log q(theta)`` of the draws of ``posterior.draws(n, seed)``, each ``[n]``."""
    x, y, source = inputs(x, None), targets(y, None), posterior.draw_source
    joint, guide = [], []
    with source.running():
        for draws, traces in source.traces(n, seed, example=x):
            guide.append(log_guide(posterior, draws, traces).flatten())
            for i in range(len(traces)):
                latents = {name: value[i, 0] for name, value in draws.items()}
                joint.append(foreign.densities(posterior.model, latents, x, y, observed_site).joint)
    return torch.stack(joint), torch.cat(guide)


def require_separate_data(posterior: Posterior, x: Inputs, y: Tensor, observed_site: str | None) -> None:
    """Checks that the data of a model can be left out one by one.

    :raises ValueError: when they cannot.
    """
    x, y, source = inputs(x, None), targets(y, None), posterior.draw_source
    with source.running():
        foreign.require_separate_data(source.model, _one_draw(posterior, x, 0), x, y, observed_site)


def _site(posterior: Posterior, x: Inputs, y: Tensor | None, observed_site: str | None, seed: int) -> str:
    if observed_site is not None:
        return observed_site
    if y is None:
        raise ValueError("it is unclear which site of your own model to predict: give y, or observed_site=")
    x, y, source = inputs(x, None), targets(y, None), posterior.draw_source
    with source.running():
        return foreign.name_of_observed(source.model, _one_draw(posterior, x, seed), x, y)


def _one_draw(posterior: Posterior, x: Inputs, seed: int) -> dict[str, Tensor]:
    return {name: value[0, 0] for name, value in posterior.draws(1, seed, example=x).items()}
