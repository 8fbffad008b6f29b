"""What the ranks of simulation-based calibration say: whether they are uniform and, if not, what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pyro_bnn.diagnostics.checking.findings import Finding, Findings
from pyro_bnn.diagnostics.checking.uniformity import EcdfDifference, RankBand, chi_square, where_ranks_pile_up
from pyro_bnn.entry import checks

#: if the loss of more than this share of guides is still falling, the training may be what is judged
UNTRAINED = 0.1
#: error of the coverage of one-sided intervals above which a warning becomes a problem
OFF = 0.1

#: the quantity log p(y | theta)
LOG_LIKELIHOOD = "log_likelihood"

_LONGER = (
    "Give the guide more freedom (several components, a full covariance) or more steps; give a chain a longer warm-up, "
    "or thin it more."
)
#: for each place where ranks pile up: what that says, and what to do
_SHAPES = {
    "ends": ("the truth lies in the tails of the posterior too often, so the posterior is too narrow", _LONGER),
    "middle": (
        "the truth lies in the middle of the posterior too often, so the posterior is too wide",
        "Train the guide for more steps; check that the inference uses all data.",
    ),
    "high": ("the truth lies above the draws too often, so the posterior is biased towards low values", _LONGER),
    "low": ("the truth lies below the draws too often, so the posterior is biased towards high values", _LONGER),
    "other": ("the shape is not a U, a hump or a slope", "Look at ecdf_difference(...)."),
}
#: the same for the log-likelihood, where high and low mean something else than for a parameter
_SHAPES_OF_LOG_LIKELIHOOD = _SHAPES | {
    "high": (
        "the data are more probable under the truth than under the draws too often, so the posterior fits the data too "
        "little: it is too wide, in the wrong place, or has not seen the data",
        "Train the guide for more steps; check that the inference uses all data.",
    ),
    "low": (
        "the data are more probable under the draws than under the truth too often, so the posterior is too "
        "concentrated around the best fit",
        _LONGER,
    ),
}


@dataclass(frozen=True, repr=False)
class SBCResult:
    """The result of :func:`sbc`: ranks of the true values among draws of the posteriors inferred from simulated data.

    :param ranks: ``{quantity: [simulations, ...]}``, integers in 0 ... draws.
    :param draws: number L of draws of each posterior.
    :param falling: number of guides whose loss was still falling when the learning rate began to decay
        (:func:`loss_verdict`).
    """

    ranks: dict[str, Tensor]
    draws: int
    falling: int = 0

    def __repr__(self) -> str:
        least = ", ".join(f"{name} {float(p.min()):.2g}" for name, p in self.p_values().items() if p.numel())
        return (
            f"SBCResult(simulations={self.simulations}, draws={self.draws}, falling={self.falling}; smallest p-values "
            f"for uniform ranks: {least})"
        )

    @property
    def simulations(self) -> int:
        """Number S of simulated data sets."""
        return len(next(iter(self.ranks.values())))

    def p_values(self) -> dict[str, Tensor]:
        """The p-value for uniform ranks of each element, ``{quantity: [...]}``, by simultaneous bands of the ECDF.

        :meth:`findings` uses these rather than :meth:`chi_square`: this test uses the order of the ranks, without which
        slopes and U-shapes are hard to see in 100 simulations; it has no bins to choose; it is exact for any number of
        simulations; and it can be drawn, see :meth:`ecdf_difference`.

        Source: Saeilynoja, Buerkner and Vehtari (2022); see
        :class:`~pyro_bnn.diagnostics.checking.uniformity.RankBand`.
        """
        return {name: self._band.p_value(ranks) for name, ranks in self.ranks.items()}

    def chi_square(self) -> dict[str, Tensor]:
        """The p-value of each element by Pearson's chi-square test, ``{quantity: [...]}``, for comparison."""
        return {name: chi_square(ranks, self.draws) for name, ranks in self.ranks.items()}

    def ecdf_difference(self, name: str, level: float = 0.95) -> EcdfDifference:
        """The ECDF curves of a quantity, and the band of :meth:`p_values`, for a plot.

        :param name: a quantity, a key of ``ranks``.
        :param level: probability that uniform ranks stay within the band at all places.

        :raises ValueError: for an unknown quantity, or unless ``0 < level < 1``.
        """
        if name not in self.ranks:
            raise ValueError(f"name={name!r}: expected one of the quantities {', '.join(self.ranks)}")
        return self._band.ecdf_difference(self.ranks[name], level)

    def findings(self, level: float = 0.05) -> Findings:
        """What is wrong with the posteriors, in words.

        For exact posteriors the probability of any warning about calibration is at most ``level``: the smallest p-value
        of each quantity is multiplied by its number of elements (Bonferroni), and Holm's correction is applied over
        quantities. Ranks pile up at both ends (a U) if the posterior is too narrow, in the middle (a hump) if it is too
        wide, and at one end (a slope) if it is biased. A warning becomes a problem if the coverage of one-sided
        intervals is wrong by more than 10 percentage points.

        :raises ValueError: unless ``0 < level < 1``.
        """
        level = checks.share("level", level)
        p = {name: min(1.0, float(values.min()) * values.numel()) for name, values in self.p_values().items()}
        found, fine, corrected = Findings(), [], 0.0
        if self.falling > UNTRAINED * self.simulations:
            found.append(
                Finding(
                    "warning",
                    "training",
                    f"the loss of {self.falling} of {self.simulations} guides was still falling when the learning rate "
                    "began to decay: the result may say more about the training than about the guide.",
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
            f"The coverage of one-sided intervals is wrong by up to {100 * off:.0f} percentage points.",
            remedy,
        )

    @cached_property
    def _band(self) -> RankBand:
        return RankBand(self.simulations, self.draws)
