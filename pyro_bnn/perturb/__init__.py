"""Runs a network with different weights for every row of the batch, without changing its code.

:class:`Perturb` (``mode``) intercepts the torch function that consumes a weight. ``factors`` and ``low_rank`` say how a
weight may differ from row to row, ``layout`` where the samples are, ``probe`` finds that out, and ``products``,
``attention``, ``recurrent`` and ``normalisation`` hold one rule for each torch function that uses weights.

``substitution`` replaces whole weights of the network during a pass, also in parts of the pass that run again later;
``vectoriser`` runs passes with whole weights vectorised or in turn.
"""

from pyro_bnn.perturb import attention, normalisation, products, recurrent  # noqa: F401  (their rules register themselves)
from pyro_bnn.perturb.factors import Perturbation, Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Layout, Use
from pyro_bnn.perturb.low_rank import LowRankFactors, Shift
from pyro_bnn.perturb.mode import Call, Perturb, register

__all__ = [
    "Call",
    "Layout",
    "LowRankFactors",
    "Perturb",
    "Perturbation",
    "Rank1Factors",
    "Replacement",
    "Shift",
    "Use",
    "register",
]
