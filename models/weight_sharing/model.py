"""Stochastic weight sharing: all weights share K Gaussians (Lin et al., AISTATS 2025, arXiv 2505.17856)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.guide import MixtureGuide
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.model import Form
from pyro_bnn.models.dense import Dense, MeanFieldGuide
from pyro_bnn.models.weight_sharing import format as codebook_format
from pyro_bnn.models.weight_sharing.codebook import Codebook, inverse_scale
from pyro_bnn.network import Select, select_parameters
from pyro_bnn.priors import GaussianMixture, Normal, Prior, PriorLike
from pyro_bnn.registry import storable


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
        self._coded = names_of(self, book)
        self._modules["shared"] = book.requires_grad_(False)
        taken = [name for name in ("codes", "outliers") if name in self.random]
        if taken:
            raise ValueError(
                f"the network has a parameter of its own named {taken[0]!r}, as a site of shared weights is"
            )
        likes = self._likes()
        self.priors = {name: priors.resolve(self.prior, (name,), like) for name, like in likes.items()}
        self._sites = self.list_weight_sites(self.priors, likes)
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

    def shared_guide(self, start: MixtureGuide | None = None, *, init_scale: float = 1e-2) -> MeanFieldGuide:
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

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self._coded, "codebook")

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        book = self._modules.get("shared")
        if not isinstance(book, Codebook):
            return super().weights_of(latents)
        z = latents[self.site("codes")]
        outliers = latents[self.site("outliers")] if len(book.outliers) else z[:0]
        shared = zip(self._coded, book.expand(z[None], outliers[None]), strict=True)
        own = {name: latents[self.site(name)] for name in self.random if name not in self._coded}
        return {name: value[0] for name, value in shared} | own

    def arguments(self) -> dict[str, Any]:
        book = self._modules.get("shared")
        shared = {"shared": codebook_format.describe(book)} if isinstance(book, Codebook) else {}
        return super().arguments() | shared

    def tensors(self) -> dict[str, Tensor]:
        book = self._modules.get("shared")
        return codebook_format.encode(book) if isinstance(book, Codebook) else {}

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> WeightSharing:
        tensors = arguments.pop("tensors", {})
        if "shared" in arguments:
            arguments["shared"] = codebook_format.decode(arguments["shared"], tensors)
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
            return self.sample_weights(self.priors, self._likes())
        parameters = self.core().parameters_by_name()
        return self.sample_weights(self._priors_now(), {name: parameters[name].detach() for name in self.random})

    def log_prior(self) -> Tensor | None:
        if not self._of_codes or not self._codebook:
            return None
        book = self._codebook[0][0]
        prior = self.priors[self._of_codes[0]]
        assert isinstance(prior, GaussianMixture)
        held, _ = book.usage(soft=True)
        return prior.log_density_of_precisions(book.scales()).where(held > 0, 0.0).sum()


def names_of(model: Dense, book: Codebook) -> list[str]:
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
