"""Baselines for comparison: deep ensembles, MC dropout, last-layer Laplace and SWAG."""

from pyro_bnn.inference.baselines.dropout import MCDropout
from pyro_bnn.inference.baselines.ensemble import DeepEnsemble
from pyro_bnn.inference.baselines.laplace import LastLayerLaplace
from pyro_bnn.inference.baselines.swag import SWAG

__all__ = ["SWAG", "DeepEnsemble", "LastLayerLaplace", "MCDropout"]
