"""Whether a posterior can be trusted.

* ``checks``: ``check``, which looks at all that can be looked at.
* ``findings``: what a check found, in plain words.
* ``training``: whether the loss has come to rest.
* ``chains``: R-hat and effective sample size of independent runs.
* ``importance``: Pareto k-hat and leave-one-out.
* ``predictive_checks``: findings about accuracy, calibration and inputs that are out of distribution.
* ``prior_checks``: the functions that a prior implies.
* ``shrinkage``: how much narrower the posterior is than the prior.
* ``simulation``: simulation-based calibration of an inference algorithm.
* ``ranks``: what the ranks that it returns say about the posterior.
* ``uniformity``: the test of ranks that these use.
"""
