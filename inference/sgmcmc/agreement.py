"""Whether the chains of a run agree: R-hat and effective sample size of what the posterior is for."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.perturb.samples import select_samples
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.model import BayesianNetwork

#: rows at which the functions of chains are compared
ROWS = 16
#: R-hat from which on chains are said to disagree, and effective draws below which there are said to be few
RHAT, EFFECTIVE = 1.05, 100.0


def agreement(posterior: Posterior, batch: tuple[object, ...], num_chains: int) -> dict[str, float]:
    """The largest R-hat and the smallest effective sample size, with a warning when they are not good.

    Of a network they are those of its outputs at some rows of training: weights that are exchanged give the same
    function. Of any other model they are those of its latents.

    :param batch: what the model was called with.
    :return: ``"largest R-hat"`` and ``"smallest effective sample size"``; nothing for fewer than two chains or four
        draws.
    """
    values = _values(posterior, batch)
    draws = len(values) // num_chains
    if num_chains < 2 or draws < 4:
        return {}
    import arviz  # takes seconds to import
    import xarray as xr

    array = xr.DataArray(values.reshape(num_chains, draws, -1), dims=("chain", "draw", "value"))
    varies = array.std(("chain", "draw")) > 0
    data = array.isel(value=np.flatnonzero(varies)).to_dataset(name="x")
    if not data.sizes["value"]:
        return {}
    rhat, effective = float(arviz.rhat(data)["x"].max()), float(arviz.ess(data)["x"].min())
    if not rhat <= RHAT or not effective >= EFFECTIVE:
        what = "predictions" if isinstance(posterior.model, BayesianNetwork) else "latents"
        longer = max(2, math.ceil(EFFECTIVE / effective)) if effective > 0 else 10
        warnings.warn(
            f"the {num_chains} chains are not yet good enough to rely on: R-hat of the {what} is up to {rhat:.2f} "
            f"(expected below {RHAT}) and {effective:.0f} of {len(values)} draws are effectively independent (expected "
            f"at least {EFFECTIVE:.0f}). Sample {longer} times as long, warm-up too; if that does not help, the "
            "posterior may have several modes, or need another parametrisation",
            stacklevel=4,
        )
    return {"largest R-hat": rhat, "smallest effective sample size": effective}


def _values(posterior: Posterior, batch: tuple[object, ...]) -> np.ndarray:
    """What is compared, ``[draws, numbers]``, chain after chain."""
    count = posterior.num_stored or 0
    if isinstance(posterior.model, BayesianNetwork) and posterior.model.likelihood is not None:
        size = count_samples(x := batch[0])
        x = select_samples(x, size, list(range(min(ROWS, size))))
        found = posterior.predict(x, num_samples=count, seed=0).outputs
        return found.reshape(count, -1).double().cpu().numpy()
    draws = posterior.draws(count)
    return torch.cat([value.reshape(count, -1) for value in draws.values()], -1).double().cpu().numpy()
