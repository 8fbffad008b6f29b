"""Making predictions as confident as they are right, on held-out data.

* ``temperature``: one number that divides all logits.
* ``conformal``: sets and intervals that hold the truth as often as they say.
"""
