"""Recalibration of predictions on held-out data.

* ``temperature``: temperature scaling, one number that divides all logits.
* ``conformal``: prediction sets and intervals with guaranteed coverage.
"""
