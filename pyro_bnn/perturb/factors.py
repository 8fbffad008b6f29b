"""Perturbations of one parameter: rank-1 factors, low-rank terms, a whole matrix, or separate values of members."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_bnn.perturb.layout import of_member
from pyro_bnn.perturb.low_rank import LowRankFactors, Shift


class Rank1Factors(NamedTuple):
    """W' = W o (r s^T). ``r`` runs over dimension 0 and ``s`` over dimension 1 of the stored weight.

    Both have the shape ``[members | 1, rows | 1, n]``. For a grouped convolution ``s`` may have ``groups`` times the
    entries of dimension 1, one for each channel of the whole layer, or one for each channel of a group.
    """

    r: Tensor
    s: Tensor

    def transposed(self) -> Rank1Factors:
        return Rank1Factors(self.s, self.r)

    def narrow(self, start: int, length: int) -> Rank1Factors:
        """The factors of ``W[start : start + length]``."""
        return Rank1Factors(self.r.narrow(-1, start, length), self.s)

    def of_member(self, member: int) -> Rank1Factors:
        return Rank1Factors(of_member(self.r, member), of_member(self.s, member))

    def explicit(self, weight: Tensor, member: int, row: int) -> Tensor:
        """The weight of one row of one member: the definition that every rule must agree with."""
        r, s = (_pick(factor, member, row) for factor in self)
        shape = weight.shape
        repeats = s.numel() // shape[1]
        if repeats == 1:
            outer = torch.outer(r, s)
        else:  # channels are numbered group by group, and so are the parts of dimension 0
            outer = r[:, None] * s.view(repeats, shape[1]).repeat_interleave(shape[0] // repeats, 0)
        return weight * outer.reshape(shape[:2] + (1,) * (weight.dim() - 2)).to(weight.dtype)


class Replacement(NamedTuple):
    """A separate bias or gain for every member: ``value`` is ``[members | 1, rows | 1, n]`` with n elements."""

    value: Tensor

    def narrow(self, start: int, length: int) -> Replacement:
        return Replacement(self.value.narrow(-1, start, length))

    def of_member(self, member: int) -> Replacement:
        return Replacement(of_member(self.value, member))

    def explicit(self, weight: Tensor, member: int, row: int) -> Tensor:
        return _pick(self.value, member, row).view_as(weight).to(weight.dtype)


def _pick(factor: Tensor, member: int, row: int) -> Tensor:
    return factor[member if factor.shape[0] > 1 else 0, row if factor.shape[1] > 1 else 0]


#: the perturbations that a parameter may have in one pass
Perturbation = Rank1Factors | LowRankFactors | Shift | Replacement
