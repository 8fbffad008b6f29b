"""Pareto-smoothed importance sampling: how far a variational posterior is from the exact one, and leave-one-out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import arviz
import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyro_bnn.diagnostics.arviz.conversion import to_arviz
from pyro_bnn.diagnostics.arviz.densities import has_density, log_densities
from pyro_bnn.diagnostics.arviz.own_models import importance_densities, is_of_own_model, require_separate_data
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior
from pyro_bnn.diagnostics.scoring.precision import wide
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, labels, tensors
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.posterior.draw_source import TAIL_DRAWS
from pyro_bnn.predicting import log_density, predict_batches, require_posterior, rows_with_labels
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior

#: R-hat of log densities above which chains do not agree
APART = 1.1
#: fewest draws from whose tail a Pareto shape can be estimated
FEWEST = 100


@dataclass(frozen=True)
class ParetoK:
    """How far the guide is from the posterior.

    :param k: shape of the generalised Pareto tail of the importance ratios p / q. Below ``good`` importance sampling
        from the guide is reliable, and the guide is close to the posterior; above 0.7 it is not, and above 1 the
        ratios have no mean.
    :param good: ``min(1 - 1 / log10 S, 0.7)`` for S draws (Vehtari et al. 2024, eq. 13).
    :param ess: effective sample size ``1 / sum_s w_s^2`` of the smoothed weights w, which sum to one: how many draws
        from the posterior these draws are worth.
    :param draws: number S of draws, over all members.
    """

    k: float
    good: float
    ess: float
    draws: int


@one_at_a_time
def pareto_k(
    posterior: Posterior,
    x: Inputs,
    y: object,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> ParetoK:
    r"""Pareto k-hat of a variational posterior: the tail of the ratios ``p(y, theta) / q(theta)`` over draws from q.

    k-hat grows with the number of weights, and a mean field on nearly any network fails the test. A large value means
    that importance weights cannot correct the guide; it says nothing about the predictions. The members of a mixture
    count as one guide with the density ``(1/K) sum_k q_k``.

    :param x: the training inputs, all ``num_data`` of them.
    :param y: their targets.
    :param num_samples: draws of each member; by default 1,000 over all members.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: a :class:`ParetoK`.
    :raises TypeError: when ``posterior`` is not a posterior.
    :raises ValueError: when x and y are not all training data, the posterior has no density (stored draws, particles,
        points) or the model is not one of this package with a likelihood, predictions are scaled by a temperature, or
        there are fewer than 100 draws.

    Source: Yao, Vehtari, Simpson and Gelman (2018), algorithm 1; Vehtari et al. (2024).
    """
    require_posterior(posterior)
    if not isinstance(posterior.model, BayesianNetwork) or not has_density(posterior):
        raise ValueError(
            "k-hat compares the density of a guide with that of the posterior, and this posterior has no such density: "
            "it consists of stored draws, particles or points, or its model is not one of this package. Look at R-hat "
            "and ESS (convergence) or at the diversity of the members"
        )
    if (likelihood := posterior.model.likelihood) is None:
        raise ValueError("k-hat needs the density of the data, and the model has no likelihood: give the model one")
    _require_training_data(posterior, x, y)
    count, seed = _enough_draws(posterior, num_samples), some_seed(seed)
    log_p, log_q = log_densities(posterior, count, seed, example=x)
    assert log_q is not None
    temperature = likelihood.temperature
    for _, prediction, target in predict_batches(
        posterior, (x, y), num_samples=count, batch_size=batch_size, seed=seed
    ):
        log_p += wide(log_density(prediction, target)).sum(-1) / temperature
    log_weights, k = _smooth((log_p - log_q).cpu().reshape(1, -1).numpy())
    draws = log_weights.shape[-1]
    ess = float(np.exp(-_log_sum(2 * log_weights))[0])
    return ParetoK(float(k[0]), _good_k(draws), ess, draws)


@one_at_a_time
def loo(
    posterior: Posterior,
    x: Inputs,
    y: object,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    observed_site: str | None = None,
) -> Any:
    r"""PSIS-LOO: the sum over all data of the log predictive density of each datum if it were left out, in nats.

    For draws from the exact posterior, as after MCMC, this is ``arviz.loo``. Draws from a variational posterior q have
    the weights ``w_is ~ p(y, theta_s) / (q(theta_s) p(y_i | theta_s))``, Pareto-smoothed for each datum i, and

    ``elpd_i = log sum_s w_is p(y_i | theta_s)``.

    Without the factor p / q a guide that is too narrow would look reliable, because its draws agree with one another.

    Rows without any label, by ``Categorical(ignore_index=)``, are no data, and the result does not have them.

    Leaving out a datum does not change parameters that are not random. If they were trained on these data, as the W of
    a rank-1 network, the layers before a last-layer Laplace approximation or all weights under dropout, the result is
    too high. A warning says so: compare such models on held-out data.

    :param x: the training inputs; for a variational posterior all ``num_data`` of them.
    :param y: their targets.
    :param num_samples: draws of each member; by default all stored draws, or 1,000 over all members from a guide.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :param observed_site: for your own Pyro model, the site whose data are left out, one element of its plates at a
        time, while the data of other sites stay; by default the site whose values are y.
    :returns: ArviZ's ``ELPDData`` with ``pareto_k`` of each datum, for ``arviz.compare``. Its ``se`` is
        ``sqrt(N var(elpd_i))``, where the variance divides by N in ArviZ 0.x and by N - 1 in 1.x.
    :raises TypeError: when ``posterior`` is not a posterior.
    :raises ValueError: when a variational posterior is not given all its training data, the draws come neither from a
        sampler nor from a guide with a density (particles, ensembles), the predictions, the likelihood or the sampler
        have a temperature, data of your own model cannot be left out one by one (a subsampled plate, masks, scales,
        one density for several rows), or there are fewer than 100 draws over all members.

    Source: Vehtari, Gelman and Gabry (2017); Magnusson, Andersen, Jonasson and Vehtari (2019), eq. 5.
    """
    require_posterior(posterior)
    _require_untempered(posterior)
    own = is_of_own_model(posterior)
    variational = has_density(posterior, tensors(x) if own else None)
    if own and (variational or posterior.is_sampled):
        require_separate_data(posterior, tensors(x), labels(y), observed_site)
    elif variational:
        _require_training_data(posterior, x, y)
    elif not posterior.is_sampled:
        raise ValueError(
            "these draws come neither from a sampler nor from a guide with a density (they are particles, networks of "
            "an ensemble or stored draws of a guide): they may agree with one another whatever the posterior is, so "
            "leave-one-out would call them reliable. Compare scores on held-out data (evaluate)"
        )
    if fixed := fixed_weights(posterior):
        warnings.warn(
            f"{fixed:,} parameters of the network are not random. If they were trained on these data, they still know "
            "a datum that is left out, and the result is too high. Compare on held-out data (evaluate)",
            stacklevel=2,
        )
    count = _enough_draws(posterior, num_samples)
    seed = some_seed(seed)
    data = _in_arviz(posterior, x, y, count, batch_size, seed, observed_site)
    _leave_out_rows_without_labels(data, posterior, y)
    if not variational:
        _warn_of_chains_apart(data)
        return arviz.loo(_for_arviz(data), pointwise=True)
    if own:
        joint, guide = importance_densities(posterior, tensors(x), labels(y), count, seed, observed_site)
        log_p, log_q = _flat(joint.cpu()), _flat(guide.cpu())
    else:
        stats: Any = data["sample_stats"]
        log_p, log_q = _flat(stats["log_p"]), _flat(stats["log_q"])
    if _old_arviz():
        return _approximate_loo(data, log_p - log_q)
    newer: Any = arviz
    return newer.loo_approximate_posterior(data, log_p[0], log_q[0], pointwise=True)


@one_at_a_time
def compare_loo(posteriors: Mapping[str, Posterior], x: Inputs, y: object, **settings: Any) -> pd.DataFrame:
    """Ranks posteriors of several models of the same data by PSIS-LOO: ``arviz.compare`` of the :func:`loo` of each.

    :param posteriors: at least two posteriors, by name.
    :param x, y: the training data, as for :func:`loo`.
    :param settings: keyword arguments of :func:`loo`; without a ``seed`` all posteriors share a random one.
    :returns: ArviZ's table: elpd, its difference from the best, the standard error of the difference, and stacking
        weights.
    :raises TypeError: when ``posteriors`` is not a mapping from names.
    :raises ValueError: for fewer than two posteriors, and as :func:`loo`.

    Source: Yao, Vehtari, Simpson and Gelman (2018) for the stacking weights.
    """
    if not isinstance(posteriors, Mapping):
        raise TypeError(
            f"compare_loo ranks posteriors by name: give {{name: posterior}}, got {type(posteriors).__name__}"
        )
    if len(posteriors) < 2:
        raise ValueError(f"compare_loo ranks posteriors: give at least two, got {len(posteriors)}")
    settings["seed"] = some_seed(settings.get("seed"))
    return arviz.compare({name: loo(posterior, x, y, **settings) for name, posterior in posteriors.items()})


def fixed_weights(posterior: Posterior) -> int:
    """The number of parameters of the network that are not latent sites, so that all draws share them."""
    model = posterior.model
    if not isinstance(model, BayesianNetwork):
        return 0
    random = {site.name for site in model.sites()} | {model.site(name) for name in model.implied_parameters()}
    return sum(p.numel() for name, p in model.core().net.named_parameters() if model.site(name) not in random)


def _require_training_data(posterior: Posterior, x: Inputs, y: object) -> None:
    if isinstance(posterior, ScaledPosterior):
        raise ValueError(
            "predictions scaled by a temperature do not have the density that was inferred: give the posterior inside "
            "(scaled.posterior)"
        )
    if y is None:
        raise ValueError("y is missing: give x and the targets that the model was trained on")
    rows, expected = count_rows(tensors(x), labels(y)), getattr(posterior.model, "num_data", None)
    if rows != expected:
        raise ValueError(
            f"x and y hold {rows} data, but the model was trained on num_data={expected}: a variational posterior "
            "approximates the posterior given all training data, so give all of them"
        )


def _require_untempered(posterior: Posterior) -> None:
    likelihood = getattr(posterior.model, "likelihood", None)
    tempered = getattr(likelihood, "temperature", 1.0) != 1 or posterior.sampler.get("temperature", 1.0) != 1
    if isinstance(posterior, ScaledPosterior) or tempered:
        raise ValueError(
            "leaving a datum out divides the posterior by the likelihood of that datum, which is a different one when "
            "predictions are scaled, or the likelihood or the sampler has a temperature: give the posterior inside "
            "(scaled.posterior), sample at temperature=1, or compare scores on held-out data (evaluate)"
        )


def _enough_draws(posterior: Posterior, num_samples: int | None) -> int:
    num_samples = posterior.draw_source.count_all(num_samples, math.ceil(TAIL_DRAWS / posterior.num_members))
    if num_samples * posterior.num_members < FEWEST:
        raise ValueError(
            f"{num_samples} draws of {posterior.num_members} members are {num_samples * posterior.num_members}: "
            f"smoothing takes at least {FEWEST}. Give a larger num_samples; of particles and points there are always "
            "too few, so compare their scores on held-out data (evaluate)"
        )
    return num_samples


def _in_arviz(
    posterior: Posterior,
    x: Inputs,
    y: object,
    num_samples: int,
    batch_size: int | None,
    seed: int,
    observed_site: str | None,
) -> xr.DataTree:
    groups = ("posterior", "log_likelihood", "sample_stats")
    data = to_arviz(
        posterior,
        x,
        y,
        groups=groups,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        observed_site=observed_site,
        max_values=10**9,
    )
    return data if isinstance(data, xr.DataTree) else data.to_datatree()


def _leave_out_rows_without_labels(data: xr.DataTree, posterior: Posterior, y: object) -> None:
    """Rows all of whose labels ``ignore_index`` masks are no data: their ratios are constant, which have no tail."""
    if (rows := rows_with_labels(posterior.model, labels(y))) is not None:
        kept = rows.nonzero().flatten().tolist()
        data["log_likelihood"] = xr.DataTree(data["log_likelihood"].to_dataset().isel(obs_id=kept))


def _warn_of_chains_apart(data: xr.DataTree) -> None:
    """Pareto smoothing looks at the tails of the draws, and cannot tell whether the chains have converged."""
    each: Any = data["log_likelihood"].to_dataset()
    if each.sizes["chain"] > 1 and (rhat := float(arviz.rhat(each)["obs"].max())) > APART:
        warnings.warn(
            f"the chains do not agree on the log-likelihood of the data (R-hat up to {rhat:.2f}): leave-one-out means "
            "nothing for draws that are not from the posterior. Sample longer, and look at convergence()",
            stacklevel=3,
        )


def _for_arviz(data: xr.DataTree) -> Any:
    return arviz.InferenceData.from_datatree(data) if _old_arviz() else data


def _old_arviz() -> bool:
    return bool(arviz.__version__.partition(".")[0] == "0")


def _flat(values: object) -> np.ndarray:
    """Flattens chains, draws and members to ``[1, S]``, in the order of the group ``log_likelihood``."""
    return np.asarray(values).reshape(1, -1)


def _smooth(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights, ``[N, S]``, which sum to one over S, and k-hat, ``[N]``."""
    if _old_arviz():
        log_weights, k = arviz.psislw(log_ratios)
    else:
        from arviz_stats.base import array_stats

        log_weights, k = array_stats.psislw(-log_ratios)  # this version expects the negated log ratios
    log_weights = np.asarray(log_weights)
    return log_weights - _log_sum(log_weights)[:, None], np.asarray(k)


def _log_sum(values: np.ndarray) -> np.ndarray:
    return torch.as_tensor(values).logsumexp(-1).numpy()


def _good_k(draws: int) -> float:
    return min(1 - 1 / math.log10(draws), 0.7)


def _approximate_loo(data: xr.DataTree, log_ratio: np.ndarray) -> Any:
    """The same as ``loo_approximate_posterior`` of ArviZ 1.x, which ArviZ 0.x lacks."""
    from arviz.stats.stats_utils import ELPDData

    likelihood = data["log_likelihood"]["obs"]
    pointwise = likelihood.stack(__sample__=("chain", "draw")).transpose("obs_id", "__sample__")
    log_weights, k = _smooth(log_ratio - pointwise.values)
    elpd = _log_sum(log_weights + pointwise.values)
    n, draws = pointwise.shape
    lppd = _log_sum(pointwise.values) - math.log(draws)
    good = _good_k(draws)
    if unreliable := int((k > good).sum()):
        warnings.warn(
            f"k-hat is above {good:.2f} for {unreliable} of {n} data: their leave-one-out densities cannot be trusted, "
            "because the guide is too far from the posterior or these data have too much influence; compare nll on "
            "held-out data (evaluate)",
            stacklevel=3,
        )
    rows = likelihood.coords["obs_id"]
    each, shapes = (xr.DataArray(values, {"obs_id": rows}, "obs_id") for values in (elpd, k))
    total, se, p = float(elpd.sum()), float(math.sqrt(n * elpd.var())), float((lppd - elpd).sum())
    content = {
        "elpd_loo": total,
        "se": se,
        "p_loo": p,
        "n_samples": draws,
        "n_data_points": n,
        "warning": bool(unreliable),
        "loo_i": each.rename("loo_i"),
        "pareto_k": shapes,
        "scale": "log",
        "good_k": good,
    }
    return ELPDData(data=list(content.values()), index=list(content))
