"""Conversion of a posterior to an ArviZ object.

* ``conversion``: ``to_arviz``, which makes all groups.
* ``sites``: summaries of latent sites, by layer.
* ``densities``: log densities of draws under the prior and the guide.
* ``own_models``: the groups of a user's own Pyro model.
* ``arrays``: names of axes, and the limit on how many numbers are stored.
"""
