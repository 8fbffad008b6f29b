"""The guide in which all weights share K Gaussians, except for outliers, which have their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.models.dense import Dense, MeanFieldGuide
from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.from_weights import codebook_from_weights
from pyro_bnn.models.weight_sharing.model import WeightSharing, weights_to_code
from pyro_bnn.models.weight_sharing.shared_normal import SharedNormal
from pyro_bnn.models.weight_sharing.shared_weights import SharedWeights
from pyro_bnn.models.weight_sharing.storage.compression import compression_report
from pyro_bnn.models.weight_sharing.storage.packed_codebook import describe_codebook, pack_codebook, unpack_codebook
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import Form
from pyro_bnn.program.positive import SMALLEST_SCALE, positive
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CodeSampling = Literal["codebook", "mixture"]


@storable
class CodebookGuide(MixtureGuide):
    """K Gaussians for all weights, separate ones for outliers, and a label for every weight.

    A weight with code a(i) is ``w_i = m_a(i) + s_a(i) eps_i`` with independent noise eps_i, so that the KL divergence
    is ``sum_k n_k KL(N(m_k, s_k^2) || p)`` and only O(K) parameters are trained. A weight between two codes is, with
    ``sampling="codebook"``, ``alpha z_1 + (1 - alpha) z_2`` for draws z from both (alpha blending); with
    ``sampling="mixture"``, it has one of the two codes, the first with probability alpha. Biases, other parameters that
    do not share codes, and scales of the prior are factorised as in :class:`MeanFieldGuide`.

    :param model: a :class:`WeightSharing` (or any :class:`Dense`).
    :param codes: K; or a :class:`Codebook` for the sites of the coded weights.
    :param sampling: see above.
    :param blend: share of the weights that lie between two codes.
    :param outliers: largest share of the weights that have their own Gaussians.
    :param init_scale: starting standard deviation of every weight; its mean is the value in the network.
    :param coded: the random parameters that share codes, see :func:`~pyro_bnn.selection.select_parameters`; by default
        the weights of products, convolutions and embedding tables.
    :param options: further options of :func:`~pyro_bnn.models.weight_sharing.from_weights.codebook_from_weights`:
        ``magnitude``, ``gradient``, ``snr``, ``smallest``, ``zero``, ``rate``, ``distance``, ``iterations``, ``seed``.
    :raises ValueError: for NaN in the weights, more codes than distinct weights, or numbers out of range.
    """

    @one_at_a_time
    def __init__(
        self,
        model: Dense,
        codes: int | Codebook = 256,
        *,
        sampling: CodeSampling = "codebook",
        blend: float = 0.01,
        outliers: float = 0.005,
        init_scale: float = 1e-2,
        coded: Select | None = None,
        **options: Any,
    ) -> None:
        if isinstance(model, SharedWeights):
            raise TypeError("the weights of this model already share their values: use the guide model.shared_guide()")
        if not isinstance(model, Dense):
            raise TypeError(
                f"{type(self).__name__} takes a pyro_bnn.models.WeightSharing, got {type(model).__name__}: for other "
                "models use pyro_bnn.models.MeanFieldGuide"
            )
        if sampling == "shared":
            raise ValueError(
                "sampling='shared' is a property of the model: SharedWeights(..., codebook=guide.book) of a guide with "
                "sampling='codebook', and its shared_guide()"
            )
        if sampling not in get_args(CodeSampling):
            raise ValueError(f"sampling={sampling!r}: expected one of {', '.join(map(repr, get_args(CodeSampling)))}")
        if checks.positive("init_scale", init_scale) <= SMALLEST_SCALE:
            raise ValueError(f"init_scale={init_scale!r}: expected a standard deviation above {SMALLEST_SCALE}")
        checks.fraction("blend", blend)
        checks.fraction("outliers", outliers)
        parameters = model.core().parameters_by_name()
        if isinstance(codes, Codebook):
            book = codes
            names = book.parameters_of(model, model.random)
        else:
            names = weights_to_code(model, coded)
            _require_finite({name: parameters[name] for name in names})
            loc = torch.cat([parameters[name].detach().flatten() for name in names])
            sites = [(model.site(name), parameters[name].shape) for name in names]
            scale = torch.full_like(loc, init_scale)
            book = codebook_from_weights(sites, loc, scale, codes, blend=blend, outliers=outliers, **options)
        held = {model.site(name) for name in names}
        super().__init__(model, own=lambda site: site.name not in held)
        self.start_scales(init_scale)
        self.sampling = sampling
        self._names = names
        self._order = [site.name for site in model.sites() if site.role == "weight"]  # as the model samples them
        self.codebook = book
        if isinstance(model, WeightSharing):
            model.take_codebook(book, sampling == "mixture")

    @classmethod
    def from_network(cls, model: Dense, codes: int = 256, **options: Any) -> CodebookGuide:
        """A guide from the weights of the model's network, which was trained as a deterministic network.

        :param options: as for :class:`CodebookGuide`.
        """
        return cls(model, codes, **options)

    @classmethod
    def from_mean_field(cls, model: Dense, guide: MeanFieldGuide, codes: int = 256, **options: Any) -> CodebookGuide:
        """A guide from a trained :class:`MeanFieldGuide` of the same model (or of a model with the same sites).

        :param options: as for :class:`CodebookGuide`; ``init_scale`` is not used, because ``guide`` provides the
            standard deviation of every weight.
        :raises TypeError: for a guide that is not a :class:`MeanFieldGuide`.
        :raises ValueError: when the guide is a mixture of several components, or has other sites.
        """
        if not isinstance(guide, MeanFieldGuide):
            raise TypeError(f"guide must be a MeanFieldGuide, got {type(guide).__name__}")
        if guide.num_members != 1:
            raise ValueError(f"the guide is a mixture of {guide.num_members} components: a codebook is made from one")
        loc, rho = guide.coordinates(), guide.widths()
        shapes = {site.name: site.shape for site in model.sites()}
        wrong = next((n for n, s in shapes.items() if n not in loc or loc[n].shape[1:] != s), None)
        if wrong is not None:
            raise ValueError(
                f"the guide is for another model: it has no site {wrong!r} of shape {tuple(shapes[wrong])}. A "
                "hierarchical prior adds latent sites, and needs a MeanFieldGuide trained with this prior"
            )
        names = weights_to_code(model, options.pop("coded", None))
        sites = [(model.site(n), shapes[model.site(n)]) for n in names]
        _require_finite({site: loc[site] for site, _ in sites} | {f"rho of {site}": rho[site] for site, _ in sites})
        means = torch.cat([loc[site].flatten() for site, _ in sites])
        scales = positive(torch.cat([rho[site].flatten() for site, _ in sites]))
        own = {name: options.pop(name) for name in ("sampling", "init_scale") if name in options}
        made = cls(model, codebook_from_weights(sites, means, scales, codes, **options), **own)
        with torch.no_grad():
            for mine, theirs in ((made.coordinates(), loc), (made.widths(), rho)):
                for name, value in mine.items():
                    value.copy_(theirs[name])
        return made

    def state_was_set(self) -> None:
        self.codebook.find_open_pairs()

    @property
    def book(self) -> Codebook:
        """The codebook, read past Pyro's attribute hooks."""
        book = self._modules["codebook"]
        assert isinstance(book, Codebook)
        return book

    def like(self) -> Tensor:
        return self.book.loc

    def repr_arguments(self) -> dict[str, object]:
        return {"sampling": self.sampling, "codebook": self.book} | super().repr_arguments()

    def forms(self) -> dict[str, Form]:
        return dict.fromkeys(self._names, "codebook")

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return super()._named() + [(f"codebook.{name}", p) for name, p in self.book.trained()]

    def _weights(self, take: Callable[[Tensor], Tensor]) -> dict[str, dist.TorchDistribution]:
        found = dict.fromkeys(self._order) | super()._weights(take)
        book = self.book
        for (name, shape), table in zip(book.sites, book.tables(self.sampling == "mixture"), strict=True):
            found[name] = SharedNormal(table, shape)
        return {name: d for name, d in found.items() if d is not None}

    def means_of_network(self) -> dict[str, Tensor]:
        """Posterior means of the coded weights, by the name of the parameter of the network."""
        with torch.no_grad():
            tables = self.book.tables(self.sampling == "mixture")
            return {
                name: SharedNormal(table, shape).mean.contiguous()
                for name, (_, shape), table in zip(self._names, self.book.sites, tables, strict=True)
            }

    # --------------------------------------------------------------------------------------------- storage

    def arguments(self) -> dict[str, object]:
        return {"sampling": self.sampling, "codebook": describe_codebook(self.book.compact())}

    def tensors(self) -> dict[str, Tensor]:
        own = {n: v.detach() for n, v in self.named_parameters() if not n.startswith("codebook.")}
        return own | {f"codebook.{n}": v for n, v in pack_codebook(self.book.compact()).items()}

    @classmethod
    def from_tensors(cls, model: Any, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> CodebookGuide:
        packed = {n.removeprefix("codebook."): v for n, v in tensors.items() if n.startswith("codebook.")}
        device = model.like().device
        book = unpack_codebook(arguments["codebook"], {n: v.to(device) for n, v in packed.items()})
        guide = cls(model, book, sampling=arguments["sampling"])
        own = {n: v for n, v in tensors.items() if not n.startswith("codebook.")}
        for name, parameter in guide.named_parameters():
            if name.startswith("codebook."):
                own[name] = parameter.detach()
        guide._take_parameters(own)
        return guide

    def summaries(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """The codes: their means, their standard deviations and the number of weights of each."""
        columns = (self.book.means(), self.book.scales(), self.book.weights_per_code())
        return {
            name: (("code",), values.detach())
            for name, values in zip(("code_mean", "code_sd", "code_weights"), columns, strict=True)
        }

    def figures(self) -> dict[str, Figure]:
        """Pictures of the codes, under words that say what is to be seen."""
        from pyro_bnn.models.weight_sharing.plots import (
            plot_plane,
            plot_weights_per_code,
        )  # matplotlib takes time to import

        held = self.book.weights_per_code(soft=True)
        alive, most = int((held > 0).sum()), float(held.max() / held.sum())
        return {
            f"Plane of {alive} codes, by mean and standard deviation": plot_plane(self.book),
            f"Weights of each code; the most frequent one has {most:.1%} of them": plot_weights_per_code(self.book),
        }

    def compression_report(self) -> dict[str, Any]:
        """The memory that the codebook saves; see ``compression_report`` in :mod:`.storage.compression`."""
        rest = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("codebook."))
        return compression_report(self.book.compact()) | {"other_trainable": rest}


def _require_finite(values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(
                f"{name!r} holds {bad} NaN or infinite values: a codebook needs the weights of a network that trained"
            )
