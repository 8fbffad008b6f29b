"""Whether ranks are uniform: an exact test by simultaneous bands of their ECDF, and Pearson's chi-square."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from pyro_bnn.entry import checks


@dataclass(frozen=True)
class EcdfDifference:
    """The empirical distribution function of ranks minus that of a uniform distribution, with its band.

    :param z: ``[L]``: fractions of the possible ranks, ``1 / (L + 1) ... L / (L + 1)``.
    :param difference: ``[L, ...]``: share of the ranks that are among the lowest fraction z of possible ranks, minus z.
    :param lower, upper: ``[L]``: bounds of the band. Uniform ranks stay within it, at all z simultaneously, with the
        probability ``level``.
    """

    z: Tensor
    difference: Tensor
    lower: Tensor
    upper: Tensor


class RankBand:
    """The joint distribution of ``R_i``, the number of the S ranks that are below i, for i = 1 ... L.

    For uniform ranks in ``0 ... L`` each R_i is ``Bin(S, z_i)`` with ``z_i = i / (L + 1)``. The statistic g is the tail
    probability of the least probable R_i. The p-value is the probability that uniform ranks have a g' as small::

        g = 2 min_i min(P(Bin(S, z_i) <= R_i), P(Bin(S, z_i) >= R_i)),    p = P(g' <= g)

    p is computed exactly, without simulation: the counts of the single ranks are independent Poisson variables
    conditioned on their sum S, so R_1, R_2, ... is a random walk, and p is the probability that it leaves the band.

    :param count: S.
    :param largest: L.

    Source: Saeilynoja, Buerkner and Vehtari (2022), "Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison", Statistics and Computing 32, section 2.
    """

    def __init__(self, count: int, largest: int) -> None:
        counts = torch.arange(count + 1)
        self.count, self.largest = count, largest
        self.z = torch.arange(1, largest + 1, dtype=torch.float64) / (largest + 1)
        binomial = stats.binom(count, self.z[:, None].numpy())
        low, high = (torch.from_numpy(tail) for tail in (binomial.cdf(counts), binomial.sf(counts - 1)))
        self._tail = 2 * torch.minimum(low, high)  # [L, S + 1]
        steps = (counts[None] - counts[:, None]).numpy()
        self._step = torch.from_numpy(stats.poisson(count / (largest + 1)).pmf(steps))
        self._sum = float(stats.poisson(count).pmf(count))

    def below(self, ranks: Tensor) -> Tensor:
        """``[S, ...] -> [L, ...]``: the counts R_i."""
        return torch.stack([(ranks < i).sum(0) for i in range(1, self.largest + 1)])

    def p_value(self, ranks: Tensor) -> Tensor:
        """``[S, ...] -> [...]``: the p-value of uniformity, with an error of about 1e-12."""
        below = self.below(ranks)
        g = self._tail.gather(1, below.reshape(self.largest, -1)).amin(0)
        distinct, index = g.unique(return_inverse=True)
        return self._leaving(distinct)[index].reshape(ranks.shape[1:])

    def ecdf_difference(self, ranks: Tensor, level: float = 0.95) -> EcdfDifference:
        """The ECDF curves of ranks ``[S, ...]`` and their band, for a plot.

        :raises ValueError: unless ``0 < level < 1``.
        """
        checks.share("level", level)
        ecdf = self.below(ranks).double() / self.count
        lower, upper = self.limits(level)
        z = self.z
        return EcdfDifference(z, ecdf - z.reshape((-1,) + (1,) * (ecdf.dim() - 1)), lower - z, upper - z)

    def limits(self, level: float) -> tuple[Tensor, Tensor]:
        """The smallest and largest ``R_i / S`` within the band, ``[L]`` each.

        Ranks leave the band if and only if their p-value is ``1 - level`` or less.
        """
        statistics = self._tail.unique()
        inside, outside = len(statistics), 0  # bisection: the first `outside` of the sorted statistics are outside
        while outside < inside:
            middle = (outside + inside) // 2
            if float(self._leaving(statistics[middle : middle + 1])) <= 1 - level:
                outside = middle + 1
            else:
                inside = middle
        g = statistics[outside - 1 : outside] if outside else statistics.new_full((1,), -1.0)
        within = self._within(g)[0].double()
        return within.argmax(1).double() / self.count, 1 - within.flip(1).argmax(1).double() / self.count

    def _within(self, g: Tensor) -> Tensor:
        """``[G] -> [G, L, S + 1]``: the counts whose tails are larger than g."""
        return self._tail > g[:, None, None] * (1 + 1e-9)  # tails equal by symmetry differ by rounding

    def _leaving(self, g: Tensor) -> Tensor:
        """``[G]``: the probability that some R_i has a tail of at most g."""
        state = torch.zeros(len(g), self.count + 1, dtype=torch.float64)
        state[:, 0] = 1
        for within in self._within(g).unbind(1):
            state = state @ self._step * within
        return (1 - state @ self._step[:, -1] / self._sum).clamp(0, 1)


def chi_square(ranks: Tensor, largest: int) -> Tensor:
    """``[S, ...] -> [...]``: the p-value of Pearson's chi-square test for ranks in ``0 ... largest``.

    Bins have equal width. Their number is the largest that divides the number of possible ranks and leaves an expected
    count of 5 or more in each bin (Cochran 1954), but at least 2.
    """
    possible = largest + 1
    most = max(2, len(ranks) // 5)
    bins = max((b for b in range(2, min(most, possible) + 1) if possible % b == 0), default=possible)
    bin_of_each = ranks.reshape(len(ranks), -1) * bins // possible
    counts = torch.stack([(bin_of_each == b).sum(0) for b in range(bins)])
    return torch.as_tensor(stats.chisquare(counts.numpy()).pvalue).reshape(ranks.shape[1:])


def where_ranks_pile_up(ranks: Tensor, largest: int) -> Literal["low", "high", "ends", "middle", "other"]:
    """Where ranks ``[S]`` in ``0 ... largest`` pile up, judged by their mean or variance, whichever is further off.

    ``ends``: both outer quarters have too many ranks. ``middle``: both have too few. ``other``: mean and variance are
    within two standard deviations of those of uniform ranks.
    """
    n = largest + 1
    variance, fourth = (n**2 - 1) / 12, (n**2 - 1) * (3 * n**2 - 7) / 240  # central moments on 0 ... L
    deviation = ranks.double() - largest / 2
    slope = float(deviation.mean()) / math.sqrt(variance / len(ranks))
    # With two possible ranks the variance is constant.
    spread = float(deviation.square().mean() - variance) / (math.sqrt((fourth - variance**2) / len(ranks)) or math.inf)
    if max(abs(slope), abs(spread)) < 2:
        return "other"
    quarter = -(-n // 4)
    excess = [float(tail.double().mean()) - quarter / n for tail in (ranks < quarter, ranks > largest - quarter)]
    if abs(spread) >= abs(slope) and min(excess) > 0:
        return "ends"
    if abs(spread) >= abs(slope) and max(excess) < 0:
        return "middle"
    return "high" if slope > 0 else "low"
