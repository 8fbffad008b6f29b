"""How good predictions are: scores and metrics, streamed over data of any accepted form.

* ``metrics``: ``evaluate``, all numbers of a posterior on its data.
* ``calibration``: whether confidence is the share of right predictions.
* ``selective``: the loss on the data that a model is most confident of.
* ``ood``: whether inputs that are out of distribution are less certain.
* ``scores``: the CRPS, coverage and width of intervals.
* ``similarity``: how far functions agree, with a reference or with one another.
* ``scored``: every datum with its scores, for pictures and comparisons.
* ``stream``: predictions for one batch after another.
* ``probabilities``: class probabilities in the one form that metrics read.
* ``precision``: sums in float64.
"""
