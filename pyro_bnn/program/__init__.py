"""A network as a Pyro program: its latent sites and their priors, the model, and guides that are mixtures.

``module`` is what models and guides share, ``sites`` what a latent weight is, ``model`` the frame of every model,
``factorised`` a block of independent Normals, and ``guide`` the frame of guides that are mixtures.
"""
