"""The network that a user provides: how it is copied, which values stay fixed, and what cannot be random."""
