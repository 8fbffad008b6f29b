"""The quality of predictions on data that training does not see, after every epoch."""

from __future__ import annotations

import math

import torch

from pyro_bnn.distributed import Processes
from pyro_bnn.inference.batches import as_tensors
from pyro_bnn.inputs import Data
from pyro_bnn.modes import keeping_modes
from pyro_bnn.posterior import Posterior
from pyro_bnn.predicting import pair_batches, require_repeatable, rows_with_labels
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded

#: of the draws with which all epochs are compared
SEED = 0


class Validation:
    """The negative log density of the predictions for held-out data, averaged over draws and members::

        NLL = -(1/N) sum_n log (1/SK) sum_sk p(y_n | x_n, W_sk),   in nats per datum

    S is 16 for a guide and 1 for points and particles; all epochs have the same seed. Training does not notice: modes
    and random states are as they were afterwards.

    N counts the rows with a label, as that of :func:`~pyro_bnn.diagnostics.evaluate` does. Several processes divide the
    batches between them.

    :param data: in any form that :func:`~pyro_bnn.diagnostics.evaluate` takes.
    :param model: that is trained: the first batch is checked against it.
    :raises TypeError: for data that can be read only once, or labels of the wrong type.
    :raises ValueError: for data that are empty or do not fit the model, such as NaN, or labels out of range.
    """

    def __init__(self, data: Data, model: Program, together: Processes) -> None:
        require_repeatable(data, "validation")
        self._data, self._together = data, together
        first = next(iter(pair_batches(data, model)), None)
        if first is None:
            raise ValueError("validation= is empty: give at least one row, or leave it out")
        try:
            as_tensors(model, first)
        except (TypeError, ValueError) as error:
            error.add_note("That is what validation= holds, which is looked at before anything trains")
            raise

    def nll(self, posterior: Posterior) -> float:
        """In nats per datum.

        :raises ValueError: when a later batch does not fit the model, or a density is NaN.
        """
        model, guide = posterior.model, posterior.draw_source.guide
        total, rows = 0.0, 0
        with torch.no_grad(), keeping_modes(model, guide), seeded(device_of(model), SEED):
            for i, (x, y) in enumerate(pair_batches(self._data, model)):
                if i % self._together.size != self._together.rank:
                    continue
                density = posterior.log_likelihood(x, y, seed=SEED).flatten(0, 1).double()
                there = rows_with_labels(model, y)
                density = density if there is None else density[:, there]
                total -= float((density.logsumexp(0) - math.log(len(density))).sum())
                rows += density.shape[-1]
        total, count = self._together.total([total, rows])
        if not count:
            raise ValueError("validation= holds no label but ignore_index: give rows with labels, or leave it out")
        if math.isnan(total):
            raise ValueError("the log density of validation= is NaN: look for infinite outputs of the network")
        return total / count
