"""Weights that share their values (Lin et al., AISTATS 2025, arXiv 2505.17856): one random value for each code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.dense import MeanFieldGuide, freeze_random
from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.deviations import rho_of
from pyro_bnn.models.weight_sharing.storage.packed_codebook import describe_codebook, pack_codebook, unpack_codebook
from pyro_bnn.perturb.probe import require_rows
from pyro_bnn.priors import CodebookPrior, Normal, PriorLike
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, Form, NetworkOptions
from pyro_bnn.program.sites import Site
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select


@storable
class SharedWeights(BayesianNetwork):
    """Pyro model ``z ~ prior, y ~ likelihood(net_w(z)(x))`` in which all weights of a code have one value::

        w_i = z_a(i)                                a weight with code a(i)
        w_i = o_i                                   an outlier
        w_i = alpha_i z_1 + (1 - alpha_i) z_2       between two codes

    This is the network of Lin et al. The sites ``codes``, z ``[K]``, and ``outliers``, o ``[o]``, replace those of the
    coded weights; other random parameters keep their own sites. A posterior with shared values has no finite KL
    divergence from a prior over all weights, so the prior is over the codes and outliers. Any guide or kernel can be
    used; :meth:`shared_guide` is the guide of the paper.

    :param codebook: the assignment of weights to values (``guide.book`` of a :class:`~pyro_bnn.models.CodebookGuide`
        for the same network); its labels do not change.
    :param net, likelihood, num_data, select, chunk_size, options: as for :class:`~pyro_bnn.models.Dense`.
    :param prior: as for :class:`~pyro_bnn.models.Dense`; in a mapping, patterns match ``codes`` and ``outliers``.
    :raises ValueError: when the codebook is for another network, when a parameter of the network has the name of a site
        of shared weights, or when a prior is the codebook of a guide.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        codebook: Codebook,
        prior: PriorLike = Normal(0.0, 1.0),
        select: Select | None = None,
        chunk_size: int | None = None,
        **options: Unpack[NetworkOptions],
    ) -> None:
        chunk_size = checks.optional(checks.count, "chunk_size", chunk_size)
        super().__init__(net, likelihood, num_data, **options)
        self.random = freeze_random(self, select)
        taken = next((name for name in ("codes", "outliers") if name in self.random), None)
        if taken is not None:
            raise ValueError(
                f"the network has a parameter of its own named {taken!r}, which is the name of a site of shared "
                "weights: rename the parameter"
            )
        self.shared = codebook.compact().to(self.like()).requires_grad_(False)  # checkpoints know it by this name
        self._coded = self.book.parameters_of(self, self.random)
        self.prior, self.chunk_size = prior, chunk_size
        values = self._values()
        self.priors = {
            name: priors.resolve(prior, (name,), value, name in self.random) for name, value in values.items()
        }
        self._sites = self.list_weight_sites(self.priors, values)
        own = next((n for n, p in self.priors.items() if isinstance(p, CodebookPrior)), None)
        if own is not None:
            raise ValueError(
                f"the prior of {own!r} is a CodebookPrior, whose components are the codes themselves: give it a fixed "
                "one, such as GaussianMixture(locs, scales)"
            )

    @property
    def book(self) -> Codebook:
        """The codebook without unused entries, read without Pyro's attribute hooks."""
        book = self._modules["shared"]
        assert isinstance(book, Codebook)
        return book

    def _values(self) -> dict[str, Tensor]:
        """Starting values of the sites, by their names without the prefix."""
        book, parameters = self.book, self.core().parameters_by_name()
        values = {"codes": book.means().detach()}
        if len(book.outliers):
            values["outliers"] = book.outlier_loc.detach()
        return values | {name: parameters[name].detach() for name in self.random if name not in self._coded}

    def sites(self) -> list[Site]:
        return self._sites

    def sample_latents(self) -> dict[str, Tensor]:
        return self.sample_weights(self.priors, self._values())

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        lead = self.lead_shape(latents)
        plates = lead + (1,) * (-self.members_dim - 1)
        weights = {}
        for name, value in self._values().items():
            weights[name] = latents[self.site(name)].expand(plates + value.shape).reshape((-1,) + value.shape)
        z = weights.pop("codes")
        outliers = weights.pop("outliers", z[:, :0])
        weights |= zip(self._coded, self.book.weights_from_values(z, outliers), strict=True)
        f = self.core().explicit(x, weights, self.chunk_size)
        require_rows(f[0], size)
        return self.unfold(f, lead)

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self.random, "dense") | dict.fromkeys(self._coded, "codebook")

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {name: latents[self.site(name)] for name in self._values()}
        z = values.pop("codes")
        outliers = values.pop("outliers", z[:0])
        shared = zip(self._coded, self.book.weights_from_values(z[None], outliers[None]), strict=True)
        return {name: value[0] for name, value in shared} | values

    def shared_guide(self, start: MixtureGuide | None = None, *, init_scale: float = 1e-2) -> MeanFieldGuide:
        """The guide of Lin et al.: independent Normals for codes and outliers.

        A code starts at the marginal of ``N(c_k, Sigma_k)``, in the plane of means and standard deviations, over the
        mean; an outlier starts at its own Gaussian.

        :param start: a guide whose Gaussians are the starting point of parameters that are not shared, such as biases;
            by default they start at the values of the network with standard deviation ``init_scale``.
        :param init_scale: see ``start``.
        """
        book, guide = self.book, MeanFieldGuide(self, init_scale=init_scale)
        widths = guide.widths()
        with torch.no_grad():
            widths[self.site("codes")].copy_(rho_of(book.spread[:, 0, 0].sqrt()))
            if len(book.outliers):
                widths[self.site("outliers")].copy_(book.outlier_rho)
            if start is not None:
                for mine, theirs in ((guide.coordinates(), start.coordinates()), (widths, start.widths())):
                    for name in mine.keys() & theirs.keys():
                        mine[name].copy_(theirs[name])
        return guide

    # --------------------------------------------------------------------------------------------- storage

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {
            "select": self.random,
            "chunk_size": self.chunk_size,
            "codebook": describe_codebook(self.book),
        }

    def tensors(self) -> dict[str, Tensor]:
        return pack_codebook(self.book)

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> Self:
        given = dict(arguments)
        given["codebook"] = unpack_codebook(given["codebook"], given.pop("tensors", {}))
        return cls(net, **given)

    def on(self, net: nn.Module) -> Self:
        given = {"likelihood": self.likelihood, "prior": self.prior, "tensors": self.tensors()}
        return self.from_arguments(net, self.arguments() | given)

    def implied_parameters(self) -> dict[str, Tensor]:
        """Values of the coded weights at the means of codes and outliers, by the name of the parameter."""
        book = self.book
        with torch.no_grad():
            values = book.weights_from_values(book.means()[None], book.outlier_loc[None])
            return {name: value[0].contiguous() for name, value in zip(self._coded, values, strict=True)}
