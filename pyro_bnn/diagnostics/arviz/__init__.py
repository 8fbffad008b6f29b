"""A posterior as an ArviZ object: names of axes, sites in short form, densities of draws."""
