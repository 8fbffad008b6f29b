"""The result of every engine: one object that draws, predicts, saves and loads.

:class:`Posterior` is the facade. Behind it, ``draw_source`` supplies draws (from a guide, or from ``stored_draws``),
``statistics`` gives each draw its normalisation statistics, ``network_outputs`` runs the network with each draw,
``foreign`` does the same for a user's own Pyro model, ``prediction`` interprets the outputs, ``sequences`` those of all
tokens of a text, ``importance`` says what groups of weights are worth to them, ``export`` turns draws into networks
without Pyro, one a draw or one that averages them, ``storage`` and ``own_draws`` define what is saved of networks and
of a user's own models, ``folder`` writes and reads the files, and ``loading`` rebuilds a posterior from them.
"""

from pyro_bnn.posterior.importance import ChainInclusion, Importance
from pyro_bnn.posterior.loading import load
from pyro_bnn.posterior.posterior import Posterior, Sparsified
from pyro_bnn.posterior.prediction import Prediction
from pyro_bnn.posterior.sequences import Sequences

__all__ = ["ChainInclusion", "Importance", "Posterior", "Prediction", "Sequences", "Sparsified", "load"]
