"""What an engine found: one object that draws, predicts, is saved and loaded, whatever engine it came from.

:class:`Posterior` is the facade. Behind it, ``draw_source`` makes draws (of a guide, or ``stored_draws``),
``statistics`` gives each draw its normalisation statistics, ``network_outputs`` runs the network on them, ``foreign``
does the same for a Pyro model of the user's own, ``prediction`` says what the outputs mean, ``plain_networks`` makes
networks without Pyro of draws, ``storage`` and ``own_draws`` say what is written of networks and of own models,
``folder`` writes and reads the files, and ``loading`` makes a posterior of them again.
"""

from pyro_bnn.posterior.loading import load
from pyro_bnn.posterior.posterior import Posterior, Sparsified
from pyro_bnn.posterior.prediction import Prediction

__all__ = ["Posterior", "Prediction", "Sparsified", "load"]
