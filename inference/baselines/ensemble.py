"""Deep ensembles (Lakshminarayanan, Pritzel and Blundell 2017, arXiv 1612.01474)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_bnn.distributed import alone, processes
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.given.copying import copy_of, unwrapped
from pyro_bnn.given.fresh import fresh_copy
from pyro_bnn.inference.baselines.point import Baseline
from pyro_bnn.inference.checkpoint import Checkpoint
from pyro_bnn.inputs import Data
from pyro_bnn.modes import settle
from pyro_bnn.posterior import Posterior
from pyro_bnn.randomness import derive_seeds, device_of, seeded


@dataclass(eq=False, repr=False, kw_only=True)
class DeepEnsemble(Baseline):
    r"""K networks that are trained separately from different starting values.

    ::

        w_k = argmax_w  log p(w) + sum_n log p(y_n | net_w(x_n)),   started at w_k^0 ~ initialisation
        p(y | x) = (1/K) sum_k p(y | net_{w_k}(x))

    The networks are K stored draws of one :class:`~pyro_bnn.models.Dense`: ``predict(x, num_samples=K)``. They are
    draws and not members of a mixture, because each network has its own statistics of normalisation layers, and only
    draws can have these. Adversarial training, an option in the paper, is not done.

    Source: Lakshminarayanan, Pritzel and Blundell 2017 (arXiv 1612.01474), section 2.4, with maximum a posteriori
    estimation in place of maximum likelihood.

    :param net, likelihood, num_data, prior, output: see :class:`~pyro_bnn.inference.baselines.point.Baseline`.
    :param num_networks: K.
    :param build: a function that returns a new network of the same architecture, with new starting values. By default,
        ``net`` is copied and its modules are reset with ``reset_parameters``, which all layers of ``torch.nn`` have.
    :raises ValueError: for fewer than one network.
    """

    num_networks: int = 5
    build: Callable[[], nn.Module] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.build is not None:
            checks.function("build", self.build)
        self.num_networks = checks.count("num_networks", self.num_networks)
        self._require_own_location("the networks of an ensemble start at new ones")

    def repr_arguments(self) -> dict[str, object]:
        return super().repr_arguments() | {"num_networks": self.num_networks}

    @one_at_a_time
    def fit(
        self,
        data: Data,
        *,
        epochs: int,
        checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Posterior:
        """Trains one network after the other; under ``torchrun`` every process trains some of them.

        :param data: data in the forms that :func:`~pyro_bnn.inference.fit` accepts.
        :param epochs: passes over the data, for each network.
        :param checkpoint: a file, or a :class:`~pyro_bnn.inference.Checkpoint`. The number of the network is added to
            its name (``run.pt`` becomes ``run-0.pt`` and so on); training resumes from files that exist.
        :param seed: makes the run reproducible and leaves the global random state unchanged.
        :param options: other options of :func:`~pyro_bnn.inference.fit`, such as ``optim``, ``lr``, ``batch_size``,
            ``schedule`` and ``progress``.
        :return: a posterior of K stored draws. Its ``losses`` are the averages over the networks.
        :raises TypeError: when ``optim`` is an optimiser, which holds the parameters of one network.
        :raises ValueError: when a parameter cannot be given a new value; see ``build``.
        """
        if isinstance(options.get("optim"), Optimizer):
            raise TypeError(
                "optim= is an optimiser, and every network needs one of its own: give its name, or a function such as "
                "lambda groups: torch.optim.Adam(groups, lr=1e-3)"
            )
        checks.count("epochs", epochs)
        together, each = processes(), Checkpoint.of(checkpoint)
        seeds = derive_seeds(together.shared_seed(seed), 2 * self.num_networks)
        options["progress"] = options.get("progress", True) and together.is_first
        own: dict[int, _Network] = {}
        for number in together.mine(self.num_networks):
            place = None if each is None else replace(each, path=_numbered(Path(each.path), number))
            with alone():
                net = self._new_network(seeds[2 * number])
                run = {"checkpoint": place, "seed": seeds[2 * number + 1], **options}
                own[number] = _Network.of(self._mode(data, epochs, net, **run))
        found = {number: network for part in together.gather(own) for number, network in part.items()}
        networks, like = [found[number] for number in range(self.num_networks)], device_of(self.net)
        draws = {name: torch.cat([one.draws[name] for one in networks]).to(like) for name in networks[0].draws}
        buffers = {name: torch.stack([one.buffers[name] for one in networks]).to(like) for name in networks[0].buffers}
        differ = {name: b for name, b in buffers.items() if not torch.equal(b, b[:1].expand_as(b))}
        model = self._model()
        with torch.no_grad():
            for name, buffer in model.core().net.named_buffers():
                buffer.copy_(buffers[name][0])
        posterior = Posterior.from_draws(model, draws, statistics=differ, is_sampled=False)
        settle(model)
        posterior.losses = [
            sum(step) / self.num_networks for step in zip(*(one.losses for one in networks), strict=False)
        ]
        return posterior

    def _new_network(self, seed: int | None) -> nn.Module:
        device = device_of(self.net)
        with seeded(device, seed):
            if self.build is None:
                try:
                    return fresh_copy(self.net)
                except ValueError as error:
                    raise ValueError(
                        f"{error}, and an ensemble needs different ones: give build=, a function that makes a new "
                        "network"
                    ) from None
            net = self.build()
        if not isinstance(net, nn.Module):
            raise TypeError(f"build= must return a torch.nn.Module, got {type(net).__name__}")
        if net is self.net:
            raise ValueError("build= returned the network itself: it must make a new one at every call")
        try:
            copy_of(self.net).load_state_dict(unwrapped(net).state_dict())
        except RuntimeError as error:
            raise ValueError(f"build= makes a network that is not of the architecture of net: {error}") from None
        made = dict(net.named_parameters())
        with torch.no_grad():
            for name, given in self.net.named_parameters():
                if not given.requires_grad:  # it stays as it is, in all networks
                    made[name].copy_(given).requires_grad_(False)
        return net.to(device)


@dataclass(frozen=True)
class _Network:
    """A network that was trained, on the CPU: its weights ``{site: [1, *shape]}``, its buffers, and its losses."""

    draws: dict[str, Tensor]
    buffers: dict[str, Tensor]
    losses: list[float]

    @classmethod
    def of(cls, point: Posterior) -> _Network:
        net: nn.Module = point.model.core().net  # type: ignore[attr-defined]
        draws = {name: value[:, 0].cpu() for name, value in point.draws(1).items()}
        return cls(draws, {name: b.detach().cpu() for name, b in net.named_buffers()}, point.losses)


def _numbered(path: Path, member: int) -> Path:
    return path.with_name(f"{path.stem}-{member}{path.suffix}")
