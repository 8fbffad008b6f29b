"""What the label of a weight means: an entry in the table of the site that the weight belongs to.

The table of a site holds the K codes, which are the same for all sites, then one entry for each outlier of this site,
then one for each of its weights between two codes::

    0 <= label < K                a code
    K <= label < K + o            an outlier of the site, which has o
    K + o <= label < K + o + e    a weight between two codes, of which the site has e
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteLabels:
    """The labels of one site.

    :param num_codes: K.
    :param weights: the positions of its weights among those of all sites.
    :param outliers: the positions of its outliers among all outliers.
    :param between: the positions of its weights between codes among all of these.
    """

    num_codes: int
    weights: slice
    outliers: slice
    between: slice

    @property
    def first_outlier(self) -> int:
        return self.num_codes

    @property
    def first_between(self) -> int:
        return self.num_codes + self.outliers.stop - self.outliers.start

    @property
    def num_entries(self) -> int:
        """Length of the table."""
        return self.first_between + self.between.stop - self.between.start


def is_code(labels: Tensor, num_codes: int) -> Tensor:
    """Whether each label is that of a code."""
    return labels < num_codes


def labels_by_site(shapes: Sequence[torch.Size], num_codes: int, outliers: Tensor, between: Tensor) -> list[SiteLabels]:
    """The labels of each site.

    :param outliers, between: sorted positions among the weights of all sites.
    """
    starts = [0, *accumulate(shape.numel() for shape in shapes)]
    parts = zip(pairwise(starts), slices_between(outliers, starts), slices_between(between, starts), strict=True)
    return [SiteLabels(num_codes, slice(start, stop), o, e) for (start, stop), o, e in parts]


def slices_between(positions: Tensor, starts: Sequence[int]) -> list[slice]:
    """For each site the slice of the sorted positions that lie in it; ``starts`` ends with the end of the last site."""
    found = torch.searchsorted(positions, torch.tensor(starts, device=positions.device)).tolist()
    return [slice(start, stop) for start, stop in pairwise(found)]


def label_weights(sites: Sequence[SiteLabels], codes: Tensor, outliers: Tensor, between: Tensor) -> Tensor:
    """The label of every weight, int32 ``[n]``.

    :param codes: the code of every weight, ``[n]``; ignored for outliers and weights between codes.
    """
    labels = codes.to(torch.int32).clone()
    for site in sites:
        own = torch.arange(site.first_outlier, site.num_entries, dtype=torch.int32, device=labels.device)
        split = site.first_between - site.first_outlier
        labels[outliers[site.outliers]] = own[:split]
        labels[between[site.between]] = own[split:]
    return labels
