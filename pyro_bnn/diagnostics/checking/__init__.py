"""Whether a posterior can be trusted: convergence of chains and training, importance sampling, priors, simulation."""
