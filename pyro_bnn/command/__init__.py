"""The command line ``pyro-bnn``: options, training recipes, run folders and comparisons."""
