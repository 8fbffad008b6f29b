"""A codebook: K Gaussians that all weights share, outliers with Gaussians of their own, and which weight has which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.guide import SMALLEST_SCALE
from pyro_bnn.models.weight_sharing import clustering, merging
from pyro_bnn.models.weight_sharing.merging import Merge
from pyro_bnn.models.weight_sharing.plane import PlaneMixture
from pyro_bnn.models.weight_sharing.shared_normal import Pairs, Table


def inverse_scale(scale: Tensor) -> Tensor:
    """rho with ``softplus(rho) + 1e-7 = scale``, computed in float64."""
    value = (scale.double() - SMALLEST_SCALE).clamp_min(1e-30)
    return (value + (-(-value).expm1()).log()).to(scale.dtype)


class Codebook(nn.Module):
    """Codes ``N(m_k, s_k^2)``, outliers with their own, weights between two codes, and a label for every weight.

    Weights are those of several sites, one after the other. A label below K is a code; others count the outliers of the
    weight's own site, and then its weights between codes. The shapes of all tensors stay as they are while codes merge
    (a code without weights is dead), so that optimisers and checkpoints go on; :meth:`compact` drops what is dead.

    :param sites: ``(name, shape)`` of each site.
    :param loc, scale: m and s, ``[K]``.
    :param codes: the code of each weight, ``[n]``; of outliers and of weights between codes it does not matter.
    :param outliers: their sorted positions, ``[o]``, with ``outlier_loc`` and ``outlier_scale``.
    :param between: sorted positions of the weights between two codes, ``[e]``, with their ``pair`` ``[e, 2]`` and
        ``alpha`` ``[e]``, the part of the first, a multiple of 1 / 255.
    :param spread: covariances of the codes in the plane of (mean, deviation), ``[K, 2, 2]``, of the weights that they
        were made of: what merging goes by.
    :param zero: whether code 0 keeps the mean 0.
    :param units: the units of merging, ``[2]`` in float64: the median over codes of the squared Wasserstein distance to
        the nearest other one, and of the trace of the covariances. Those of these codes, unless given; they stay while
        codes merge.
    :raises ValueError: when these do not belong together.
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
        loc: Tensor,
        rho: Tensor,
        codes: Tensor,
        outliers: Tensor,
        outlier_loc: Tensor,
        outlier_rho: Tensor,
        between: Tensor,
        pair: Tensor,
        alpha: Tensor,
        spread: Tensor,
        zero: bool = False,
        units: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.sites = [(name, torch.Size(shape)) for name, shape in sites]
        self.zero = zero
        k, n = len(loc), sum(shape.numel() for _, shape in self.sites)
        _require(len(codes) == n, f"{len(codes)} labels for {n} weights")
        _require(n == 0 or 0 <= int(codes.min()) <= int(codes.max()) < k, f"labels outside of 0 to {k - 1}")
        special = torch.cat([outliers, between])
        _require(len(special.unique()) == len(special), "a weight is an outlier or between codes twice")
        _require(not len(special) or 0 <= int(special.min()) <= int(special.max()) < n, f"positions outside of {n}")
        _require(
            not len(pair) or 0 <= int(pair.min()) <= int(pair.max()) < k, f"pairs of codes outside of 0 to {k - 1}"
        )
        self.loc, self.rho = nn.Parameter(loc), nn.Parameter(rho)
        self.outlier_loc, self.outlier_rho = nn.Parameter(outlier_loc), nn.Parameter(outlier_rho)
        starts = [0]
        for _, shape in self.sites:
            starts.append(starts[-1] + shape.numel())
        self._starts = starts
        for name, value in (
            *(("outliers", outliers), ("between", between), ("pair", pair.to(torch.int32))),
            *(("alpha", alpha), ("spread", spread)),
        ):
            self.register_buffer(name, value)
        self.register_buffer("open_pairs", None, persistent=False)  # follows from pair
        self._find_places()
        labels = codes.to(torch.int32).clone()
        for i in range(len(self.sites)):
            o, e = self._range(self._outlier_starts, i), self._range(self._between_starts, i)
            entries = torch.arange(k, k + len(o) + len(e), dtype=torch.int32, device=labels.device)
            labels[outliers[o.start : o.stop]] = entries[: len(o)]
            labels[between[e.start : e.stop]] = entries[len(o) :]
        self.register_buffer("labels", labels)
        self._counts: dict[Any, Any] = {}
        self.register_buffer("units", self._units() if units is None else units)

    def _find_places(self) -> None:
        """Where the outliers of each site begin among all, and its weights between codes, and which pairs are open."""
        ends = torch.tensor(self._starts, device=self.outliers.device)
        self._outlier_starts = torch.searchsorted(self.outliers, ends).tolist()
        self._between_starts = torch.searchsorted(self.between, ends).tolist()
        self._find_open_pairs()

    def _find_open_pairs(self) -> None:
        """Pairs that have not become one code, as positions in ``pair``, and where those of each site begin."""
        self.open_pairs = (self.pair[:, 0] != self.pair[:, 1]).nonzero().flatten()
        starts = torch.tensor(self._between_starts, device=self.open_pairs.device)
        self._open_starts = torch.searchsorted(self.open_pairs, starts).tolist()

    def _units(self) -> Tensor:
        now = self.mixture()
        used = now.weights > 0
        now = PlaneMixture(*(v[used] if bool(used.any()) else v for v in (now.weights, now.means, now.covariances)))
        trace = now.covariances.diagonal(dim1=-2, dim2=-1).sum(-1).median()
        apart = merging.neighbour_distance(now) if len(now) > 1 else trace
        return torch.stack([apart, trace])

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._find_places()

    @staticmethod
    def _range(starts: list[int], i: int) -> range:
        return range(starts[i], starts[i + 1])

    def __len__(self) -> int:
        return len(self.loc)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_counts": {}}

    @classmethod
    def fit(
        cls,
        sites: Sequence[tuple[str, Sequence[int]]],
        loc: Tensor,
        scale: Tensor,
        codes: int = 256,
        *,
        outliers: float = 0.005,
        magnitude: float | None = None,
        gradient: Tensor | None = None,
        snr: float | None = None,
        smallest: int = 20,
        between: float = 0.01,
        zero: bool = False,
        rate: float = 0.0,
        distance: clustering.Distance = "wasserstein",
        iterations: int = 20,
        seed: int = 0,
    ) -> Codebook:
        """All stages up to training: outliers, EM, labels, weights between codes.

        :param loc, scale: mean and standard deviation of every weight, ``[n]``.
        :param codes: K, at most.
        :param outliers: largest share of the weights that become outliers, by all rules together. Half of it is for
            those of :func:`~pyro_bnn.models.weight_sharing.clustering.find_outliers`, which has the rules ``magnitude``,
            ``gradient`` and ``snr``; then members of codes with at most ``smallest`` weights follow, the smallest codes
            first.
        :param between: share of the others that two codes hold together.
        :param zero: whether one code has its mean fixed at 0.
        :param rate, distance: of :func:`~pyro_bnn.models.weight_sharing.clustering.quantise`.
        :param iterations, seed: of :func:`~pyro_bnn.models.weight_sharing.clustering.fit_plane`.
        :raises ValueError: for NaN, numbers out of range, or more codes than distinct weights.
        """
        if not bool((scale > 0).all()):  # NaN too
            raise ValueError("standard deviations of weights must be positive and finite numbers")
        if codes > loc.numel():
            raise ValueError(
                f"codes={codes}, but there are only {loc.numel()} weights to share them: ask for fewer codes"
            )
        if not bool(torch.isfinite(loc).all()):
            raise ValueError(f"{int((~torch.isfinite(loc)).sum())} means of weights are NaN or infinite")
        rules: dict[str, Any] = {"magnitude": magnitude, "gradient": gradient, "snr": snr}
        clustering.require_share("outliers", outliers)
        out = clustering.find_outliers(loc, scale, **rules, cap=outliers / 2)
        inside = _others(out, loc.numel())
        points = torch.stack([loc, scale], 1)[inside]
        points = points.to(torch.promote_types(loc.dtype, torch.float32))
        mixture = clustering.fit_plane(points, codes, zero=zero, iterations=iterations, seed=seed)
        mixture, labels = clustering.quantise(
            points, mixture, rate, distance=distance, zero=zero, iterations=3 if distance == "wasserstein" else 20
        )
        small = clustering.in_small_codes(labels, codes, smallest, int(outliers * loc.numel() + 1e-6) - len(out), zero)
        out = torch.cat([out, inside[small]]).sort().values
        stay = _others(small, len(points))
        inside, points, labels = inside[stay], points[stay], labels[stay]
        index, pair, alpha = clustering.between_codes(points, labels, mixture, between)
        alpha = ((alpha * 255).round() / 255).to(loc.dtype)
        whole = torch.zeros(loc.numel(), dtype=torch.int32, device=loc.device)
        whole[inside] = labels
        centres = mixture.means.to(loc.dtype)
        book = cls(
            *(sites, centres[:, 0].clone(), inverse_scale(centres[:, 1]), whole),
            *(out, loc[out].clone(), inverse_scale(scale[out])),
            *(inside[index], pair, alpha, mixture.covariances.to(loc.dtype)),
            zero=zero,
        )
        return book.compact()

    # -------------------------------------------------------------------------------------- as distributions

    def means(self) -> Tensor:
        """m, ``[K]``."""
        if not self.zero:
            return self.loc
        return torch.cat([self.loc.new_zeros(1), self.loc[1:]])

    def scales(self) -> Tensor:
        """s, ``[K]``."""
        return _scales(self.rho)

    def outlier_scales(self) -> Tensor:
        """Standard deviations of the outliers, ``[o]``."""
        return _scales(self.outlier_rho)

    def tables(self, soft: bool = False) -> list[Table]:
        """The Gaussians of every site.

        :param soft: whether a weight between codes is from one of them, with probability alpha; otherwise it is
            ``alpha z_1 + (1 - alpha) z_2`` of independent draws z of both, ``N(alpha m_1 + (1 - alpha) m_2, alpha^2
            s_1^2 + (1 - alpha)^2 s_2^2)``.
        """
        loc, scale, a, pair = self.means(), self.scales(), _padded(self.alpha), _padded(self.pair).long()
        (m1, m2), (s1, s2) = (v[pair].unbind(1) for v in (loc, scale))
        middle, width = torch.lerp(m2, m1, a), ((a * s1).square() + ((1 - a) * s2).square()).sqrt()
        own_loc, own_scale = self.outlier_loc, self.outlier_scales()
        counts = self.counts(soft)
        tables = []
        for i in range(len(self.sites)):
            o, e = self._range(self._outlier_starts, i), self._range(self._between_starts, i)
            o_, e_ = slice(o.start, o.stop), slice(e.start, e.stop)
            pairs = None
            open_ = self._range(self._open_starts, i)
            if soft and len(open_):
                own = self.open_pairs[open_.start : open_.stop]
                entries = own - e.start + len(loc) + len(o)
                pairs = Pairs(self.between[own] - self._starts[i], pair[own], a[own], entries)
            tables.append(
                Table(
                    torch.cat([loc, own_loc[o_], middle[e_]]),
                    torch.cat([scale, own_scale[o_], width[e_]]),
                    self.labels[self._starts[i] : self._starts[i + 1]],
                    counts[i],
                    *(pairs, len(loc), self),
                )
            )
        return tables

    def expand(self, codes: Tensor, outliers: Tensor) -> list[Tensor]:
        """Values ``[m, *shape]`` of every site when weights share values, and not only Gaussians.

        :param codes: z, ``[m, K]``.
        :param outliers: ``[m, o]``.
        """
        first, second = codes[:, self.pair[:, 0].long()], codes[:, self.pair[:, 1].long()]
        middle = torch.lerp(second, first, self.alpha)
        values = []
        for i, (_, shape) in enumerate(self.sites):
            o, e = self._range(self._outlier_starts, i), self._range(self._between_starts, i)
            table = torch.cat([codes, outliers[:, o.start : o.stop], middle[:, e.start : e.stop]], 1)
            labels = self.labels[self._starts[i] : self._starts[i + 1]]
            values.append(table.index_select(1, labels).view(-1, *shape))
        return values

    def counts(self, soft: bool = False) -> list[Tensor]:
        """For every site, how many weights each entry of its table has: see :class:`~.shared_normal.Table`."""
        states = [(id(v), v._version, v.device) for v in (self.labels, self.pair, self.alpha)]
        versions = (*states, self.loc.dtype)
        known = self._counts.get(soft)
        if known is not None and known[0] == versions:
            found: list[Tensor] = known[1]
            return found
        found = []
        k = len(self)
        with torch.no_grad():
            for i in range(len(self.sites)):
                o, e = self._range(self._outlier_starts, i), self._range(self._between_starts, i)
                labels = self.labels[self._starts[i] : self._starts[i + 1]]
                ones = torch.ones((), dtype=torch.float64, device=labels.device).expand(len(labels))
                counts = ones.new_zeros(k + len(o) + len(e)).index_add_(0, labels, ones)
                if soft:
                    pair, a = self.pair[e.start : e.stop].long(), self.alpha[e.start : e.stop].double()
                    used = counts[k + len(o) :].clone()  # 0 for a pair that has become one code
                    counts.index_add_(0, pair[:, 0], a * used).index_add_(0, pair[:, 1], (1 - a) * used)
                    counts[k + len(o) :] = 0
                found.append(counts.to(torch.promote_types(self.loc.dtype, torch.float32)))
        self._counts[soft] = versions, found
        return found

    def usage(self, soft: bool = False) -> tuple[Tensor, Tensor]:
        """How many weights each code has, ``[K]``, and how many have no code (outliers, Gaussians between codes)."""
        counts = self.counts(soft)
        k = len(self)
        return torch.stack([c[:k] for c in counts]).double().sum(0), torch.stack([c[k:].sum() for c in counts]).sum()

    def log_shares(self, soft: bool = False) -> Tensor:
        """log pi of the codebook as a prior, ``[K + 1]``: of weights without a code first, then of each code.

        A code without weights, or nothing without a code, counts as a thousandth of a weight.
        """
        held, free = self.usage(soft)
        all_ = torch.cat([free.double().reshape(1), held]).clamp_min(1e-3)
        return (all_ / all_.sum()).log().to(self.loc.dtype)

    # ---------------------------------------------------------------------------------------- in training

    def mixture(self) -> PlaneMixture:
        """The codes as they are now as Gaussians in the plane; weights are shares of the weights, 0 for the dead."""
        held, _ = self.usage(soft=True)
        points = torch.stack([self.means(), self.scales()], 1).detach()
        return PlaneMixture(held / held.sum().clamp_min(1), points.double(), self.spread.double())

    def merge(
        self,
        *,
        tightness: float = 0.25,
        gradient: Tensor | None = None,
        gradient_limit: float = float("inf"),
        variance_limit: float = float("inf"),
        how: Merge = "moment",
    ) -> Tensor:
        """Merges codes by :func:`~pyro_bnn.models.weight_sharing.merging.merge_codes`, in place.

        :param tightness: eta: codes merge below a squared Wasserstein distance of eta times the median over codes of
            that to the nearest other one, as it was before any had merged (``units``).
        :param gradient: of the loss with respect to (m, s) of each code, ``[K, 2]``.
        :param gradient_limit: see there; in the units of the loss.
        :param variance_limit: in units of the median trace of the codes' covariances, likewise.
        :return: for each code the one that it is now part of, ``[K]``.
        :raises ValueError: unless tightness is positive.
        """
        if not tightness > 0:
            raise ValueError(f"tightness={tightness!r}: expected a positive share of the distance between codes")
        now = self.mixture()
        fixed = torch.zeros(len(self), dtype=torch.bool, device=self.loc.device)
        if self.zero:
            fixed[0] = True
        apart, trace = self.units.tolist()
        merged, into = merging.merge_codes(
            *(now,),
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
            self.rho[moved] = inverse_scale(merged.means[moved, 1].to(self.loc.dtype))
            self.spread[moved] = merged.covariances[moved].to(self.spread.dtype)
        return into

    def _relabel(self, into: Tensor) -> None:
        most = len(self) + max(
            (o1 - o0 + e1 - e0)
            for o0, o1, e0, e1 in zip(
                *(self._outlier_starts[:-1], self._outlier_starts[1:]),
                *(self._between_starts[:-1], self._between_starts[1:]),
                strict=True,
            )
        )
        rest = torch.arange(len(self), most, device=into.device)
        table = torch.cat([into, rest]).to(torch.int32)
        for part in self.labels.split(2**22):
            part.copy_(table.index_select(0, part))
        self.pair.copy_(into.to(torch.int32)[self.pair.long()])
        self._find_open_pairs()
        # two codes that are one now: a plain member of it
        index = self.between[self.pair[:, 0] == self.pair[:, 1]]
        code = self.pair[self.pair[:, 0] == self.pair[:, 1], 0]
        self.labels[index] = code

    def codes(self) -> Tensor:
        """The code of every weight, int32 ``[n]``; 0 for outliers, the first of the pair between codes."""
        found = torch.where(self.labels < len(self), self.labels, 0)
        found[self.between] = torch.where(
            self.labels[self.between] < len(self), self.labels[self.between], self.pair[:, 0]
        )
        return found

    def __repr__(self) -> str:
        outliers = int((self.labels[self.outliers] >= len(self)).sum())
        alive = int((self.usage(soft=True)[0] > 0).sum())
        return display.call(self, codes=alive, outliers=outliers, weights=len(self.labels), sites=len(self.sites))

    def compact(self) -> Codebook:
        """The same weights without dead codes, outliers that a code has absorbed, and pairs of one code."""
        k = len(self)
        out, mid = (self.labels[v] >= k for v in (self.outliers, self.between))
        used = torch.zeros(k, dtype=torch.bool, device=self.labels.device)
        used[self.labels[self.labels < k].long()] = True
        used[self.pair[mid].long().flatten()] = True
        if self.zero:
            used[0] = True
        if not bool(used.any()):
            used[0] = True
        new = used.cumsum(0).to(torch.int32) - 1
        codes = self.codes()
        codes = new[codes.long()].clamp_min(0)
        return Codebook(
            *(self.sites, self.loc.detach()[used], self.rho.detach()[used], codes),
            *(self.outliers[out], self.outlier_loc.detach()[out], self.outlier_rho.detach()[out]),
            *(self.between[mid], new[self.pair[mid].long()], self.alpha[mid], self.spread[used]),
            zero=self.zero,
            units=self.units,
        )

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are trained, with their names."""
        found = [(name, cast(nn.Parameter, self._parameters[name])) for name in ("loc", "rho")]
        if len(self.outliers):
            found += [(name, cast(nn.Parameter, self._parameters[name])) for name in ("outlier_loc", "outlier_rho")]
        return found


def _scales(rho: Tensor) -> Tensor:
    """``softplus(rho) + 1e-7``, the same to the last bit wherever in a tensor a number stands.

    Processors round what is left over after whole vectors in another way; with padding there are only whole vectors.
    """
    return F.softplus(_padded(rho))[: len(rho)] + SMALLEST_SCALE


def _padded(value: Tensor) -> Tensor:
    rest = -len(value) % 64
    return torch.cat([value, value.new_zeros((rest, *value.shape[1:]))]) if rest else value


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"these do not make a codebook: {what}")


def _others(index: Tensor, n: int) -> Tensor:
    """The sorted positions below n that are not in ``index``."""
    keep = torch.ones(n, dtype=torch.bool, device=index.device)
    keep[index] = False
    return keep.nonzero().flatten()
