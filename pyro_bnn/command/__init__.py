"""The command line ``pyro-bnn``: its options, data files, recipes for training, run folders and comparisons."""
