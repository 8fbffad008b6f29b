"""The model of stochastic weight sharing (Lin et al., AISTATS 2025, arXiv 2505.17856): random weights of a network."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.dense import Dense, DenseOptions
from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.priors import CodebookPrior, Normal, Prior, PriorLike
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select


@storable
class WeightSharing(Dense):
    """Pyro model ``w ~ prior, y ~ likelihood(net_w(x))`` over the weights themselves, as in :class:`Dense`.

    Sharing Gaussians is a property of :class:`~pyro_bnn.models.CodebookGuide`; with NUTS or another guide this model is
    the dense network. With the prior :class:`~pyro_bnn.priors.CodebookPrior`, the codebook of the guide is also the
    prior. For weights that share values, and not only Gaussians, use :class:`~pyro_bnn.models.SharedWeights`.

    :param net, likelihood, num_data, prior, select: as for :class:`Dense`.
    :param options: see :class:`~pyro_bnn.models.dense.DenseOptions`.
    :raises ValueError: as :class:`Dense`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        prior: PriorLike = Normal(0.0, 1.0),
        select: Select | None = None,
        **options: Unpack[DenseOptions],
    ) -> None:
        super().__init__(net, likelihood, num_data, prior=prior, select=select, **options)
        self._under_codebook = [n for n, p in self.priors.items() if isinstance(p, CodebookPrior)]
        self._codebook: list[tuple[Codebook, bool]] = []  # a list, as a module would be a submodule here

    def weights(self, coded: Select | None = None) -> list[str]:
        """The names of the random parameters that share codes; see :func:`weights_to_code`."""
        return weights_to_code(self, coded)

    def take_codebook(self, codebook: Codebook, soft: bool) -> None:
        """Makes a codebook the prior of the weights whose prior is a :class:`~pyro_bnn.priors.CodebookPrior`."""
        coded = {name for name, _ in codebook.sites}
        other = next((n for n in self._under_codebook if self.site(n) not in coded), None)
        if other is not None:
            raise ValueError(
                f"the prior of {other!r} is a CodebookPrior, the codebook of the guide, but the guide has no codes "
                "for it: give it another prior, in a mapping {pattern: prior}, or include it in the guide's coded="
            )
        self._codebook = [(codebook, soft)]

    def _priors_now(self) -> dict[str, Prior]:
        if not self._under_codebook or not self._codebook:
            return self.priors
        book, soft = self._codebook[0]
        log_weights, locs, scales = book.log_shares(soft), book.means(), book.scales()
        now = dict(self.priors)
        for name in self._under_codebook:
            prior = now[name]
            assert isinstance(prior, CodebookPrior)
            now[name] = prior.with_codes(log_weights, locs, scales, book)
        return now

    def sample_latents(self) -> dict[str, Tensor]:
        parameters = self.core().parameters_by_name()
        return self.sample_weights(self._priors_now(), {name: parameters[name].detach() for name in self.random})

    def log_prior(self) -> Tensor | None:
        if not self._under_codebook or not self._codebook:
            return None
        book = self._codebook[0][0]
        prior = self.priors[self._under_codebook[0]]
        assert isinstance(prior, CodebookPrior)
        held = book.weights_per_code(soft=True)
        return prior.log_density_of_precisions(book.scales()).where(held > 0, 0.0).sum()


def weights_to_code(model: Dense, coded: Select | None = None) -> list[str]:
    """The names of the random parameters that share codes.

    :param coded: see :func:`~pyro_bnn.selection.select_parameters`; by default the weights of products, convolutions
        and embedding tables.
    :raises ValueError: when there are none.
    """
    parameters = model.core().parameters_by_name()
    random = {n: parameters[n] for n in model.random}
    if coded is not None:
        return model.selected(coded, random, option="coded", what="random parameters")
    products = set(model.core().product_weights())
    found = [n for n in random if n in products]
    if not found:
        raise ValueError(
            "no random parameter is the weight of a linear layer, a convolution or an embedding: choose those that "
            f"share codes with coded= (random are {', '.join(model.random)})"
        )
    return found
