"""Whether independent runs agree: R-hat, effective sample size and Monte Carlo error, in function space by default."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import arviz
import numpy as np
import scipy.stats
import xarray as xr
from torch import Tensor

from pyro_bnn.diagnostics.arviz.arrays import at_least_float32, outputs, plain, safe
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS
from pyro_bnn.predicting import require_posterior
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior

#: fewest draws a chain needs for its halves to be compared
FEWEST = 4
#: R-hat up to which chains agree (Vehtari et al. 2021)
RHAT = 1.01


def convergence(
    runs: Posterior | Sequence[Posterior],
    probes: Inputs = None,
    *,
    space: Literal["function", "weights"] = "function",
    num_samples: int | None = None,
    batch_size: int | None = None,
    max_values: int = 50_000_000,
    seed: int | None = None,
) -> xr.Dataset:
    r"""Rank-normalised split R-hat, effective sample sizes and Monte Carlo standard errors.

    Weights can be permuted or change sign without changing the function, so chains that agree on every prediction may
    disagree on the weights. By default the function is therefore compared at a few inputs: the probability of each
    class, or the mean of y.

    =============  ================================================================================================
    ``rhat``       square root of the variance of all draws over the variance within half chains, for ranks and for
                   folded ranks, whichever is larger (Vehtari et al. 2021, eqs. 3-4, 14-15); chains agree below 1.01
    ``ess_bulk``   number of independent draws that would locate the centre as precisely (eqs. 10-13); should be at
                   least 100 for each chain
    ``ess_tail``   the same for the 5 % and 95 % quantiles
    ``mcse_mean``  Monte Carlo standard error of the mean, in the unit of the quantity
    =============  ================================================================================================

    :param runs: one posterior of a sampler with several chains, or posteriors of independent runs, such as fits from
        different seeds. Members of a mixture and particles count as draws of their run.
    :param probes: inputs of the network at which the function is compared.
    :param space: ``"function"``, or ``"weights"`` for every element of every latent site (with a warning).
    :param num_samples: draws of each member of each run; by default all stored draws, or 100 from a guide.
    :param batch_size: the most probes in one forward pass.
    :param max_values: the most numbers to compare, over all draws, in the space of weights.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: a dataset with a variable ``<statistic>`` over ``(probe[, class])``, or ``<site>_<statistic>`` over the
        elements of a site. If a quantity is constant within every chain, its R-hat is 1 if all chains have the same
        value and infinity otherwise, and its effective sample sizes and standard error are NaN.
    :raises TypeError: when a run is not a posterior.
    :raises ValueError: for fewer than two chains, fewer than four draws in each, ``num_samples`` other than all draws
        of a sampler with several chains, runs of different lengths, missing probes, an unknown ``space``, NaN in a
        prediction, or more than ``max_values`` numbers.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), as implemented by ArviZ; Izmailov et al. (2021) for
    comparing functions.
    """
    seed = some_seed(seed)
    checks.count("max_values", max_values)
    posteriors = list(runs) if isinstance(runs, Sequence) else [runs]
    for posterior in posteriors:
        require_posterior(posterior)
    chains = sum(posterior.num_chains for posterior in posteriors)
    if chains < 2:
        raise ValueError(
            "R-hat compares independent runs, and there is only one chain: sample with num_chains=4, or give a list of "
            "posteriors that were fitted with different seeds"
        )
    if cut := [p for p in posteriors if p.num_chains > 1 and num_samples not in (None, p.num_stored)]:
        raise ValueError(
            f"num_samples={num_samples} takes only some of the {cut[0].num_stored} draws of {cut[0].num_chains} "
            "chains, and R-hat needs whole chains: leave it out"
        )
    if space == "function":
        if probes is None:
            raise ValueError("space='function' needs probes: give a few inputs of the network, such as 20 test rows")
        values = [_function(p, probes, _count(p, num_samples), batch_size, seed + i) for i, p in enumerate(posteriors)]
        return _statistics({"": _stack(values)})
    if space != "weights":
        raise ValueError(f"space={space!r}: expected 'function' or 'weights'")
    warnings.warn(
        "weights have symmetries: chains that agree on every prediction may disagree on the weights, so a large R-hat "
        "here does not mean that the predictions have not converged",
        stacklevel=2,
    )
    sites = [p.draws(_count(p, num_samples), seed=seed + i, example=probes) for i, p in enumerate(posteriors)]
    size = sum(value.numel() for run in sites for value in run.values())
    if size > max_values:
        raise ValueError(
            f"the weights are {size:,} numbers over all draws, more than max_values={max_values:,}: compare functions "
            "(space='function'), give a smaller num_samples or raise max_values"
        )
    return _statistics(
        {
            f"{safe(name)}_": _stack(
                [_by_chain(run[name], p.num_chains, safe(name)) for p, run in zip(posteriors, sites, strict=True)]
            )
            for name in sites[0]
        }
    )


def effective_size(values: Tensor, chains: int) -> float:
    """Mean bulk effective sample size over the columns of ``[chains * draws, m]``, with every chain split in half."""
    length = len(values) // chains // 2 * 2
    halves = values.unflatten(0, (chains, -1))[:, :length].flatten(0, 1)
    ess = _statistics({"": _named(halves.unsqueeze(1), 2 * chains, "column")})["ess_bulk"]
    return float(ess.mean())


def comparable(posterior: Posterior) -> bool:
    """Whether the posterior has several chains that are long enough for R-hat."""
    return posterior.num_chains > 1 and (posterior.num_stored or 0) >= FEWEST * posterior.num_chains


def rhat_limit(draws: int, chains: int, quantities: int) -> float:
    """The largest R-hat at which chains count as agreeing.

    This is 1.01 or, if it is larger, the value that the largest of several R-hats stays below with a probability of
    99 % when all draws are independent. With n draws in each of 2 M half chains ``R-hat^2 = (n - 1) / n + F / n``,
    where ``(2 M - 1) F`` is chi-square with 2 M - 1 degrees of freedom. Every quantity has two R-hats, one for ranks
    and one for folded ranks.

    :param draws: number of draws over all M chains.
    :param quantities: number of quantities whose R-hats are compared with the limit.
    """
    freedom = 2 * chains - 1
    n = draws / (2 * chains)
    largest = float(scipy.stats.chi2.isf(0.01 / (2 * quantities), freedom)) / freedom
    return max(RHAT, math.sqrt((n - 1 + largest) / n))


def _count(posterior: Posterior, num_samples: int | None) -> int:
    return posterior.draw_source.count_all(num_samples, POSTERIOR_DRAWS)


def _function(
    posterior: Posterior, probes: Inputs, num_samples: int, batch_size: int | None, seed: int
) -> xr.DataArray:
    prediction = posterior.predict(probes, num_samples=num_samples, batch_size=batch_size, seed=seed)
    values = plain(prediction.per_member, 3)
    if values.isnan().any():
        raise ValueError("a run predicts NaN at the probes: check for parameters that diverged in training")
    classes = isinstance(prediction.likelihood, Categorical)
    rest = values.dim() - 3 - classes
    chains = posterior.num_chains if num_samples == posterior.num_stored else 1
    return _named(values, chains, "probe", *outputs(rest), *(("class",) if classes else ()))


def _by_chain(values: Tensor, chains: int, name: str) -> xr.DataArray:
    return _named(values, chains, *(f"{name}_dim_{axis}" for axis in range(values.dim() - 2)))


def _named(values: Tensor, chains: int, *event: str) -> xr.DataArray:
    """``[S, K, ...] -> (chain, draw, ...)``, with the members flattened into the draws."""
    values = at_least_float32(values.detach()).cpu().unflatten(0, (chains, -1)).flatten(1, 2)
    return xr.DataArray(values.double().numpy(), dims=("chain", "draw", *event))


def _stack(runs: list[xr.DataArray]) -> xr.DataArray:
    lengths = {run.sizes["draw"] for run in runs}
    if len(lengths) > 1:
        raise ValueError(f"the runs have {sorted(lengths)} draws: give num_samples, so that all have the same number")
    if (length := lengths.pop()) < FEWEST:
        raise ValueError(
            f"R-hat compares halves of chains, and the chains have {length} draw{'s' * (length > 1)}: at least "
            f"{FEWEST} are needed, and a few hundred for a meaningful result"
        )
    whole = xr.concat(runs, "chain")
    return whole.assign_coords({dim: np.arange(size) for dim, size in whole.sizes.items()})


def _statistics(quantities: dict[str, xr.DataArray]) -> xr.Dataset:
    found: dict[str, xr.DataArray] = {}
    for prefix, values in quantities.items():
        moves = values.max("draw") > values.min("draw")
        differs = values.max(("chain", "draw")) > values.min(("chain", "draw"))
        data = xr.Dataset({"x": values})
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", RuntimeWarning)  # variances of zero are handled below
            rhat = arviz.rhat(data)["x"].where(moves.any("chain"), np.inf).where(differs, 1.0)
            found[f"{prefix}rhat"] = rhat
            for method in ("bulk", "tail"):
                found[f"{prefix}ess_{method}"] = arviz.ess(data, method=method)["x"].where(moves.any("chain"))
            found[f"{prefix}mcse_mean"] = arviz.mcse(data, method="mean")["x"].where(moves.any("chain"))
    return xr.Dataset(found)
