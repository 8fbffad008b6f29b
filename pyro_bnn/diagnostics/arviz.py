"""A posterior as an ArviZ object: ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import arviz
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_bnn.diagnostics.stream import log_density, predictions, predictions_of_inputs
from pyro_bnn.inclusion import has_inclusion
from pyro_bnn.network import batch_size as count_rows

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction

#: what to_arviz makes unless told otherwise
GROUPS = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "observed_data", "constant_data")
#: draws of each member, from a posterior that can make any number
DRAWS = 100

Group = dict[str, xr.DataArray]


def to_arviz(
    posterior: Posterior,
    x: Any = None,
    y: Tensor | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    groups: str | Sequence[str] = GROUPS,
    num_samples: int | None = None,
    batch_size: int | None = None,
    max_values: int = 10_000_000,
    seed: int = 0,
) -> Any:
    """The posterior, its predictions for x and how likely they make y, for ArviZ.

    ``chain`` has the chains of a sampler when all its draws are taken, and length 1 otherwise. With S draws from each
    of K members (the components of a mixture, or particles), N rows of x and C classes:

    ========================  =======================================================================================
    ``posterior``             the latent sites, ``(chain, draw[, member], ...)``; the dimension ``member`` where K > 1
    ``inclusion``             the posterior inclusion probability of every group of a spike-and-slab prior, by
                              parameter ``(<parameter>_dim_0, ...)``; comes with ``posterior``
    ``posterior_predictive``  ``obs``, draws of y, ``(chain, draw, obs_id[, output])``
    ``function``              what y is drawn from: ``probs`` ``(chain, draw, obs_id, class)`` of a classification,
                              ``mean`` of a regression or count; comes with ``posterior_predictive``
    ``log_likelihood``        ``obs``, log p(y_n | draw), ``(chain, draw, obs_id)``, in nats
    ``sample_stats``          ``log_p`` and ``log_q`` of each draw ``(chain, draw[, member])``, in nats, of a
                              posterior that knows them
    ``training``              ``loss`` ``(step)``, the negative ELBO in nats per datum; comes with ``sample_stats``
    ``observed_data``         ``obs``, which is y
    ``constant_data``         ``x``, or ``x_<key>`` for each tensor in it
    ========================  =======================================================================================

    Where rows of x are involved, the S K functions are one long ``draw`` with the member of each as a coordinate: all
    are draws from the posterior, and ``arviz.loo`` would take a dimension of members for more observations.

    Networks have millions of weights, so sites come in short form: hyper-parameters (``..._tau``, ``..._inclusion``,
    ``noise``, and any other site of one element) whole, every other site as ``<site>_mean`` and ``<site>_sd`` over its
    elements.

    :param x: inputs of the network, any nesting of dicts and tuples of tensors. Not needed for the groups
        ``posterior`` and ``sample_stats``.
    :param y: the targets of x, ``[N, ...]``. Needed for ``log_likelihood`` and ``observed_data``.
    :param sites: names of sites to store whole, or regular expressions that match whole names.
    :param groups: which groups to make; ``function`` and ``training`` come with others, as said above.
    :param num_samples: draws from every member, S; by default all draws that the posterior stores (as after MCMC), and
        100 of a posterior that draws anew. PSIS-LOO needs S K of this order.
    :param batch_size: the most rows of x in one forward pass.
    :param max_values: most numbers to store, over all groups. ``function``, ``inclusion`` and ``constant_data`` are
        left out, with a warning, when they do not fit; anything else that does not fit is an error.
    :param seed: of the draws, here and in the predictions.
    :returns: ``arviz.InferenceData``, or with ArviZ 1.x ``xarray.DataTree``; ``.to_netcdf(path)`` writes either.
    :raises TypeError: when x holds no tensor.
    :raises ValueError: when a group or site is unknown, x or y is missing for a group, they differ in length, a
        prediction or log-likelihood is NaN, or the result has more than ``max_values`` numbers.

    Source: the InferenceData schema of ArviZ, https://python.arviz.org.
    """
    wanted = _checked_groups(groups, x, y)
    if num_samples is None:
        num_samples = posterior.stored or DRAWS
    chains = posterior.chains if num_samples == posterior.stored else 1
    budget = _Budget(max_values)
    tree: dict[str, Group] = {}
    if "posterior" in wanted:
        tree["posterior"] = _posterior(posterior.draws(num_samples, seed=seed, example=x), sites, chains, budget)
        tree["inclusion"] = _inclusion(posterior, num_samples, seed, budget)
    if "sample_stats" in wanted:
        tree["sample_stats"] = _sample_stats(posterior, num_samples, seed, chains, budget)
        tree["training"] = _training(posterior.losses, budget)
    if "observed_data" in wanted and y is not None:
        budget.take("observed_data/obs", y.numel())
        tree["observed_data"] = {"obs": _array(_plain(y, 1), "obs_id", *_outputs(_plain(y, 1).dim() - 1))}
    settings = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    tree |= _predictive(posterior, x, y, wanted, settings, chains, budget)
    if "constant_data" in wanted:
        tree["constant_data"] = _constant_data(x, budget)

    attrs = {"inference_library": "pyro_bnn", "members": posterior.members, "seed": seed}
    if budget.left_out:
        names = ", ".join(f"{name} ({size:,})" for name, size in budget.left_out.items())
        warnings.warn(
            f"left out, to stay within max_values={max_values:,} numbers: {names}. Raise max_values, or give fewer "
            "rows of x or a smaller num_samples, to have them.",
            stacklevel=2,
        )
        attrs["left_out"] = ", ".join(budget.left_out)
    return _container(
        {name: xr.Dataset(tree[name]) for name in (*GROUPS, "inclusion", "function", "training") if tree.get(name)},
        attrs,
    )


class _Budget:
    """How many numbers may still be stored."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken: dict[str, int] = {}
        self.left_out: dict[str, int] = {}

    def take(self, name: str, size: int) -> None:
        """Books what must be stored.

        :raises ValueError: when it does not fit.
        """
        self.taken[name] = size
        if (total := sum(self.taken.values())) > self.limit:
            largest = sorted(self.taken.items(), key=lambda item: -item[1])[:3]
            raise ValueError(
                f"the result would hold more than max_values={self.limit:,} numbers (at least {total:,}; the largest: "
                f"{', '.join(f'{key} with {value:,}' for key, value in largest)}). Give fewer rows of x, a smaller "
                "num_samples, fewer groups= or sites=, or raise max_values"
            )

    def offer(self, name: str, size: int) -> bool:
        """Books what may be left out, and says whether it fits."""
        if sum(self.taken.values()) + size > self.limit:
            self.left_out[name] = size
            return False
        self.taken[name] = size
        return True


def _checked_groups(groups: str | Sequence[str], x: Any, y: Tensor | None) -> tuple[str, ...]:
    wanted = (groups,) if isinstance(groups, str) else tuple(groups)
    if unknown := [group for group in wanted if group not in GROUPS]:
        raise ValueError(f"unknown group {unknown[0]!r}; groups= takes any of {', '.join(GROUPS)}")
    for missing, argument, needed_by in (
        (x is None, "x", ("posterior_predictive", "log_likelihood", "constant_data")),
        (y is None, "y", ("log_likelihood", "observed_data")),
    ):
        if missing and (needy := [group for group in wanted if group in needed_by]):
            raise ValueError(
                f"{argument} is missing, which {' and '.join(needy)} cannot do without: give {argument}, or choose "
                "other groups="
            )
    return wanted


def _posterior(draws: dict[str, Tensor], sites: str | Sequence[str] | None, chains: int, budget: _Budget) -> Group:
    whole = _chosen_sites(sites, draws)
    group: Group = {}
    for site, values in draws.items():
        name, elements = _safe(site), values[0, 0].numel()
        if site in whole or elements == 1 or site.endswith(("_tau", "_inclusion", "noise")):
            budget.take(f"posterior/{name}", values.numel())
            group[name] = _sampled(values, chains, *(f"{name}_dim_{axis}" for axis in range(values.dim() - 2)))
        elif elements:
            sd, mean = torch.std_mean(_at_least_float32(values.flatten(2)), -1, correction=0)
            for suffix, summary in (("mean", mean), ("sd", sd)):
                budget.take(f"posterior/{name}_{suffix}", summary.numel())
                group[f"{name}_{suffix}"] = _sampled(summary, chains)
    return group


def _chosen_sites(sites: str | Sequence[str] | None, available: Collection[str]) -> set[str]:
    chosen: set[str] = set()
    for site in (sites,) if isinstance(sites, str) else sites or ():
        # A name is a pattern too, whose dots match anything: an exact match means that site alone.
        matches = {site} if site in available else {name for name in available if _matches(site, name)}
        if not matches:
            raise ValueError(
                f"sites: {site!r} is neither the name of a latent site nor a regular expression that matches one; "
                f"there are {', '.join(available) or 'none'}"
            )
        chosen |= matches
    return chosen


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False


def _inclusion(posterior: Posterior, num_samples: int, seed: int, budget: _Budget) -> Group:
    if not has_inclusion(posterior.model):
        return {}
    group: Group = {}
    for parameter, values in posterior.inclusion_probabilities(num_samples, seed).items():
        name = _safe(parameter)
        if budget.offer(f"inclusion/{name}", values.numel()):
            group[name] = _array(values, *(f"{name}_dim_{axis}" for axis in range(values.dim())))
    return group


def _sample_stats(posterior: Posterior, num_samples: int, seed: int, chains: int, budget: _Budget) -> Group:
    densities = getattr(posterior, "log_p_log_q", None)
    if densities is None:
        return {}
    group: Group = {}
    for name, values in zip(("log_p", "log_q"), densities(num_samples, seed=seed), strict=True):
        budget.take(f"sample_stats/{name}", values.numel())
        group[name] = _sampled(values, chains)
    return group


def _training(losses: Sequence[float], budget: _Budget) -> Group:
    if not losses:
        return {}
    budget.take("training/loss", len(losses))
    return {"loss": _array(torch.tensor(losses, dtype=torch.float64), "step")}


def _predictive(
    posterior: Posterior,
    x: Any,
    y: Tensor | None,
    wanted: Sequence[str],
    settings: dict[str, Any],
    chains: int,
    budget: _Budget,
) -> dict[str, Group]:
    """The groups ``posterior_predictive``, ``function`` and ``log_likelihood``, in one pass over x."""
    with_y, with_log_likelihood = "posterior_predictive" in wanted, "log_likelihood" in wanted
    if not (with_y or with_log_likelihood):
        return {}
    likelihood = getattr(posterior.model, "likelihood", None)
    if likelihood is None:
        raise ValueError(
            "posterior_predictive and log_likelihood need a model with a likelihood of pyro_bnn.likelihoods, and this "
            "one has none: choose other groups="
        )
    functions = settings["num_samples"] * posterior.members
    rows = count_rows(x, y)
    if rows == 0:
        raise ValueError("x has no rows: give at least one, or choose groups= that need no x")
    if with_log_likelihood:
        budget.take("log_likelihood/obs", functions * rows)
    if with_y:
        budget.take("posterior_predictive/obs", functions * (rows if y is None else y.numel()))

    stream: Iterable[tuple[Prediction, Any]]
    if y is None:
        stream = ((prediction, None) for prediction in predictions_of_inputs(posterior, x, like=x, **settings))
    else:
        stream = ((prediction, target) for _, prediction, target in predictions(posterior, (x, y), **settings))

    parts: dict[str, list[Tensor]] = {"log_likelihood": [], "obs": [], "function": []}
    function, keep_function = "probs" if likelihood.kind == "classification" else "mean", False
    for index, (prediction, target) in enumerate(stream):
        if with_log_likelihood:
            parts["log_likelihood"].append(log_density(prediction, target).flatten(0, 1).cpu().double())
        if with_y:
            # Noise of its own for every batch, and none that the latent sites have used under the same seed.
            obs = prediction.sample(seed=settings["seed"] + 1 + index)
            if not index:
                budget.take("posterior_predictive/obs", functions * rows * obs[0, 0, 0].numel())
                size = functions * rows * prediction.members[0, 0, 0].numel()
                keep_function = budget.offer(f"function/{function}", size)
            parts["obs"].append(obs.flatten(0, 1).cpu())
            if keep_function:
                parts["function"].append(prediction.members.flatten(0, 1).cpu())

    whole = {name: torch.cat(part, 1) for name, part in parts.items() if part}
    tree: dict[str, Group] = {}
    if with_log_likelihood:
        tree["log_likelihood"] = {"obs": _enumerated(whole["log_likelihood"], posterior.members, chains)}
    if with_y:
        obs = _plain(whole["obs"], 2)
        tree["posterior_predictive"] = {"obs": _enumerated(obs, posterior.members, chains, *_outputs(obs.dim() - 2))}
        if "function" in whole:
            values = _plain(whole["function"], 2)
            classes = ("class",) if values.dim() > obs.dim() else ()
            dims = (*_outputs(values.dim() - 2 - len(classes)), *classes)
            tree["function"] = {function: _enumerated(values, posterior.members, chains, *dims)}
    return tree


def _constant_data(x: Any, budget: _Budget) -> Group:
    rows = count_rows(x)
    group: Group = {}
    for name, values in _named_tensors("x", x):
        if budget.offer(f"constant_data/{name}", values.numel()):
            dims = [f"{name}_dim_{axis}" for axis in range(values.dim())]
            if values.dim() and values.shape[0] == rows:
                dims[0] = "obs_id"
            group[name] = _array(values, *dims)
    return group


def _named_tensors(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, (dict, tuple, list)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from _named_tensors(f"{name}_{_safe(str(key))}", value)


def _safe(name: str) -> str:
    # In netCDF and DataTree a slash stands between a group and what is in it.
    return name.replace("/", ".")


def _plain(values: Tensor, lead: int) -> Tensor:
    """``[N, 1]`` as ``[N]``: one output needs no axis, and predictions and targets then agree."""
    return values.squeeze(-1) if values.shape[lead:] == (1,) else values


def _outputs(axes: int) -> tuple[str, ...]:
    return ("output",) if axes == 1 else tuple(f"output_{axis}" for axis in range(axes))


def _sampled(values: Tensor, chains: int, *event: str) -> xr.DataArray:
    """``[S, K, *event]`` with the members as a dimension, unless there is one alone."""
    dims: tuple[str, ...] = ("chain", "draw", "member", *event)
    values = values.unflatten(0, (chains, -1))
    if values.shape[2] == 1:
        dims, values = ("chain", "draw", *event), values.squeeze(2)
    return _array(values, *dims)


def _enumerated(values: Tensor, members: int, chains: int, *event: str) -> xr.DataArray:
    """``[S K, N, *event]`` with the members one after the other along ``draw``."""
    values = values.unflatten(0, (chains, -1))
    array = _array(values, "chain", "draw", "obs_id", *event)
    return array.assign_coords(member=("draw", np.arange(values.shape[1]) % members))


def _array(values: Tensor, *dims: str) -> xr.DataArray:
    values = values.detach().cpu()
    if values.is_floating_point():
        values = _at_least_float32(values)  # numpy knows no bfloat16
    return xr.DataArray(
        values.numpy(), dims=dims, coords={d: np.arange(n) for d, n in zip(dims, values.shape, strict=True)}
    )


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _container(groups: dict[str, xr.Dataset], attrs: dict[str, Any]) -> Any:
    # ArviZ 1.x still answers to `arviz.InferenceData`, with a warning and another class.
    if arviz.__version__.partition(".")[0] == "0":
        container: Any = arviz.InferenceData
        return container(attrs=attrs, **groups)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups})
