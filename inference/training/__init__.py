"""Training by gradients: one loop, one set of options and one checkpoint for every engine that trains so."""
