"""A posterior as an ArviZ object.

* ``conversion``: ``to_arviz``, all groups.
* ``sites``: latent sites in short form, by layer.
* ``densities``: log densities of draws under prior and guide.
* ``own_models``: groups of a Pyro model that names its sites itself.
* ``arrays``: names of axes, and how many numbers may be stored.
"""
