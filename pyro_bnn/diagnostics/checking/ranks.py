"""What the ranks of simulation-based calibration say: are they uniform, and if not, how is the posterior off?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pyro_bnn.diagnostics.checking.findings import Finding, Findings
from pyro_bnn.diagnostics.checking.uniformity import EcdfDifference, RankBand, chi_square, where_ranks_pile_up

#: share of guides whose loss still falls at the end of training from which their posteriors are not what is judged
UNTRAINED = 0.1
#: how far the coverage of a posterior's one-sided intervals may be off before it is a problem, not a warning
OFF = 0.1

#: the quantity log p(y | theta)
LOG_LIKELIHOOD = "log_likelihood"

_LONGER = (
    "Give the guide more freedom (several components, a full covariance) or more steps; give a chain a longer warm-up, "
    "or thin it more."
)
#: what ranks that pile up somewhere say, and what to do
_SHAPES = {
    "ends": ("the truth lies in the tails too often, so the posterior is too narrow", _LONGER),
    "middle": (
        "the truth lies in the middle of the posterior too often, so the posterior is too wide",
        "Train the guide for more steps; look whether all the data reach the inference.",
    ),
    "high": ("the truth lies above the draws too often, so the posterior is biased towards low values", _LONGER),
    "low": ("the truth lies below the draws too often, so the posterior is biased towards high values", _LONGER),
    "other": ("the shape is neither a U, a hump nor a slope", "Look at ecdf_difference(...)."),
}
#: of the log-likelihood, which is no parameter
_SHAPES_OF_LOG_LIKELIHOOD = _SHAPES | {
    "high": (
        "the data are more probable under the truth than under the draws too often, so the posterior lies too far from "
        "the data: too wide, in the wrong place, or without having seen them",
        "Train the guide for more steps; look whether all the data reach the inference.",
    ),
    "low": (
        "the data are more probable under the draws than under the truth too often, so the posterior lies too close "
        "around the best fit",
        _LONGER,
    ),
}


@dataclass(frozen=True, repr=False)
class SBCResult:
    """Ranks of what the data were made from, among draws of the posteriors that were inferred from the data.

    :param ranks: ``{quantity: [simulations, ...]}``, in 0 ... draws.
    :param draws: number L of draws of each posterior.
    :param falling: number of guides whose loss was still falling when the learning rate began to fall
        (:func:`loss_verdict`).
    """

    ranks: dict[str, Tensor]
    draws: int
    falling: int = 0

    def __repr__(self) -> str:
        least = ", ".join(f"{name} {float(p.min()):.2g}" for name, p in self.p_values().items() if p.numel())
        return (
            f"SBCResult(simulations={self.simulations}, draws={self.draws}, falling={self.falling}; least p-value of "
            f"uniform ranks: {least})"
        )

    @property
    def simulations(self) -> int:
        """Number S of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    def p_values(self) -> dict[str, Tensor]:
        """``{quantity: [...]}``: the p-value of uniformity of each element, by simultaneous bands of the ECDF.

        This is the verdict, rather than :meth:`chi_square`: it knows the order of the ranks, without which slopes and
        U-shapes are hard to see in 100 simulations; there are no bins to choose; it is exact however few simulations
        there are; and it can be drawn, see :meth:`ecdf_difference`.

        Source: Saeilynoja, Buerkner and Vehtari (2022); see
        :class:`~pyro_bnn.diagnostics.checking.uniformity.RankBand`.
        """
        return {name: self._band.p_value(ranks) for name, ranks in self.ranks.items()}

    def chi_square(self) -> dict[str, Tensor]:
        """``{quantity: [...]}``: the p-value of each element by Pearson's chi-square, for comparison."""
        return {name: chi_square(ranks, self.draws) for name, ranks in self.ranks.items()}

    def ecdf_difference(self, name: str, level: float = 0.95) -> EcdfDifference:
        """The curves of a quantity and the band that goes with :meth:`p_values`, to be drawn.

        :raises ValueError: for an unknown quantity, or unless ``0 < level < 1``.
        """
        if name not in self.ranks:
            raise ValueError(f"no quantity {name!r}; there are {', '.join(self.ranks)}")
        return self._band.ecdf_difference(self.ranks[name], level)

    def findings(self, level: float = 0.05) -> Findings:
        """What is wrong with the posteriors, in words.

        The chance that an exact posterior has anything wrong with it is at most ``level``: p-values are multiplied by
        the number of a quantity's elements (Bonferroni), the least of them counts, and over quantities they are
        corrected after Holm. Ranks of a posterior that is too narrow pile up at both ends (a U), of one that is too
        wide in the middle (a hump), of a biased one at one end (a slope). A warning becomes a problem where one-sided
        intervals of the posterior hold the truth in more than 10 percentage points too many or too few simulations.
        """
        p = {name: min(1.0, float(values.min()) * values.numel()) for name, values in self.p_values().items()}
        found, fine, corrected = Findings(), [], 0.0
        if self.falling > UNTRAINED * self.simulations:
            found.append(
                Finding(
                    "warning",
                    "training",
                    f"the loss of {self.falling} of {self.simulations} guides was still falling when the learning rate "
                    "began to: what is judged may be the training, not the guide.",
                    "Give more steps=, or a larger lr=.",
                )
            )
        for i, name in enumerate(sorted(p, key=lambda name: p[name])):
            corrected = max(corrected, min(1.0, (len(p) - i) * p[name]))
            if corrected > level:
                fine.append(name)
            else:
                found.append(self._finding(name, corrected))
        if fine:
            which = ", ".join(name for name in self.ranks if name in fine)
            message = f"the ranks of {which} look uniform in {self.simulations} simulations, as under exact posteriors."
            found.append(Finding("good", "calibration", message))
        return found

    def _finding(self, name: str, p: float) -> Finding:
        values = self.p_values()[name].flatten()
        worst = int(values.argmin())
        rank = self.ranks[name].reshape(self.simulations, -1)[:, worst]
        off = float(self._band.ecdf_difference(rank).difference.abs().max())
        element = f" (worst: element {worst} of {len(values)})" if len(values) > 1 else ""
        shapes = _SHAPES_OF_LOG_LIKELIHOOD if name == LOG_LIKELIHOOD else _SHAPES
        shape, remedy = shapes[where_ranks_pile_up(rank, self.draws)]
        return Finding(
            "problem" if off > OFF else "warning",
            f"calibration of {name}",
            f"the ranks{element} are not uniform in {self.simulations} simulations (corrected p = {p:.2g}): {shape}. "
            f"One-sided intervals are up to {100 * off:.0f} percentage points off.",
            remedy,
        )

    @cached_property
    def _band(self) -> RankBand:
        return RankBand(self.simulations, self.draws)
