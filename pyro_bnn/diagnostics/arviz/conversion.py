"""A posterior as an ArviZ object: ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import arviz
import torch
import xarray as xr
from torch import Tensor

from pyro_bnn.diagnostics.arviz.arrays import Budget, Variables, array, enumerated, outputs, plain, safe, sampled
from pyro_bnn.diagnostics.arviz.densities import log_densities
from pyro_bnn.diagnostics.arviz.own_models import groups_of_own_model, is_of_own_model
from pyro_bnn.diagnostics.arviz.sites import posterior_group
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, labels, tensors
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS
from pyro_bnn.predicting import log_density, predict_batches, predict_inputs, require_posterior
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.randomness import some_seed
from pyro_bnn.sparsity.inclusion import has_inclusion

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior
    from pyro_bnn.posterior.prediction import Prediction

#: groups that to_arviz makes by default
GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data")
#: groups that it makes only on request, for a user's own Pyro model
ON_REQUEST = ("prior_predictive",)
#: groups that are added when another group is made
COMPANIONS = ("inclusion", "guide", "function", "training")


@one_at_a_time
def to_arviz(
    posterior: Posterior,
    x: Inputs = None,
    y: object = None,
    *,
    sites: str | Sequence[str] | None = None,
    groups: str | Sequence[str] = GROUPS,
    probes: Inputs = None,
    observed_site: str | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    max_values: int = 10_000_000,
    seed: int | None = None,
) -> Any:
    """Converts a posterior, its predictions for x and the log-likelihood of y to an ArviZ object.

    ``chain`` has one entry for each chain of a sampler when all stored draws are used, and length 1 otherwise. With S
    draws from each of K members (mixture components or particles), N rows of x and C classes, the groups are:

    ========================  =======================================================================================
    ``posterior``             the latent sites, ``(chain, draw[, member], ...)``, with a dimension ``member`` if K > 1;
                              with ``probes`` also the function there, ``(chain, draw[, member], probe[, class])``
    ``inclusion``             the posterior inclusion probability of every group of a spike-and-slab prior, by
                              parameter ``(<parameter>_dim_0, ...)``; comes with ``posterior``
    ``posterior_predictive``  ``obs``, draws of y, ``(chain, draw, obs_id[, output])``; a label that ``ignore_index``
                              masks in y is ``ignore_index`` in all draws
    ``prior_predictive``      ``obs``, draws of y under the prior of your own Pyro model; only if ``groups`` names it
    ``function``              the distribution that y is drawn from: ``probs`` ``(chain, draw, obs_id, class)`` for a
                              classification, ``mean`` for a regression or counts; comes with ``posterior_predictive``
    ``log_likelihood``        ``obs``, log p(y_n | draw), ``(chain, draw, obs_id)``, in nats
    ``sample_stats``          for each draw ``(chain, draw[, member])``, in nats: ``log_prior``; ``lp``, the joint
                              density log p(y, draw), if ``log_likelihood`` is made and x and y have ``num_data`` rows
                              (they are then taken to be the training data); and, if the posterior has a density, as a
                              variational one does, ``log_q``, the density of the whole guide, and ``log_p``, a copy
                              of ``lp`` under the name that ArviZ pairs with ``log_q``
    ``training``              ``loss`` ``(step)``, the negative ELBO in nats per datum; comes with ``sample_stats``
    ``guide``                 what the guide's parameters mean, for guides that define it: the codes of a codebook
                              ``(code)``; comes with ``posterior``
    ``observed_data``         ``obs``, which is y
    ``constant_data``         ``x``, or ``x_<key>`` for each tensor in it
    ========================  =======================================================================================

    In groups with rows of x, the S K functions are flattened into ``draw``, with the member of each as a coordinate:
    all are draws from the posterior, and ``arviz.loo`` would treat a dimension ``member`` as more observations.

    Networks have millions of weights, so most sites are summarised. Hyper-parameters (``..._tau``, ``..._inclusion``,
    ``noise``, and any other site with one element) are stored whole; every other site is stored as the ``_mean`` and
    ``_sd`` over its elements. Quantities that layers share have a dimension ``layer``: ``fc.weight_tau`` becomes
    ``weight_tau`` at the layer ``fc``, and ``fc.weight.s`` becomes ``weight.s_mean`` and ``weight.s_sd`` there. If a
    quantity belongs to other layers than the first quantity does, its dimension is ``<quantity>_layer``.

    :param x: inputs of the network, as ``Posterior.predict`` takes them. Not needed for the groups ``posterior`` and
        ``sample_stats``.
    :param y: the targets of x, ``[N, ...]``. Needed for ``log_likelihood`` and ``observed_data``.
    :param sites: sites to store whole, under their own names: names, or regular expressions that match full names.
    :param groups: which groups to make; some others come with them, as the table says.
    :param probes: a few inputs of the network. Weights have symmetries, but the function at these inputs has none:
        class probabilities, or the mean of y, for R-hat, ESS and trace plots.
    :param observed_site: for your own Pyro model, the site that observes y; by default the one whose values are y.
    :param num_samples: number S of draws from every member; by default all stored draws (as after MCMC), or 100 from
        a guide. Always 1 for particles and point estimates. PSIS-LOO needs S K of about 1,000.
    :param batch_size: the most rows of x in one forward pass.
    :param max_values: the most numbers to store, over all groups. ``function``, ``inclusion`` and ``constant_data`` are
        left out, with a warning, if they do not fit; for anything else this is an error.
    :param seed: of the draws and the predictions; ``None`` takes a new one at each call. The result stores it as its
        attribute ``seed``.
    :returns: ``arviz.InferenceData``, or with ArviZ 1.x ``xarray.DataTree``; ``.to_netcdf(path)`` writes either.
    :raises TypeError: when x or y does not hold numbers, or ``posterior`` is not a posterior.
    :raises ValueError: when a group or site is unknown, x or y is missing for a group, they differ in length, a
        prediction or log-likelihood is NaN, or the result has more than ``max_values`` numbers.

    Source: the InferenceData schema of ArviZ, https://python.arviz.org.
    """
    require_posterior(posterior)
    x, y = None if x is None else tensors(x), None if y is None else labels(y)
    if sites is not None:
        sites = checks.names("sites", sites)
    wanted = _checked_groups(groups, x, y)
    _require_kind(posterior, wanted, observed_site)
    seed = some_seed(seed)
    num_samples = posterior.draw_source.count_all(num_samples, POSTERIOR_DRAWS)
    chains = posterior.num_chains if num_samples == posterior.num_stored else 1
    budget = Budget(max_values)
    tree: dict[str, Variables] = {}
    if "posterior" in wanted:
        tree["posterior"] = posterior_group(posterior, sites, num_samples, seed, x, chains, budget)
        if probes is not None:
            prediction = posterior.predict(probes, num_samples=num_samples, batch_size=batch_size, seed=seed)
            tree["posterior"]["function"] = _at_probes(prediction, chains, budget)
        tree["inclusion"] = _inclusion(posterior, num_samples, seed, budget)
        tree["guide"] = _guide(posterior.guide, budget)
    if "sample_stats" in wanted:
        tree["training"] = _training(posterior.losses, budget)
    if "observed_data" in wanted and y is not None:
        budget.take("observed_data/obs", y.numel())
        tree["observed_data"] = {"obs": array(plain(y, 1), "obs_id", *outputs(plain(y, 1).dim() - 1))}
    settings = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    if is_of_own_model(posterior):
        tree |= groups_of_own_model(posterior, x, y, wanted, observed_site, settings, chains, budget)
    else:
        tree |= _predictive(posterior, x, y, wanted, settings, chains, budget)
    if "sample_stats" in wanted:
        joint = tree.get("log_likelihood") if y is not None and y.shape[0] == _num_data(posterior) else None
        tree["sample_stats"] = _sample_stats(posterior, num_samples, seed, x, chains, joint, budget)
    if "constant_data" in wanted:
        tree["constant_data"] = _constant_data(x, budget)

    attrs = {"inference_library": "pyro_bnn", "members": posterior.num_members, "seed": seed}
    if budget.left_out:
        names = ", ".join(f"{name} ({size:,})" for name, size in budget.left_out.items())
        warnings.warn(
            f"left out, to stay within max_values={max_values:,} numbers: {names}. Raise max_values, or give fewer "
            "rows of x or a smaller num_samples, to include them.",
            stacklevel=2,
        )
        attrs["left_out"] = ", ".join(budget.left_out)
    return _container(
        {name: xr.Dataset(tree[name]) for name in (*GROUPS, *ON_REQUEST, *COMPANIONS) if tree.get(name)},
        attrs,
    )


def _checked_groups(groups: str | Sequence[str], x: Inputs, y: Tensor | None) -> tuple[str, ...]:
    wanted = checks.names("groups", groups)
    if unknown := [group for group in wanted if group not in GROUPS + ON_REQUEST]:
        raise ValueError(f"unknown group {unknown[0]!r}; groups= takes any of {', '.join((*GROUPS, *ON_REQUEST))}")
    for missing, argument, needed_by in (
        (x is None, "x", ("posterior_predictive", "prior_predictive", "log_likelihood", "constant_data")),
        (y is None, "y", ("log_likelihood", "observed_data")),
    ):
        if missing and (needy := [group for group in wanted if group in needed_by]):
            raise ValueError(
                f"{argument} is missing, and {' and '.join(needy)} cannot be made without it: give {argument}, or "
                "choose other groups="
            )
    return wanted


def _require_kind(posterior: Posterior, wanted: Sequence[str], observed_site: str | None) -> None:
    if is_of_own_model(posterior):
        return
    if observed_site is not None:
        raise ValueError("observed_site= is for models of your own: one of this package observes y at its likelihood")
    if asked := [group for group in wanted if group in ON_REQUEST]:
        raise ValueError(
            f"the group {asked[0]} is for models of your own: for a network use diagnostics.prior_predictive(model, x)"
        )


def _at_probes(prediction: Prediction, chains: int, budget: Budget) -> xr.DataArray:
    values = plain(prediction.per_member, 3)
    if values.isnan().any():
        raise ValueError("the posterior predicts NaN at the probes: look for parameters that diverged in training")
    budget.take("posterior/function", values.numel())
    classes = ("class",) if isinstance(prediction.likelihood, Categorical) else ()
    return sampled(values, chains, "probe", *outputs(values.dim() - 3 - len(classes)), *classes)


def _guide(guide: object, budget: Budget) -> Variables:
    if not isinstance(guide, MixtureGuide):
        return {}
    group: Variables = {}
    for name, (dims, values) in guide.summaries().items():
        budget.take(f"guide/{name}", values.numel())
        group[name] = array(values, *dims)
    return group


def _inclusion(posterior: Posterior, num_samples: int, seed: int, budget: Budget) -> Variables:
    if not has_inclusion(posterior.model):
        return {}
    group: Variables = {}
    for parameter, values in posterior.inclusion_probabilities(num_samples, seed).items():
        name = safe(parameter)
        if budget.offer(f"inclusion/{name}", values.numel()):
            group[name] = array(values, *(f"{name}_dim_{axis}" for axis in range(values.dim())))
    return group


def _num_data(posterior: Posterior) -> int | None:
    return getattr(posterior.model, "num_data", None)


def _sample_stats(
    posterior: Posterior, num_samples: int, seed: int, x: Inputs, chains: int, joint: Variables | None, budget: Budget
) -> Variables:
    """:param joint: the group ``log_likelihood`` of all training data, if it is known."""
    model = posterior.model
    if not isinstance(model, BayesianNetwork):
        return {}
    log_prior, log_q = log_densities(posterior, num_samples, seed, example=x)
    stats = {"log_prior": log_prior}
    if joint is not None and model.likelihood is not None and not isinstance(posterior, ScaledPosterior):
        likelihood = torch.as_tensor(joint["obs"].values).sum(-1).reshape(log_prior.shape)
        stats["lp"] = log_prior.cpu() + likelihood / model.likelihood.temperature
    if log_q is not None:
        stats |= {"log_p": stats["lp"], "log_q": log_q} if "lp" in stats else {"log_q": log_q}
    for name, values in stats.items():
        budget.take(f"sample_stats/{name}", values.numel())
    return {name: sampled(values, chains) for name, values in stats.items()}


def _training(losses: Sequence[float], budget: Budget) -> Variables:
    if not losses:
        return {}
    budget.take("training/loss", len(losses))
    return {"loss": array(torch.tensor(losses, dtype=torch.float64), "step")}


def _predictive(
    posterior: Posterior,
    x: Inputs,
    y: Tensor | None,
    wanted: Sequence[str],
    settings: dict[str, Any],
    chains: int,
    budget: Budget,
) -> dict[str, Variables]:
    """The groups ``posterior_predictive``, ``function`` and ``log_likelihood``, in one pass over x."""
    with_y, with_log_likelihood = "posterior_predictive" in wanted, "log_likelihood" in wanted
    if not (with_y or with_log_likelihood):
        return {}
    likelihood = getattr(posterior.model, "likelihood", None)
    if likelihood is None:
        raise ValueError(
            "posterior_predictive and log_likelihood of a model of this package need a likelihood of "
            "pyro_bnn.likelihoods, and this one has none: choose other groups=, such as 'posterior'"
        )
    functions = settings["num_samples"] * posterior.num_members
    rows = count_rows(x, y)
    if rows == 0:
        raise ValueError("x has no rows: give at least one, or choose groups= that need no x")
    if with_log_likelihood:
        budget.take("log_likelihood/obs", functions * rows)
    if with_y:
        budget.take("posterior_predictive/obs", functions * (rows if y is None else y.numel()))

    stream: Iterable[tuple[Prediction, Any]]
    if y is None:
        stream = ((prediction, None) for prediction, _ in predict_inputs(posterior, x, like=x, **settings))
    else:
        stream = ((prediction, target) for _, prediction, target in predict_batches(posterior, (x, y), **settings))

    parts: dict[str, list[Tensor]] = {"log_likelihood": [], "obs": [], "function": []}
    function, keep_function = "probs" if likelihood.kind == "classification" else "mean", False
    for index, (prediction, target) in enumerate(stream):
        if with_log_likelihood:
            parts["log_likelihood"].append(log_density(prediction, target).flatten(0, 1).cpu().double())
        if with_y:
            # Every batch needs its own noise, different from what the latent sites drew with the same seed.
            obs = prediction.sample(seed=settings["seed"] + 1 + index)
            if target is not None and (there := likelihood.labelled(target)) is not None:
                obs = torch.where(there, obs, target)  # what is missing in observed_data is missing here too
            if not index:
                budget.take("posterior_predictive/obs", functions * rows * obs[0, 0, 0].numel())
                size = functions * rows * prediction.per_member[0, 0, 0].numel()
                keep_function = budget.offer(f"function/{function}", size)
            parts["obs"].append(obs.flatten(0, 1).cpu())
            if keep_function:
                parts["function"].append(prediction.per_member.flatten(0, 1).cpu())

    whole = {name: torch.cat(part, 1) for name, part in parts.items() if part}
    tree: dict[str, Variables] = {}
    if with_log_likelihood:
        tree["log_likelihood"] = {"obs": enumerated(whole["log_likelihood"], posterior.num_members, chains)}
    if with_y:
        obs = plain(whole["obs"], 2)
        tree["posterior_predictive"] = {"obs": enumerated(obs, posterior.num_members, chains, *outputs(obs.dim() - 2))}
        if "function" in whole:
            values = plain(whole["function"], 2)
            classes = ("class",) if values.dim() > obs.dim() else ()
            dims = (*outputs(values.dim() - 2 - len(classes)), *classes)
            tree["function"] = {function: enumerated(values, posterior.num_members, chains, *dims)}
    return tree


def _constant_data(x: Inputs, budget: Budget) -> Variables:
    rows = count_rows(x)
    group: Variables = {}
    for name, values in _named_tensors("x", x):
        if budget.offer(f"constant_data/{name}", values.numel()):
            dims = [f"{name}_dim_{axis}" for axis in range(values.dim())]
            if values.dim() and values.shape[0] == rows:
                dims[0] = "obs_id"
            group[name] = array(values, *dims)
    return group


def _named_tensors(name: str, x: Inputs) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, (dict, tuple, list)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from _named_tensors(f"{name}_{safe(str(key))}", value)


def _container(groups: dict[str, xr.Dataset], attrs: dict[str, object]) -> object:
    # ArviZ 1.x still has `arviz.InferenceData`, but as another class and with a warning.
    if arviz.__version__.partition(".")[0] == "0":
        container: Any = arviz.InferenceData
        return container(attrs=attrs, **groups)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})
