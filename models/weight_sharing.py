"""Stochastic weight sharing: all weights share K Gaussians (Lin et al., AISTATS 2025, arXiv 2505.17856)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.guide import SMALLEST_SCALE, MixtureGuide
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.model import storable
from pyro_bnn.models import coding
from pyro_bnn.models.codebook import Codebook, inverse_scale
from pyro_bnn.models.dense import Dense, MeanFieldGuide, list_sites, sample_weights
from pyro_bnn.models.shared_normal import SharedNormal
from pyro_bnn.network import Select, select_parameters
from pyro_bnn.priors import GaussianMixture, Normal, Prior, PriorLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Sampling = Literal["codebook", "mixture"]


@storable
class WeightSharing(Dense):
    """Pyro model ``w ~ prior, y ~ likelihood(net_w(x))`` over the weights themselves: a :class:`Dense` by its own name.

    That weights share Gaussians is a property of the guide; under NUTS or another guide this is the dense network. With
    the prior :class:`~pyro_bnn.priors.GaussianMixture` without components, the codebook of the guide is the prior too.

    With ``shared``, weights share their values, as in the network of Lin et al.: the sites are ``codes`` [K] and
    ``outliers`` [o] in place of the coded weights, ``w_i = z_a(i)``, and ``alpha z_1 + (1 - alpha) z_2`` between codes.
    Such a posterior has rank K, and no finite KL divergence from a prior over all weights: the prior is one of the
    codes. Any guide or kernel is for it; :meth:`shared_guide` is that of the paper.

    :param shared: a codebook (``guide.book`` of a :class:`CodebookGuide` for the same network), whose labels stay.
    :param net, likelihood, num_data, prior, select, options: as for :class:`Dense`. In a mapping of priors, patterns
        match ``codes`` and ``outliers`` where weights are shared.
    :raises ValueError: as :class:`Dense`, or when the codebook is for another network.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        prior: PriorLike = Normal(0.0, 1.0),
        select: Select | None = None,
        shared: Codebook | None = None,
        **options: Any,
    ) -> None:
        # priors of shared weights are those of codes, which are resolved below
        given = prior if shared is None else Normal(0.0, 1.0)
        super().__init__(net, likelihood, num_data, prior=given, select=select, **options)
        self.prior = prior
        self._coded: list[str] = []
        if shared is not None:
            self._share(shared.compact().to(self.like()))
        self._of_codes = [n for n, p in self.priors.items() if isinstance(p, GaussianMixture) and p.of_codes]
        self._codebook: list[tuple[Codebook, bool]] = []  # a list, as a module would be a submodule here

    def _share(self, book: Codebook) -> None:
        self._coded = _names_of(self, book)
        self._modules["shared"] = book.requires_grad_(False)
        taken = [name for name in ("codes", "outliers") if name in self.random]
        if taken:
            raise ValueError(
                f"the network has a parameter of its own named {taken[0]!r}, as a site of shared weights is"
            )
        likes = self._likes()
        self.priors = {name: priors.resolve(self.prior, (name,), like) for name, like in likes.items()}
        self._sites = list_sites(self, self.priors, likes)
        own = next((n for n, p in self.priors.items() if isinstance(p, GaussianMixture) and p.of_codes), None)
        if own is not None:
            raise ValueError(
                f"the prior of {own!r} is GaussianMixture() of the codes themselves: give it locs and scales"
            )

    def _likes(self) -> dict[str, Tensor]:
        """Tensors with the shapes of the sites where values are shared, at their starting values."""
        book, parameters = self._modules["shared"], self.core().parameters_by_name()
        assert isinstance(book, Codebook)
        likes = {"codes": book.means().detach()}
        if len(book.outliers):
            likes["outliers"] = book.outlier_loc.detach()
        return likes | {name: parameters[name].detach() for name in self.random if name not in self._coded}

    def shared_guide(self, start: CodebookGuide | None = None, *, init_scale: float = 1e-2) -> MeanFieldGuide:
        """The guide of Lin et al.: the first coordinate of ``z_k ~ N(c_k, Sigma_k)`` in the plane; own for outliers.

        :param start: where what is not shared, as biases, begins: at its Gaussians there, or else at the values of the
            network with the standard deviation ``init_scale``.
        :raises ValueError: when the weights of this model are not shared.
        """
        book = self._modules.get("shared")
        if not isinstance(book, Codebook):
            raise ValueError("shared_guide() is for a model with shared weights: WeightSharing(..., shared=guide.book)")
        guide = MeanFieldGuide(self, init_scale=init_scale)
        widths = guide.widths()
        with torch.no_grad():
            widths[self.site("codes")].copy_(inverse_scale(book.spread[:, 0, 0].sqrt()))
            if len(book.outliers):
                widths[self.site("outliers")].copy_(book.outlier_rho)
            if start is not None:
                for mine, theirs in ((guide.coordinates(), start.coordinates()), (widths, start.widths())):
                    for name in mine.keys() & theirs.keys():
                        mine[name].copy_(theirs[name])
        return guide

    def function(self, x: Any, latents: dict[str, Tensor], size: int) -> Tensor:
        book = self._modules.get("shared")
        if not isinstance(book, Codebook):
            return super().function(x, latents, size)
        lead = self.lead_shape(latents)
        plates = lead + (1,) * (-self.members_dim - 1)

        likes = self._likes()

        def members(name: str) -> Tensor:
            shape = likes[name].shape
            return latents[self.site(name)].expand(plates + shape).reshape((-1,) + shape)

        z = members("codes")
        outliers = members("outliers") if "outliers" in likes else z[:, :0]
        weights = dict(zip(self._coded, book.expand(z, outliers), strict=True))
        weights |= {name: members(name) for name in likes if name not in ("codes", "outliers")}
        return self.unfold(self.core().explicit(x, weights, self.chunk_size), lead)

    def arguments(self) -> dict[str, Any]:
        book = self._modules.get("shared")
        shared = {"shared": coding.describe(book)} if isinstance(book, Codebook) else {}
        return super().arguments() | shared

    def tensors(self) -> dict[str, Tensor]:
        book = self._modules.get("shared")
        return coding.encode(book) if isinstance(book, Codebook) else {}

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> WeightSharing:
        tensors = arguments.pop("tensors", {})
        if "shared" in arguments:
            arguments["shared"] = coding.decode(arguments["shared"], tensors)
        return cls(net, **arguments)

    def implied_parameters(self) -> dict[str, Tensor]:
        book = self._modules.get("shared")
        if not isinstance(book, Codebook):
            return {}
        with torch.no_grad():
            values = book.expand(book.means()[None], book.outlier_loc[None])
            return {name: v[0].contiguous() for name, v in zip(self._coded, values, strict=True)}

    def weights(self, coded: Select | None = None) -> list[str]:
        """The random parameters that codes are for: weights of products, convolutions and tables, unless chosen.

        :raises ValueError: when there is none.
        """
        parameters = self.core().parameters_by_name()
        random = {n: parameters[n] for n in self.random}
        if coded is not None:
            return select_parameters(dict(random), self.core().net, coded)
        products = set(self.core().product_weights())
        found = [n for n in random if n in products]
        if not found:
            raise ValueError(
                "no random parameter is the weight of a linear layer, a convolution or an embedding: say which ones "
                f"share codes with coded= (random are {', '.join(self.random)})"
            )
        return found

    def take_codebook(self, codebook: Codebook, soft: bool) -> None:
        """Makes a codebook the prior of the weights whose prior is ``GaussianMixture()``."""
        coded = {name for name, _ in codebook.sites}
        other = next((n for n in self._of_codes if self.site(n) not in coded), None)
        if other is not None:
            raise ValueError(
                f"the prior of {other!r} is GaussianMixture(), the codebook of the guide, but the guide has no codes "
                "for it: give it another prior, in a mapping {pattern: prior}, or code it with coded="
            )
        self._codebook = [(codebook, soft)]

    def _priors_now(self) -> dict[str, Prior]:
        if not self._of_codes or not self._codebook:
            return self.priors
        book, soft = self._codebook[0]
        given = (book.log_shares(soft), book.means(), book.scales(), book)
        now = dict(self.priors)
        for name in self._of_codes:
            prior = now[name]
            assert isinstance(prior, GaussianMixture)
            now[name] = prior.with_codes(*given)
        return now

    def sample_latents(self) -> dict[str, Tensor]:
        if self._coded:
            return sample_weights(self, self.priors, self._likes())
        parameters = self.core().parameters_by_name()
        return sample_weights(self, self._priors_now(), {name: parameters[name].detach() for name in self.random})

    def log_prior(self) -> Tensor | None:
        if not self._of_codes or not self._codebook:
            return None
        book = self._codebook[0][0]
        prior = self.priors[self._of_codes[0]]
        assert isinstance(prior, GaussianMixture)
        held, _ = book.usage(soft=True)
        return prior.log_density_of_precisions(book.scales()).where(held > 0, 0.0).sum()


@storable
class CodebookGuide(MixtureGuide):
    """K Gaussians for all weights, private ones for outliers, and a label for every weight.

    A weight with code a(i) is ``w_i = m_a(i) + s_a(i) eps_i`` with a noise of its own, so that the KL divergence is
    ``sum_k n_k KL(N(m_k, s_k^2) || p)`` and O(K) numbers are trained. A weight between two codes is, with
    ``sampling="codebook"``, ``alpha z_1 + (1 - alpha) z_2`` of draws z of both (alpha blending), and with
    ``sampling="mixture"`` one of the two, the first with probability alpha. Biases, other parameters that are no
    weights of products, and scales of the prior are factorised as in :class:`MeanFieldGuide`.

    :param model: a :class:`WeightSharing` (or any :class:`Dense`).
    :param codes: K; or a :class:`Codebook` for the sites of the coded weights.
    :param sampling: see above.
    :param blend: share of the weights that two codes hold together.
    :param outliers: largest share of the weights that have Gaussians of their own.
    :param init_scale: starting standard deviation of every weight, whose mean is the network's value.
    :param coded: which random parameters share codes, as for ``select``; by default the weights of products,
        convolutions and tables.
    :param options: further ones of :meth:`Codebook.fit`: ``magnitude``, ``gradient``, ``snr``, ``smallest``, ``zero``,
        ``rate``, ``distance``, ``iterations``, ``seed``.
    :raises ValueError: for NaN in the weights, more codes than distinct weights, or numbers out of range.
    """

    def __init__(
        self,
        model: Dense,
        codes: int | Codebook = 256,
        *,
        sampling: Sampling = "codebook",
        blend: float = 0.01,
        outliers: float = 0.005,
        init_scale: float = 1e-2,
        coded: Select | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, Dense):
            raise TypeError(f"{type(self).__name__} takes a pyro_bnn.models.WeightSharing, got {type(model).__name__}")
        if isinstance(model, WeightSharing) and "shared" in model._modules:
            raise ValueError("the weights of this model are shared already: its guide is model.shared_guide()")
        if sampling == "shared":
            raise ValueError(
                "sampling='shared' is a property of the model: WeightSharing(..., shared=guide.book) of a guide with "
                "sampling='codebook', and its shared_guide()"
            )
        if sampling not in get_args(Sampling):
            raise ValueError(f"sampling={sampling!r}: expected one of {', '.join(map(repr, get_args(Sampling)))}")
        if not init_scale > SMALLEST_SCALE:
            raise ValueError(f"init_scale={init_scale!r}: expected a positive standard deviation")
        parameters = model.core().parameters_by_name()
        if isinstance(codes, Codebook):
            book = codes
            names = _names_of(model, book)
        else:
            names = _coded(model, coded)
            _require_finite({name: parameters[name] for name in names})
            loc = torch.cat([parameters[name].detach().flatten() for name in names])
            sites = [(model.site(name), parameters[name].shape) for name in names]
            fit = {"between": blend, "outliers": outliers, **options}
            book = Codebook.fit(sites, loc, torch.full_like(loc, init_scale), codes, **fit)
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
        """From the weights of the network that the model was given, trained without uncertainty."""
        return cls(model, codes, **options)

    @classmethod
    def from_mean_field(cls, model: Dense, guide: MeanFieldGuide, codes: int = 256, **options: Any) -> CodebookGuide:
        """From a trained :class:`MeanFieldGuide` of the same model (or one with the same sites).

        :param options: as of the guide; ``init_scale`` is not used, as every weight has its own deviation.
        :raises ValueError: when the guide is a mixture of several components, or for other sites.
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
                "hierarchical prior has sites of its own, and needs a mean field trained under it"
            )
        names = _coded(model, options.pop("coded", None))
        sites = [(model.site(n), shapes[model.site(n)]) for n in names]
        _require_finite({site: loc[site] for site, _ in sites} | {f"rho of {site}": rho[site] for site, _ in sites})
        means = torch.cat([loc[site].flatten() for site, _ in sites])
        scales = F.softplus(torch.cat([rho[site].flatten() for site, _ in sites])) + SMALLEST_SCALE
        own = {name: options.pop(name) for name in ("sampling", "init_scale") if name in options}
        if "blend" in options:
            options["between"] = options.pop("blend")
        made = cls(model, Codebook.fit(sites, means, scales, codes, **options), **own)
        with torch.no_grad():
            for mine, theirs in ((made.coordinates(), loc), (made.widths(), rho)):
                for name, value in mine.items():
                    value.copy_(theirs[name])
        return made

    @property
    def book(self) -> Codebook:
        """The codebook, read past Pyro's attribute hooks."""
        book = self._modules["codebook"]
        assert isinstance(book, Codebook)
        return book

    def like(self) -> Tensor:
        return self.book.loc

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return super()._named() + [(f"codebook.{name}", p) for name, p in self.book.named()]

    def _weights(self, take: Any) -> dict[str, dist.TorchDistribution]:
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

    def arguments(self) -> dict[str, Any]:
        return {"sampling": self.sampling, "codebook": coding.describe(self.book.compact())}

    def tensors(self) -> dict[str, Tensor]:
        own = {n: v.detach() for n, v in self.named_parameters() if not n.startswith("codebook.")}
        return own | {f"codebook.{n}": v for n, v in coding.encode(self.book.compact()).items()}

    @classmethod
    def from_tensors(cls, model: Any, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> CodebookGuide:
        packed = {n.removeprefix("codebook."): v for n, v in tensors.items() if n.startswith("codebook.")}
        device = model.like().device
        book = coding.decode(arguments["codebook"], {n: v.to(device) for n, v in packed.items()})
        guide = cls(model, book, sampling=arguments["sampling"])
        own = {n: v for n, v in tensors.items() if not n.startswith("codebook.")}
        for name, parameter in guide.named_parameters():
            if name.startswith("codebook."):
                own[name] = parameter.detach()
        guide._take_parameters(own)
        return guide

    def summaries(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """The codes: their means, their standard deviations and the number of weights of each."""
        columns = (self.book.means(), self.book.scales(), self.book.usage()[0])
        return {
            name: (("code",), values.detach())
            for name, values in zip(("code_mean", "code_sd", "code_weights"), columns, strict=True)
        }

    def figures(self) -> dict[str, Figure]:
        """Pictures of the codes, under words that say what is to be seen."""
        from pyro_bnn.models.codebook_plots import plot_plane, plot_usage  # matplotlib takes time to import

        held = self.book.usage(soft=True)[0]
        alive, most = int((held > 0).sum()), float(held.max() / held.sum())
        return {
            f"Plane of {alive} codes, by mean and standard deviation": plot_plane(self.book),
            f"Weights of each code; the most frequent one has {most:.1%} of them": plot_usage(self.book),
        }

    def compression_report(self) -> dict[str, Any]:
        """What the codebook saves: see :func:`~pyro_bnn.models.coding.report`."""
        rest = sum(p.numel() for n, p in self.named_parameters() if not n.startswith("codebook."))
        return coding.report(self.book.compact()) | {"other_trainable": rest}


def _coded(model: Dense, coded: Select | None) -> list[str]:
    if isinstance(model, WeightSharing):
        return model.weights(coded)
    return WeightSharing.weights(model, coded)  # type: ignore[arg-type]


def _names_of(model: Dense, book: Codebook) -> list[str]:
    """The names of the parameters that a codebook is for."""
    shapes = {model.site(name): (name, model.core().parameters_by_name()[name].shape) for name in model.random}
    for site, shape in book.sites:
        if site not in shapes:
            raise ValueError(f"the codebook is for another network: {site!r} is no random parameter of this one")
        if shapes[site][1] != shape:
            raise ValueError(
                f"the codebook is for another network: {site!r} has shape {tuple(shape)} there and "
                f"{tuple(shapes[site][1])} in this one"
            )
    return [shapes[site][0] for site, _ in book.sites]


def _require_finite(values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise ValueError(
                f"{name!r} holds {bad} NaN or infinite values: a codebook needs the weights of a network that trained"
            )
