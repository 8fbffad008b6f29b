"""A codebook: K Gaussians that weights share, outliers with their own Gaussians, and the assignment of all weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.models.weight_sharing import merging
from pyro_bnn.models.weight_sharing.deviations import deviations, padded, rho_of
from pyro_bnn.models.weight_sharing.labels import is_code, label_weights, labels_by_site, slices_between
from pyro_bnn.models.weight_sharing.merging import MergeRule
from pyro_bnn.models.weight_sharing.plane import PlaneMixture
from pyro_bnn.models.weight_sharing.shared_normal import Pairs, Table
from pyro_bnn.program.model import BayesianNetwork


class Codes(NamedTuple):
    """K Gaussians ``N(m_k, s_k^2)`` with ``s = softplus(rho) + 1e-7``.

    :param loc, rho: m and rho, ``[K]``.
    :param spread: covariances in the plane of (mean, standard deviation) of the weights that each code was made of,
        ``[K, 2, 2]``: what merging goes by.
    """

    loc: Tensor
    rho: Tensor
    spread: Tensor


class Outliers(NamedTuple):
    """Weights with their own Gaussians.

    :param positions: which weights, sorted, ``[o]``.
    :param loc, rho: of their Gaussians, ``[o]``; as of :class:`Codes`.
    """

    positions: Tensor
    loc: Tensor
    rho: Tensor


class Between(NamedTuple):
    """Weights that lie between two codes.

    :param positions: which weights, sorted, ``[e]``.
    :param pair: the two codes of each, ``[e, 2]``.
    :param alpha: the share of the first code, ``[e]``, a multiple of 1 / 255.
    """

    positions: Tensor
    pair: Tensor
    alpha: Tensor


class Codebook(nn.Module):
    """Codes ``N(m_k, s_k^2)``, outliers with their own Gaussians, weights between two codes, and labels of all weights.

    The weights of all sites follow one another. A label below K is a code; larger labels count the outliers of the
    weight's site, and then the site's weights between codes. The shapes of all tensors stay the same while codes merge
    (a code without weights is dead), so that optimisers and checkpoints remain valid; :meth:`compact` drops dead codes.

    :param sites: ``(name, shape)`` of each site.
    :param assignment: the code of each weight, ``[n]``; ignored for outliers and for weights between codes.
    :param codes, outliers, between: see :class:`Codes`, :class:`Outliers` and :class:`Between`.
    :param zero: whether code 0 keeps the mean 0.
    :param units: the units of merging, ``[2]`` in float64: the medians over codes of the squared Wasserstein distance
        to the nearest other code, and of the trace of the covariance. By default computed from these codes; they do not
        change while codes merge.
    :raises ValueError: when these are inconsistent.
    """

    labels: Tensor
    outliers: Tensor
    between: Tensor
    pair: Tensor
    alpha: Tensor
    spread: Tensor
    open_pairs: Tensor
    units: Tensor

    def __init__(
        self,
        sites: Sequence[tuple[str, Sequence[int]]],
        assignment: Tensor,
        codes: Codes,
        outliers: Outliers,
        between: Between,
        *,
        zero: bool = False,
        units: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.sites = [(name, torch.Size(shape)) for name, shape in sites]
        self.zero = zero
        self._require_match(assignment, codes, outliers, between)
        self.loc, self.rho = nn.Parameter(codes.loc), nn.Parameter(codes.rho)
        self.outlier_loc, self.outlier_rho = nn.Parameter(outliers.loc), nn.Parameter(outliers.rho)
        self.register_buffer("outliers", outliers.positions)
        self.register_buffer("between", between.positions)
        self.register_buffer("pair", between.pair.to(torch.int32))
        self.register_buffer("alpha", between.alpha)
        self.register_buffer("spread", codes.spread)
        self.register_buffer("open_pairs", None, persistent=False)  # follows from pair
        self._find_places()
        self.register_buffer("labels", label_weights(self._site_labels, assignment, self.outliers, self.between))
        self._counts: dict[bool, tuple[object, list[Tensor]]] = {}
        self.register_buffer("units", self._units() if units is None else units)

    def _require_match(self, assignment: Tensor, codes: Codes, outliers: Outliers, between: Between) -> None:
        k, n = len(codes.loc), sum(shape.numel() for _, shape in self.sites)
        pair, special = between.pair, torch.cat([outliers.positions, between.positions])
        _require(len(assignment) == n, f"{len(assignment)} labels for {n} weights")
        _require(n == 0 or 0 <= int(assignment.min()) <= int(assignment.max()) < k, f"labels outside of 0 to {k - 1}")
        _require(len(special.unique()) == len(special), "a weight is an outlier or between codes twice")
        _require(not len(special) or 0 <= int(special.min()) <= int(special.max()) < n, f"positions outside of {n}")
        _require(
            not len(pair) or 0 <= int(pair.min()) <= int(pair.max()) < k, f"pairs of codes outside of 0 to {k - 1}"
        )

    def _find_places(self) -> None:
        """What the labels of each site mean, and which pairs are open."""
        self._site_labels = labels_by_site([shape for _, shape in self.sites], len(self), self.outliers, self.between)
        self.find_open_pairs()

    def find_open_pairs(self) -> None:
        """Pairs that have not become one code, as positions in ``pair``, and where those of each site are."""
        self.open_pairs = (self.pair[:, 0] != self.pair[:, 1]).nonzero().flatten()
        starts = [site.between.start for site in self._site_labels] + [len(self.between)]
        self._open = slices_between(self.open_pairs, starts)

    def _units(self) -> Tensor:
        now = self.in_plane()
        used = now.weights > 0
        now = now[used] if bool(used.any()) else now
        trace = now.covariances.diagonal(dim1=-2, dim2=-1).sum(-1).median()
        apart = merging.neighbour_distance(now) if len(now) > 1 else trace
        return torch.stack([apart, trace])

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self._find_places()

    def __len__(self) -> int:
        return len(self.loc)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_counts": {}}

    # -------------------------------------------------------------------------------------- as distributions

    def means(self) -> Tensor:
        """m, ``[K]``."""
        if not self.zero:
            return self.loc
        return torch.cat([self.loc.new_zeros(1), self.loc[1:]])

    def scales(self) -> Tensor:
        """s, ``[K]``."""
        return deviations(self.rho)

    def outlier_scales(self) -> Tensor:
        """Standard deviations of the outliers, ``[o]``."""
        return deviations(self.outlier_rho)

    def tables(self, soft: bool = False) -> list[Table]:
        """The Gaussians of every site.

        :param soft: whether a weight between codes is from one of them, with probability alpha; otherwise it is
            ``alpha z_1 + (1 - alpha) z_2`` of independent draws z of both, ``N(alpha m_1 + (1 - alpha) m_2, alpha^2
            s_1^2 + (1 - alpha)^2 s_2^2)``.
        """
        loc, scale, a, pair = self.means(), self.scales(), padded(self.alpha), padded(self.pair).long()
        (m1, m2), (s1, s2) = (v[pair].unbind(1) for v in (loc, scale))
        middle, width = torch.lerp(m2, m1, a), ((a * s1).square() + ((1 - a) * s2).square()).sqrt()
        own_loc, own_scale = self.outlier_loc, self.outlier_scales()
        counts = self.counts(soft)
        tables = []
        for site, open_, count in zip(self._site_labels, self._open, counts, strict=True):
            pairs = None
            if soft and open_.stop > open_.start:
                own = self.open_pairs[open_]
                pairs = Pairs(
                    place=self.between[own] - site.weights.start,
                    codes=pair[own],
                    alpha=a[own],
                    entries=own - site.between.start + site.first_between,
                )
            tables.append(
                Table(
                    loc=torch.cat([loc, own_loc[site.outliers], middle[site.between]]),
                    scale=torch.cat([scale, own_scale[site.outliers], width[site.between]]),
                    labels=self.labels[site.weights],
                    counts=count,
                    pairs=pairs,
                    num_codes=len(loc),
                    codebook=self,
                )
            )
        return tables

    def weights_from_values(self, codes: Tensor, outliers: Tensor) -> list[Tensor]:
        """Values ``[m, *shape]`` of every site when weights share values, and not only Gaussians.

        :param codes: z, ``[m, K]``.
        :param outliers: ``[m, o]``.
        """
        first, second = codes[:, self.pair[:, 0].long()], codes[:, self.pair[:, 1].long()]
        middle = torch.lerp(second, first, self.alpha)
        values = []
        for (_, shape), site in zip(self.sites, self._site_labels, strict=True):
            table = torch.cat([codes, outliers[:, site.outliers], middle[:, site.between]], 1)
            values.append(table.index_select(1, self.labels[site.weights]).view(-1, *shape))
        return values

    def counts(self, soft: bool = False) -> list[Tensor]:
        """For every site, how many weights each entry of its table has: see :class:`~.shared_normal.Table`."""
        states = [(id(v), v._version, v.device) for v in (self.labels, self.pair, self.alpha)]
        versions = (*states, self.loc.dtype)
        known = self._counts.get(soft)
        if known is not None and known[0] == versions:
            return known[1]
        found = []
        with torch.no_grad():
            for site in self._site_labels:
                labels = self.labels[site.weights]
                ones = torch.ones((), dtype=torch.float64, device=labels.device).expand(len(labels))
                counts = ones.new_zeros(site.num_entries).index_add_(0, labels, ones)
                if soft:
                    pair, a = self.pair[site.between].long(), self.alpha[site.between].double()
                    used = counts[site.first_between :].clone()  # 0 for a pair that has become one code
                    counts.index_add_(0, pair[:, 0], a * used).index_add_(0, pair[:, 1], (1 - a) * used)
                    counts[site.first_between :] = 0
                found.append(counts.to(torch.promote_types(self.loc.dtype, torch.float32)))
        self._counts[soft] = versions, found
        return found

    def weights_per_code(self, soft: bool = False) -> Tensor:
        """How many weights each code has, ``[K]`` in float64.

        :param soft: whether weights between two codes count, with alpha for the first and 1 - alpha for the second.
        """
        k = len(self)
        return torch.stack([counts[:k] for counts in self.counts(soft)]).double().sum(0)

    def weights_without_code(self, soft: bool = False) -> Tensor:
        """Number of weights without a code: outliers and, unless ``soft``, weights between codes."""
        k = len(self)
        return torch.stack([counts[k:].sum() for counts in self.counts(soft)]).sum()

    def log_shares(self, soft: bool = False) -> Tensor:
        """log pi of the codebook as a prior, ``[K + 1]``: of weights without a code first, then of each code.

        A code without weights, or nothing without a code, counts as a thousandth of a weight.
        """
        free, held = self.weights_without_code(soft), self.weights_per_code(soft)
        all_ = torch.cat([free.double().reshape(1), held]).clamp_min(1e-3)
        return (all_ / all_.sum()).log().to(self.loc.dtype)

    # ---------------------------------------------------------------------------------------- in training

    def in_plane(self) -> PlaneMixture:
        """The codes as they are now as Gaussians in the plane; weights are shares of the weights, 0 for the dead."""
        held = self.weights_per_code(soft=True)
        points = torch.stack([self.means(), self.scales()], 1).detach()
        return PlaneMixture(held / held.sum().clamp_min(1), points.double(), self.spread.double())

    def merge(
        self,
        *,
        tightness: float = 0.25,
        gradient: Tensor | None = None,
        gradient_limit: float = float("inf"),
        variance_limit: float = float("inf"),
        how: MergeRule = "moment",
    ) -> Tensor:
        """Merges codes by :func:`~pyro_bnn.models.weight_sharing.merging.merge_closest`, in place.

        :param tightness: eta: two codes may merge if their squared Wasserstein distance is below eta times
            ``units[0]``, the median squared distance to the nearest other code before any merger.
        :param gradient: of the loss with respect to (m, s) of each code, ``[K, 2]``.
        :param gradient_limit: see ``merge_closest``; in the units of the loss.
        :param variance_limit: see ``merge_closest``; in units of ``units[1]``, the median trace of the covariances
            before any merger.
        :param how: see :func:`~pyro_bnn.models.weight_sharing.merging.merge_pair`.
        :return: for each code, the index of the code that it now belongs to, ``[K]``.
        :raises ValueError: unless tightness is positive.
        """
        checks.positive("tightness", tightness)
        checks.limit("gradient_limit", gradient_limit)
        checks.limit("variance_limit", variance_limit)
        now = self.in_plane()
        fixed = torch.zeros(len(self), dtype=torch.bool, device=self.loc.device)
        if self.zero:
            fixed[0] = True
        apart, trace = self.units.tolist()
        merged, into = merging.merge_closest(
            now,
            distance=tightness * apart,
            gradient=gradient,
            gradient_limit=gradient_limit,
            variance_limit=variance_limit * trace,
            how=how,
            fixed=fixed,
        )
        self._relabel(into)
        moved = (torch.bincount(into, minlength=len(self)) > 1) & (merged.weights > 0)
        with torch.no_grad():
            self.loc[moved] = merged.means[moved, 0].to(self.loc.dtype)
            self.rho[moved] = rho_of(merged.means[moved, 1].to(self.loc.dtype))
            self.spread[moved] = merged.covariances[moved].to(self.spread.dtype)
        return into

    def _relabel(self, into: Tensor) -> None:
        rest = torch.arange(len(self), max(site.num_entries for site in self._site_labels), device=into.device)
        table = torch.cat([into, rest]).to(torch.int32)
        for part in self.labels.split(2**22):
            part.copy_(table.index_select(0, part))
        self.pair.copy_(into.to(torch.int32)[self.pair.long()])
        self.find_open_pairs()
        # two codes that are one now: a plain member of it
        closed = self.pair[:, 0] == self.pair[:, 1]
        self.labels[self.between[closed]] = self.pair[closed, 0]

    def is_outlier(self) -> Tensor:
        """Which of the outliers have not been absorbed by a code, ``[o]`` of bool."""
        return ~is_code(self.labels[self.outliers], len(self))

    def codes(self) -> Tensor:
        """The code of every weight, int32 ``[n]``; 0 for outliers, the first of the pair between codes."""
        found = torch.where(is_code(self.labels, len(self)), self.labels, 0)
        own = self.labels[self.between]
        found[self.between] = torch.where(is_code(own, len(self)), own, self.pair[:, 0])
        return found

    def __repr__(self) -> str:
        outliers = int(self.is_outlier().sum())
        alive = int((self.weights_per_code(soft=True) > 0).sum())
        return display.call(self, codes=alive, outliers=outliers, weights=len(self.labels), sites=len(self.sites))

    def compact(self) -> Codebook:
        """A codebook of the same weights without dead codes, absorbed outliers, and pairs whose two codes are one."""
        out, mid = self.is_outlier(), ~is_code(self.labels[self.between], len(self))
        used = torch.zeros(len(self), dtype=torch.bool, device=self.labels.device)
        used[self.labels[is_code(self.labels, len(self))].long()] = True
        used[self.pair[mid].long().flatten()] = True
        if self.zero or not bool(used.any()):
            used[0] = True
        new = used.cumsum(0).to(torch.int32) - 1
        return Codebook(
            self.sites,
            new[self.codes().long()].clamp_min(0),
            Codes(self.loc.detach()[used], self.rho.detach()[used], self.spread[used]),
            Outliers(self.outliers[out], self.outlier_loc.detach()[out], self.outlier_rho.detach()[out]),
            Between(self.between[mid], new[self.pair[mid].long()], self.alpha[mid]),
            zero=self.zero,
            units=self.units,
        )

    def parameters_of(self, model: BayesianNetwork, random: Iterable[str]) -> list[str]:
        """The names of the parameters of the model's network that correspond to the sites.

        :param random: the names of the random parameters.
        :raises ValueError: when the codebook is for another network.
        """
        parameters = model.core().parameters_by_name()
        known = {model.site(name): name for name in random}
        for site, shape in self.sites:
            if site not in known:
                raise ValueError(f"the codebook is for another network: {site!r} is no random parameter of this one")
            found = parameters[known[site]].shape
            if found != shape:
                raise ValueError(
                    f"the codebook is for another network: {site!r} has shape {tuple(shape)} there and {tuple(found)} "
                    "in this one"
                )
        return [known[site] for site, _ in self.sites]

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names."""
        found = [(name, cast(nn.Parameter, self._parameters[name])) for name in ("loc", "rho")]
        if len(self.outliers):
            found += [(name, cast(nn.Parameter, self._parameters[name])) for name in ("outlier_loc", "outlier_rho")]
        return found


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"the parts of the codebook are inconsistent: {what}")
