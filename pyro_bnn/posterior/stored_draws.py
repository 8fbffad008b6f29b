"""A Pyro guide that returns stored draws of a sampler or an ensemble."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.module import ProgramModule
from pyro_bnn.program.sites import Program
from pyro_bnn.registry import storable


def require_chains(draws: Mapping[str, Tensor], num_chains: int) -> None:
    """
    :raises ValueError: when sites lack draws, or the draws do not divide into the chains.
    """
    counts = sorted({len(value) for value in draws.values()})
    if len(counts) != 1 or counts[0] % num_chains:
        raise ValueError(
            f"num_chains={num_chains}: expected draws of every site, as many as make chains of one length, but the "
            f"sites have {counts} draws"
        )


@storable
class DrawsGuide(ProgramModule):
    """The empirical distribution of stored draws as a guide: every call returns one of them, at random.

    :param draws: ``{site: [n, members, *event]}``.
    :param model: the model whose sites were drawn; models of this package have a plate for members around their sites.
    :param num_chains: number of chains, which are stored one after the other.
    :param statistics: ``{buffer of the network: [n, *shape]}``, the statistics of normalisation layers of each draw.
    :param is_sampled: whether the draws come from a sampler of the posterior.
    """

    def __init__(
        self,
        draws: dict[str, Tensor],
        model: Program,
        num_chains: int = 1,
        statistics: dict[str, Tensor] | None = None,
        is_sampled: bool = True,
    ) -> None:
        super().__init__("draws_guide")
        self.num_chains, self.is_sampled = num_chains, is_sampled
        self.statistics_names = list(statistics or {})
        for i, value in enumerate((statistics or {}).values()):
            self.register_buffer(f"statistics_{i}", value)
        self.names = list(draws)
        self.plate = (model.site("members"), model.members_dim) if isinstance(model, BayesianNetwork) else None
        for i, value in enumerate(draws.values()):
            self.register_buffer(f"draws_{i}", value)

    def __repr__(self) -> str:
        counts = {"draws": len(self), "members": self.num_members, "chains": self.num_chains}
        return display.call(self, **counts, sites=len(self.names), is_sampled=self.is_sampled)

    def __len__(self) -> int:
        """Number of stored draws of each member."""
        return int(next(iter(self.draws().values())).shape[0])

    @property
    def num_members(self) -> int:
        return int(next(iter(self.draws().values())).shape[1])

    def draws(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"draws_{i}") for i, name in enumerate(self.names)}

    def statistics(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"statistics_{i}") for i, name in enumerate(self.statistics_names)}

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        stored = self.draws()
        count, members = next(iter(stored.values())).shape[:2]
        device = next(iter(stored.values())).device
        uniform = dist.Categorical(logits=torch.zeros(count * members, device=device))
        with contextlib.ExitStack() as stack:
            if self.plate is not None:
                stack.enter_context(pyro.plate(self.plate[0], 1, dim=self.plate[1], device=str(device)))
            index = pyro.sample("draw", uniform, infer={"is_auxiliary": True})
            return {
                name: pyro.sample(name, dist.Delta(value.flatten(0, 1)[index], event_dim=value.dim() - 2))
                for name, value in stored.items()
            }
