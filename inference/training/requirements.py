"""What is refused before anything trains: data, programs and guides that no number of epochs would make right."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints
from torch.utils import _pytree as pytree

from pyro_bnn.entry import checks
from pyro_bnn.inference.batches import Minibatches
from pyro_bnn.modes import undisturbed
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: by which torch's message is known
_ONE_VALUE = "Expected more than 1 value per channel"


def first_row(batch: tuple[object, ...]) -> object:
    """One row of x, as the example input of a posterior."""
    return pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.dim() else t, batch[0])


def require_rows_for_statistics(model: Program, batches: Minibatches) -> None:
    """Refuses data whose last batch has one row where batch normalisation needs several, before anything trains.

    Whether it does depends on what else a layer averages over, so that one row is run as in training.

    :raises ValueError: when torch refuses it.
    """
    if not isinstance(model, BayesianNetwork) or batches.size is None or not model.moving_layers():
        return
    y = batches.first[-1]
    rows = len(y) if isinstance(y, Tensor) else 0
    if batches.size - (batches.steps - 1) * rows != 1:
        return
    net = model.core().net
    try:
        with undisturbed(net):
            net.train()
            model.core()(first_row(batches.first))
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise ValueError(
            f"the last batch of every pass has one row, because {batches.size} rows are split into batches of {rows}, "
            f"and batch normalisation cannot compute a variance from one row ({error}). Choose another batch_size=, or "
            "a DataLoader with shuffle=True and drop_last=True"
        ) from error


def require_epochs(epochs: int) -> None:
    """Refuses a run without epochs, before anything is set up."""
    checks.count("epochs", epochs)


def require_programs(model: object, guide: object) -> None:
    """Refuses a model and a guide that are swapped, or are not programs.

    :raises TypeError: see above.
    """
    if isinstance(model, (MixtureGuide, AutoGuide)) or isinstance(guide, BayesianNetwork):
        raise TypeError(
            f"model={type(model).__name__}, guide={type(guide).__name__}: expected the model first and then its guide"
        )
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"{name}={program!r}: expected a Pyro program, a module or a function")


def require_supports(model: poutine.Trace, guide: poutine.Trace) -> None:
    """Refuses a guide whose values lie where the prior has no density: no learning rate could fix that.

    :param model: its trace at the draw of the guide.
    :raises ValueError: names the first such site.
    """
    priors: dict[str, Any] = model.nodes
    own: dict[str, Any] = guide.nodes
    for name, site in own.items():
        prior = priors.get(name)
        if site["type"] != "sample" or prior is None or prior["type"] != "sample" or site_is_subsample(site):
            continue
        low, high = _bounds(prior["fn"].support)
        point = isinstance(_base(site["fn"]), dist.Delta)
        value: Tensor = site["value"]
        least, most = (
            (float(value.detach().min()), float(value.detach().max())) if point else _bounds(site["fn"].support)
        )
        if least < low or most > high:
            found = "points" if point else f"a {type(_base(site['fn'])).__name__} on"
            raise ValueError(
                f"the supports of the site {name!r} differ: its prior, a {type(_base(prior['fn'])).__name__}, has no "
                f"density outside of [{low:g}, {high:g}], but the guide has {found} [{least:g}, {most:g}]. "
                "Give the site a prior on all numbers, or take a guide that follows the prior's support, such as "
                "pyro.infer.autoguide.AutoNormal"
            )


def _base(fn: Any) -> Any:
    """The distribution inside of an ``Independent`` and the like."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _bounds(support: Any) -> tuple[float, float]:
    """The least and the largest number of a support, as far as it says."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return float(torch.as_tensor(low).min()), float(torch.as_tensor(high).max())
