"""How good predictions are: scores and metrics, computed batch by batch on data of any accepted form.

* ``metrics``: ``evaluate``, all metrics of a posterior on held-out data.
* ``calibration``: whether confidence matches the share of right predictions.
* ``selective``: the loss on the data that a model is most confident about.
* ``ood``: whether predictions are less certain for out-of-distribution inputs.
* ``scores``: the CRPS, and the coverage and width of intervals.
* ``shift``: accuracy, NLL and calibration on corrupted data, by kind and severity.
* ``similarity``: how much functions agree, with a reference or with one another.
* ``scored``: the scores of every datum, for plots and comparisons.
* ``gathering``: numbers of all rows, from several processes.
* ``probabilities``: class probabilities in the form that metrics expect.
* ``precision``: sums in float64.
"""
