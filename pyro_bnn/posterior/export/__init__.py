"""Plain modules without Pyro: one that averages draws, for ``torch.export``, ONNX and ``torch.compile``, or one a draw.

``arguments`` says how the module is called, from an example; ``averaged`` is the program of all draws, which still runs
Pyro's distributions and the modes of :mod:`pyro_bnn.perturb`; ``graph`` turns its trace into a module of torch
operations alone, and ``exporting`` puts these together and checks that the module gives what the program gives.
``plain_networks`` makes a network of every draw.
"""
