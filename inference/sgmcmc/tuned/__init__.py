"""SGHMC that finds its own settings in warm-up: what it tunes, and the steps that it takes meanwhile."""
