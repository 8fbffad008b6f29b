"""Which groups of weights a posterior can do without, which channels go with them, and the network that is left.

``inclusion`` says how probable it is that a group comes from the slab; ``walk`` and ``channel_rules`` follow channels
through the graph of a network; ``channels`` cuts those that nothing makes or reads; ``sparsify`` does so to a model and
all its draws.
"""

from pyro_bnn.sparsity.channels import Channels, Size, count
from pyro_bnn.sparsity.inclusion import has_inclusion, inclusion_log_odds
from pyro_bnn.sparsity.sparsify import sparsify

__all__ = ["Channels", "Size", "count", "has_inclusion", "inclusion_log_odds", "sparsify"]
