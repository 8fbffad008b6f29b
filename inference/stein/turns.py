"""Whether particles take less time together or one after the other."""

from __future__ import annotations

from typing import Any

from pyro_bnn.network import batch_size
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: glibc gives tensors from this size on back to the system, and gets fresh pages for the next
FRESH_PAGES = 2**25
#: bytes of activations that pass from one operation to the next in the cache of a processor
CACHE = 2**23


def faster_in_turn(model: Program, guide: MixtureGuide, args: tuple[Any, ...]) -> bool:
    """Whether particles should run one after the other.

    Together, all particles read the shared weights once, but their activations may not stay in the cache. One after the
    other is the faster way where activations are more than fits and more than the weights are (measured by
    ``python -m tests.benchmarks.peers --rows bella_encoder`` and the like with other widths).

    :param args: the arguments of the model, of which a network of this package has x first.
    """
    if not isinstance(model, BayesianNetwork) or model.like().device.type != "cpu":
        return False
    size = batch_size(*args[:2])
    largest = model.core().activation_elements(args[0], size) * size
    of_all = largest * guide.num_members * model.like().element_size()
    weights = max(p.numel() for p in model.core().net.parameters())
    return of_all > FRESH_PAGES or of_all > CACHE and largest > weights
