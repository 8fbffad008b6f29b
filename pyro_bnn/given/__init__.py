"""The network as a user gives it: what is copied of it, what it holds fixed, and what of it cannot be random."""
