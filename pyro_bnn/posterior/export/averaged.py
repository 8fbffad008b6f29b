"""All draws of a posterior on one input, as one program that ``torch.export`` can trace."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from pyro_bnn.perturb.substitution import Pass
from pyro_bnn.posterior.export.arguments import Arguments
from pyro_bnn.posterior.prediction import Prediction
from pyro_bnn.program.model import BayesianNetwork

#: the properties of a :class:`~pyro_bnn.posterior.prediction.Prediction` that an exported module can compute
OUTPUTS = ("mean", "probs", "entropy", "mutual_information", "aleatoric", "epistemic", "variance", "std")
#: what names of the network's parameters and buffers start with
_OF_NETWORK = "model.network.net."


class Averaged(nn.Module):
    """``tensors of x -> summaries of the prediction``, by the code that :meth:`Posterior.predict` runs.

    :param model: the model, whose network is in eval mode and takes no gradients.
    :param draws: ``{site: [n, members, *event]}``.
    :param statistics: ``{buffer of the network: [n, *shape]}`` for the buffers that differ from draw to draw.
    :param arguments: how the network is called.
    :param outputs: names among :data:`OUTPUTS`.
    :param step: number of draws that share one pass of the network, unless they have statistics of their own.
    """

    def __init__(
        self,
        model: BayesianNetwork,
        draws: dict[str, Tensor],
        statistics: dict[str, Tensor],
        arguments: Arguments,
        outputs: tuple[str, ...],
        step: int,
    ) -> None:
        super().__init__()
        self.model, self.arguments, self.outputs = model, arguments, outputs
        self.sites, self.varying = list(draws), list(statistics)
        for i, value in enumerate(draws.values()):
            self.register_buffer(f"draw_{i}", value)
        for i, value in enumerate(statistics.values()):
            self.register_buffer(f"statistic_{i}", value)
        self.count = len(next(iter(draws.values())))
        self.step = 1 if statistics else min(step, self.count)

    def name_in_module(self, tensor: str) -> str:
        """What a tensor is called in the exported module: ``network.<parameter>``, ``draws.<site>`` and so on.

        :param tensor: its name in this module, or in the trace of it.
        """
        known = {f"draw_{i}": f"draws.{site}" for i, site in enumerate(self.sites)}
        known |= {f"statistic_{i}": f"statistics.{buffer}" for i, buffer in enumerate(self.varying)}
        if tensor.startswith(_OF_NETWORK):
            return f"network.{tensor.removeprefix(_OF_NETWORK)}"
        return known.get(tensor, f"constants.{tensor}")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        model, x, size = self.model, self.arguments.input(tensors), tensors[0].shape[0]
        draws = {site: self.get_buffer(f"draw_{i}") for i, site in enumerate(self.sites)}
        blocks = []
        for start in range(0, self.count, self.step):
            part = {site: model.plated(value[start : start + self.step]) for site, value in draws.items()}
            with self._statistics_of(start):
                f = model.function(x, part, size)
            blocks.append(f.reshape(f.shape[:2] + f.shape[-model.members_dim :]))
        noise = draws.get(model.site("noise"))
        prediction = Prediction(torch.cat(blocks) if len(blocks) > 1 else blocks[0], model.likelihood, noise)
        return tuple(getattr(prediction, name) for name in self.outputs)

    def _statistics_of(self, draw: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the network has the statistics of this draw."""
        if not self.varying:
            return contextlib.nullcontext()
        own = {name: self.get_buffer(f"statistic_{i}")[draw] for i, name in enumerate(self.varying)}
        return Pass(self.model.core().net, {}, own).running()
