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
from pyro_bnn.diagnostics.scoring.stream import require_posterior
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Categorical
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior

#: fewest draws of a chain whose halves can be compared
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

    Weights of a network can be permuted and change sign without a change of the function, so that chains which agree on
    every prediction disagree on weights. What is compared by default is the function at a few inputs: the probability
    of each class, or the mean of y.

    =============  ================================================================================================
    ``rhat``       sqrt of the variance of all draws over that within half chains, the larger of the two for ranks and
                   folded ranks (Vehtari et al. 2021, eqs. 3-4, 14-15); agreement is below 1.01
    ``ess_bulk``   independent draws that would tell the centre as well (eqs. 10-13); 100 a chain are wanted
    ``ess_tail``   the same for the 5 % and 95 % quantiles
    ``mcse_mean``  standard error of the mean, in the unit of the quantity
    =============  ================================================================================================

    :param runs: chains, which are those of a sampler (``num_chains`` of them), or posteriors of independent runs, as
        several fits from other seeds; members of a mixture or particles count as draws of their run.
    :param probes: inputs of the network, for the function there.
    :param space: ``"weights"`` takes every element of every latent site, with a warning.
    :param num_samples: draws of each member of each run; by default all stored ones, or 100.
    :param max_values: most numbers to look at.
    :returns: a dataset with a variable ``<statistic>`` over ``(probe[, class])``, or ``<site>_<statistic>`` over the
        elements of a site. A quantity that no chain moves has the R-hat 1 if all chains have the same value,
        else infinity, and no effective sample size or error (NaN).
    :raises TypeError: for what is no posterior.
    :raises ValueError: for fewer than two chains or four draws of each, runs of different lengths, missing probes, NaN
        in a prediction, or too many numbers.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), as implemented by ArviZ; Izmailov et al. (2021) for
    the space of functions.
    """
    seed = some_seed(seed)
    posteriors = list(runs) if isinstance(runs, Sequence) else [runs]
    for posterior in posteriors:
        require_posterior(posterior)
    chains = sum(posterior.num_chains for posterior in posteriors)
    if chains < 2:
        raise ValueError(
            "R-hat compares independent runs, and there is one chain: sample with num_chains=4, or give a list of "
            "posteriors that were fitted from different seeds"
        )
    if cut := [p for p in posteriors if p.num_chains > 1 and num_samples not in (None, p.num_stored)]:
        raise ValueError(
            f"num_samples={num_samples} takes some of the {cut[0].num_stored} draws of {cut[0].num_chains} chains, "
            "which are then no chains: leave it out"
        )
    if space == "function":
        if probes is None:
            raise ValueError("the space of functions needs probes: a few inputs of the network, such as 20 test data")
        values = [_function(p, probes, _count(p, num_samples), batch_size, seed + i) for i, p in enumerate(posteriors)]
        return _statistics({"": _stack(values)})
    if space != "weights":
        raise ValueError(f"space={space!r}: expected 'function' or 'weights'")
    warnings.warn(
        "the weights of a network have symmetries, which chains that agree on every prediction need not share: a large "
        "R-hat here is no sign that predictions have not converged",
        stacklevel=2,
    )
    sites = [p.draws(_count(p, num_samples), seed=seed + i, example=probes) for i, p in enumerate(posteriors)]
    size = sum(value.numel() for run in sites for value in run.values())
    if size > max_values:
        raise ValueError(
            f"the weights are {size:,} numbers over all draws, more than max_values={max_values:,}: look at functions "
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
    """Mean bulk effective sample size of the columns of ``[chains * draws, m]``, chain after chain, by halves."""
    length = len(values) // chains // 2 * 2
    halves = values.unflatten(0, (chains, -1))[:, :length].flatten(0, 1)
    ess = _statistics({"": _named(halves.unsqueeze(1), 2 * chains, "column")})["ess_bulk"]
    return float(ess.mean())


def comparable(posterior: Posterior) -> bool:
    """Whether it has several chains that are long enough for R-hat."""
    return posterior.num_chains > 1 and (posterior.num_stored or 0) >= FEWEST * posterior.num_chains


def rhat_limit(draws: int, chains: int, quantities: int) -> float:
    """The R-hat up to which chains agree: 1.01, or what the largest of several R-hats stays below with a probability of
    99 % when all draws are independent.

    With n draws in each of 2 M half chains ``R-hat^2 = (n - 1) / n + F / n``, in which ``(2 M - 1) F`` is chi-square
    with 2 M - 1 degrees of freedom; there are two R-hats for each quantity, of ranks and of folded ranks.

    :param draws: over all M chains.
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
        raise ValueError("a run predicts NaN at the probes: look for parameters that diverged in training")
    classes = isinstance(prediction.likelihood, Categorical)
    rest = values.dim() - 3 - classes
    chains = posterior.num_chains if num_samples == posterior.num_stored else 1
    return _named(values, chains, "probe", *outputs(rest), *(("class",) if classes else ()))


def _by_chain(values: Tensor, chains: int, name: str) -> xr.DataArray:
    return _named(values, chains, *(f"{name}_dim_{axis}" for axis in range(values.dim() - 2)))


def _named(values: Tensor, chains: int, *event: str) -> xr.DataArray:
    """``[S, K, ...] -> (chain, draw, ...)`` with the members among the draws."""
    values = at_least_float32(values.detach()).cpu().unflatten(0, (chains, -1)).flatten(1, 2)
    return xr.DataArray(values.double().numpy(), dims=("chain", "draw", *event))


def _stack(runs: list[xr.DataArray]) -> xr.DataArray:
    lengths = {run.sizes["draw"] for run in runs}
    if len(lengths) > 1:
        raise ValueError(f"the runs have {sorted(lengths)} draws: give num_samples, so that all have as many")
    if (length := lengths.pop()) < FEWEST:
        raise ValueError(
            f"R-hat compares halves of chains, and the chains have {length} draw{'s' * (length > 1)}: at least "
            f"{FEWEST} are needed, and some hundred for the result to mean anything"
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
            warnings.simplefilter("ignore", RuntimeWarning)  # variances of zero, which get their meaning here
            rhat = arviz.rhat(data)["x"].where(moves.any("chain"), np.inf).where(differs, 1.0)
            found[f"{prefix}rhat"] = rhat
            for method in ("bulk", "tail"):
                found[f"{prefix}ess_{method}"] = arviz.ess(data, method=method)["x"].where(moves.any("chain"))
            found[f"{prefix}mcse_mean"] = arviz.mcse(data, method="mean")["x"].where(moves.any("chain"))
    return xr.Dataset(found)
