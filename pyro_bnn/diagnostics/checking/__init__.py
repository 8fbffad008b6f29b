"""Whether a posterior can be trusted.

* ``checks``: ``check``, which runs every check that applies to a posterior.
* ``findings``: the result of a check, in plain words.
* ``training``: whether the loss has converged.
* ``chains``: R-hat and effective sample size of independent runs.
* ``importance``: Pareto k-hat and leave-one-out cross-validation.
* ``inclusion_checks``: findings about which groups a spike-and-slab prior includes.
* ``predictive_checks``: findings about accuracy, calibration and out-of-distribution inputs.
* ``prior_checks``: the functions that a prior implies.
* ``shrinkage``: how much narrower the posterior is than the prior.
* ``simulation``: simulation-based calibration of an inference algorithm.
* ``ranks``: what the ranks of simulation-based calibration say about the posterior.
* ``uniformity``: the test for uniform ranks.
"""
