"""Maximum a posteriori (MAP) estimates, from which every baseline starts."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.given.copying import copy_of, unwrapped
from pyro_bnn.inference.svi.fitting import fit
from pyro_bnn.inputs import Data
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.dense import Dense, PointGuide
from pyro_bnn.modes import settle
from pyro_bnn.network import Output
from pyro_bnn.posterior import Posterior
from pyro_bnn.priors import Normal, PriorLike
from pyro_bnn.program.module import require_network


@dataclass(eq=False, repr=False)
class Baseline:
    """Base class of baselines: a network, a likelihood and a prior of the weights.

    Parameters with ``requires_grad=False`` do not change.

    :param net: any module; it is copied, never changed.
    :param likelihood: one of :mod:`pyro_bnn.likelihoods`.
    :param num_data: size N of the training set.
    :param prior: prior of all trained parameters, including those of normalisation layers; its negative log density is
        the weight penalty.
    :param output: chooses the output when the network returns several (key, index or function).
    :raises TypeError: for a likelihood that is not from :mod:`pyro_bnn.likelihoods`.
    :raises ValueError: for a network without trainable parameters.
    """

    net: nn.Module
    likelihood: Likelihood
    num_data: int
    _: KW_ONLY
    prior: PriorLike = Normal(0.0, 1.0)
    output: Output = None

    def __post_init__(self) -> None:
        require_network(self.net)
        net = unwrapped(self.net)
        if not isinstance(self.likelihood, Likelihood):
            raise TypeError(
                f"{type(self).__name__} needs one of pyro_bnn.likelihoods, which says what it is trained for; got "
                f"{self.likelihood!r}"
            )
        if not any(is_trainable(name, p) for name, p in net.named_parameters()):
            raise ValueError("the network has no parameter that requires a gradient: there is nothing to train")
        self._model()  # a prior or size that does not fit is an error here, and not after hours

    def __repr__(self) -> str:
        return display.call(self, **self.repr_arguments())

    def repr_arguments(self) -> dict[str, object]:
        """What the text of the baseline says, by name."""
        network = {"net": type(self.net), "likelihood": self.likelihood, "num_data": self.num_data}
        return network | {"prior": self.prior}

    def _model(self, net: nn.Module | None = None) -> Dense:
        """A model in which all trainable parameters are sites, so that each has a prior and every draw contains all."""
        net = self.net if net is None else net
        return Dense(net, self.likelihood, self.num_data, prior=self.prior, select=is_trainable, output=self.output)

    def _require_own_location(self, why: str) -> None:
        """Refuses priors around the weights of the given network.

        :raises ValueError: for such a prior; the message gives the reason ``why``.
        """
        around = next((name for name, prior in self._model().priors.items() if prior.is_pretrained), None)
        if around is not None:
            raise ValueError(
                f"{type(self).__name__}: the prior of {around!r} is around the weights of the given network, but {why}"
                ": use a prior with a location of its own, such as Normal()"
            )

    def _mode(self, data: Data, epochs: int, net: nn.Module | None = None, **options: Any) -> Posterior:
        """A posterior of one point: the mode after so many epochs of training, or the given network without training.

        :raises ValueError: without training, when the noise is to be learned.
        """
        checks.count("epochs", epochs, 0)
        model = self._model(net)
        guide = PointGuide(model)
        if epochs:
            return fit(model, guide, data, epochs=epochs, **options)
        if self.likelihood.learns_noise:
            raise ValueError(
                f"{self.likelihood!r} learns its noise, and nothing is trained with epochs=0: give epochs=, or the "
                "standard deviation of the noise as scale="
            )
        settle(model, guide)
        return Posterior(model, guide)


def is_trainable(name: str, parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.requires_grad


def network_at(point: Posterior) -> nn.Module:
    """A frozen copy of the network of a posterior that is a single point, with the values of that point."""
    model = point.model
    assert isinstance(model, Dense)
    values = point.draws(1)
    net = copy_of(model.core().net)
    for name, parameter in net.named_parameters():
        if model.site(name) in values:
            parameter.data.copy_(values[model.site(name)][0, 0])
    return net.requires_grad_(False)
