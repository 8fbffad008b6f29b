"""Sparsity: removes groups of weights with a low inclusion probability, and the channels that become unused.

``inclusion`` computes the probability that a group comes from the slab; ``walk`` and ``channel_rules`` follow channels
through the graph of a network; ``channels`` cuts channels without incoming or outgoing weights; ``sparsify`` applies
this to a model and all its draws.
"""

from pyro_bnn.sparsity.channels import Channels, Size, count
from pyro_bnn.sparsity.inclusion import has_inclusion, inclusion_log_odds
from pyro_bnn.sparsity.sparsify import sparsify

__all__ = ["Channels", "Size", "count", "has_inclusion", "inclusion_log_odds", "sparsify"]
