"""One object for what any engine found: it draws, predicts, is saved, and hands out a Pyro guide."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, inputs, naming_shapes, require_finite, targets
from pyro_bnn.modes import evaluating
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.posterior import foreign, own_draws, storage
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS, DrawSource, with_members
from pyro_bnn.posterior.network_outputs import network_outputs
from pyro_bnn.posterior.plain_networks import plain_networks
from pyro_bnn.posterior.prediction import Prediction
from pyro_bnn.posterior.statistics import Gathered, OfNetwork, Statistics, Stored
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded
from pyro_bnn.sparsity.channels import Size
from pyro_bnn.sparsity.inclusion import inclusion_log_odds
from pyro_bnn.sparsity.sparsify import network_of_draw, sparsify, with_weight_sites


class Posterior:
    """An approximate posterior of a Pyro model, whatever engine it came from.

    Any number of threads may use one: what runs Pyro waits until no other thread does, as Pyro and torch's random state
    are the whole process's. Model and guide stay in the modes that they are in, so that they may still be in training.

    :param model: a model of this package, or any Pyro model (``predict`` then needs ``return_site=``).
    :param guide: a Pyro guide for it: ours, an AutoGuide or a function.
    :param losses: negative ELBO per datum in nats, one for each training step.
    :param sampler: what a sampler says of its run, by name: temperatures of SGHMC, divergences of NUTS.
    :param example: an input for guides that need one when they draw.
    :param store: the state of Pyro's parameter store in which programs that are functions were trained; they run in it.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        losses: Sequence[float] = (),
        sampler: Mapping[str, float] = MappingProxyType({}),
        example: Inputs = None,
        store: object = None,
    ) -> None:
        self.losses, self.sampler = list(losses), dict(sampler)
        #: where draws come from: in groups, with the traces of a guide
        self.draw_source = DrawSource(model, guide, example, store)
        self._gathered: Gathered | None = None

    @classmethod
    def from_mcmc(cls, mcmc: MCMC, model: Program) -> Posterior:
        """From a finished ``pyro.infer.MCMC`` run, all chains together."""
        posterior = cls.from_draws(model, mcmc.get_samples(), mcmc.num_chains)
        # What kernels say of each chain; mcmc.diagnostics() adds statistics of all draws, and refuses few.
        every: list[Any] = mcmc._diagnostics
        chains = [chain for chain in every if chain]
        if chains and all("divergences" in chain for chain in chains):
            posterior.sampler["divergences"] = sum(len(chain["divergences"]) for chain in chains)
        if chains and all("acceptance rate" in chain for chain in chains):
            posterior.sampler["acceptance rate"] = sum(chain["acceptance rate"] for chain in chains) / len(chains)
        return posterior

    @classmethod
    def from_draws(
        cls,
        model: Program,
        draws: dict[str, Tensor],
        num_chains: int = 1,
        statistics: dict[str, Tensor] | None = None,
        *,
        is_sampled: bool = True,
        losses: Sequence[float] = (),
        sampler: Mapping[str, float] = MappingProxyType({}),
        store: object = None,
    ) -> Posterior:
        """From draws ``{site: [n, *event]}``; plate axes of size 1 that a model of ours adds may be there.

        :param num_chains: how many chains they are of, chain after chain, all of one length.
        :param statistics: ``{buffer of the network: [n, *shape]}`` of normalisation layers, with which each draw
            predicts; by default all predict with those of the network.
        :param is_sampled: whether they are of a sampler of the posterior, as after MCMC, so that chains can be compared
            and leave-one-out needs no other weights; ``False`` for networks of an ensemble, or draws of a guide.
        :param losses, sampler, store: see above.
        :raises ValueError: when a site lacks draws, or they do not divide into the chains.
        """
        num_chains = checks.count("num_chains", num_chains)
        checks.truth("is_sampled", is_sampled)
        counts = {len(value) for value in draws.values()}
        if len(counts) != 1 or counts.pop() % num_chains:
            raise ValueError(
                f"the sites have {sorted({len(v) for v in draws.values()})} draws, which are not {num_chains} chains "
                "of one length"
            )
        guide = DrawsGuide(with_members(model, draws), model, num_chains, statistics, is_sampled)
        return cls(model, guide, losses=losses, sampler=sampler, store=store)

    @property
    def model(self) -> Program:
        """The Pyro model."""
        return self.draw_source.model

    @property
    def guide(self) -> Program:
        """A Pyro guide that gives one draw a call: ``Predictive(model, guide=posterior.guide, num_samples=...)``.

        It is in eval mode, as engines leave it, unless it was given in train mode and nobody called ``eval()`` since.
        Statistics of normalisation layers are then those of the network: only ``predict`` has those of each draw.
        """
        return self.draw_source.guide

    @property
    def num_members(self) -> int:
        """Number of mixture components or particles; 1 for a plain guide."""
        return self.draw_source.num_members

    @property
    def num_stored(self) -> int | None:
        """Number of stored draws of each member; ``None`` when a guide makes them."""
        return None if self.draw_source.stored is None else len(self.draw_source.stored)

    @property
    def num_chains(self) -> int:
        """Number of chains that the stored draws are of, chain after chain; 1 for anything else."""
        return 1 if self.draw_source.stored is None else self.draw_source.stored.num_chains

    @property
    def is_sampled(self) -> bool:
        """Whether the stored draws are of a sampler, rather than of a guide or an ensemble."""
        return self.draw_source.stored is not None and self.draw_source.stored.is_sampled

    @property
    def is_deterministic(self) -> bool:
        """Whether every draw of a member is the same, as of particles and of a deterministic network."""
        return self.draw_source.is_deterministic

    def __repr__(self) -> str:
        return display.text(self._title(), self._fields())

    def _repr_html_(self) -> str:
        return display.html_text(self._title(), self._fields())

    def _title(self) -> str:
        model = self.model
        of = f" of {display.name_of(model.core().net)}" if isinstance(model, BayesianNetwork) else ""
        return f"Posterior of {display.name_of(model)}{of}"

    def _fields(self) -> dict[str, object]:
        fields: dict[str, object] = dict(self.model.repr_fields()) if isinstance(self.model, BayesianNetwork) else {}
        members = display.plural(self.num_members, "member")
        if self.num_stored is None:
            draws = f"made by the guide, for {members}"
        else:
            chains = f" in {display.plural(self.num_chains, 'chain')}" if self.is_sampled else ""
            draws = f"{self.num_stored:,} stored{chains}, for {members}"
        guide = repr(self.guide) if isinstance(self.guide, (MixtureGuide, DrawsGuide)) else display.name_of(self.guide)
        fields |= {"guide": guide, "draws": draws}
        if self.losses:
            steps = display.plural(len(self.losses), "step")
            fields["training"] = f"{steps}, last loss {display.number(float(self.losses[-1]))} nats/datum"
        sampler = (f"{name} {display.number(value)}" for name, value in self.sampler.items())
        return fields | {"sampler": ", ".join(sampler)}

    # ------------------------------------------------------------------------------------------------- draws

    @one_at_a_time
    def draws(self, n: int, seed: int | None = None, *, example: Inputs = None) -> dict[str, Tensor]:
        """``{site: [n, members, *event]}``: n draws of each member. Of stored draws: n evenly spaced ones.

        :param seed: ``predict`` with the same seed uses these very draws.
        :param example: an input, for guides of other packages that need one.
        :raises ValueError: when fewer than n draws are stored.
        """
        n = checks.count("n", n)
        groups = list(self.draw_source.groups(n, seed, example=example))
        return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}

    @one_at_a_time
    def sample(self, n: int, seed: int | None = None) -> dict[str, Tensor]:
        """``{site: [n, *event]}``: n draws, each of a random member; a draw is a draw."""
        checks.seed("seed", seed)
        draws, member = self.draws(n, seed), self._random_members(n, seed)
        return {name: value[torch.arange(n), member.to(value.device) % value.shape[1]] for name, value in draws.items()}

    def _random_members(self, n: int, seed: int | None) -> Tensor:
        """The member of each of n draws, ``[n]``."""
        with seeded(device_of(self.model), None if seed is None else seed + 1):
            return torch.randint(self.num_members, (n,))

    @one_at_a_time
    def networks(self, n: int, seed: int | None = None) -> list[nn.Module]:
        """n plain networks in eval mode, without Pyro: each has the weights of one draw of a random member.

        Network i has the weights that :meth:`sample` of the same n and seed gives at position i, put together (rank-1:
        ``W o (r s^T)``; low-rank: ``W_0 + scale B A``), and the statistics of normalisation layers with which that draw
        predicts. It returns what the given network returns, whatever ``output=`` picks.

        :raises TypeError: when draws are no weights, as of MC dropout, or the model is not of this package.
        :raises ValueError: when fewer than n draws are stored.
        """
        n = checks.count("n", n)
        checks.seed("seed", seed)
        return plain_networks(self.draw_source, self._statistics(), self._random_members(n, seed), seed)

    @one_at_a_time
    def as_draws(self, n: int, seed: int | None = None, *, example: Inputs = None) -> Posterior:
        """The same posterior as n stored draws of every member: the form that any guide can be saved in.

        :param example: an input, for guides of other packages that need one.
        """
        guide, source = self._stored(n, seed, example), self.draw_source
        return Posterior(
            self.model, guide, losses=self.losses, sampler=self.sampler, example=source.example, store=source.store
        )

    def _stored(self, n: int, seed: int | None, example: Inputs = None) -> DrawsGuide:
        n = checks.count("n", n)
        groups = list(self.draw_source.indexed_groups(n, seed, example=example))
        draws = {name: torch.cat([group[name] for group, _ in groups]) for name in groups[0][0]}
        statistics = {}
        if self.draw_source.stored is not None:
            index = torch.cat([index for _, index in groups if index is not None])
            held = self.draw_source.stored.statistics()
            statistics = {name: value[index.to(value.device)] for name, value in held.items()}
        num_chains = self.num_chains if n == self.num_stored else 1
        return DrawsGuide(draws, self.model, num_chains, statistics, self.is_sampled)

    # -------------------------------------------------------------------------------------------- prediction

    @one_at_a_time
    def predict(
        self,
        x: Inputs,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        *,
        return_site: str | None = None,
    ) -> Prediction:
        """The predictive distribution at x, from draws of every member.

        A draw is a whole function: the same for all rows of x and for every ``batch_size``.

        :param x: tensor, array, frame or list with N samples on axis 0, on any device, or a dict or tuple of these;
            see :mod:`pyro_bnn.inputs`.
        :param num_samples: draws of every member. By default 16, or all stored ones where there are fewer or where they
            are not those of a sampler (networks of an ensemble, particles of a model of your own, draws that were
            stored by number); members that are points have one, as all their draws are the same.
        :param batch_size: number of samples in one pass; by default what fits a fixed memory budget.
        :param seed: makes the draws reproducible, and leaves the global random state alone.
        :param return_site: for a model that is not of this package, the site whose values are wanted.
        :raises TypeError: when x does not hold numbers.
        :raises ValueError: for NaN in x, ragged lists, or when draws are asked for that are not stored.
        """
        batch_size = checks.optional(checks.count, "batch_size", batch_size)
        checks.seed("seed", seed)
        model, source, count = self.model, self.draw_source, self.draw_source.count(num_samples)
        x = inputs(x, like_of(model))
        if isinstance(model, BayesianNetwork) and not count_samples(x):
            raise ValueError("x is empty: give at least one row; look at the filter or split that made it")
        if return_site is not None and isinstance(model, BayesianNetwork) and model.likelihood is not None:
            raise ValueError(
                f"return_site={return_site!r} is for models of your own: one of this package predicts at its "
                "likelihood, and posterior.draws(n) has its other sites"
            )
        if not isinstance(model, BayesianNetwork) or model.likelihood is None and return_site is not None:
            return Prediction(foreign.predict_site(source, x, count, seed, return_site), None)
        require_finite(x)
        outputs, noise = [], []
        with torch.no_grad(), evaluating(model), naming_shapes(x):
            for group, index in source.indexed_groups(count, seed, example=x):
                if model.site("noise") in group:
                    noise.append(group[model.site("noise")])
                for part in self._statistics().parts(model, group, index):
                    outputs.append(network_outputs(model, part, x, self.num_members, batch_size))
        return Prediction(torch.cat(outputs), model.likelihood, torch.cat(noise) if noise else None)

    @one_at_a_time
    def log_likelihood(
        self,
        x: Inputs,
        y: object,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        *,
        observed_site: str | None = None,
    ) -> Tensor:
        """``[draws, members, N]``: ``log p(y | x, weights)`` under every draw of every member, in nats.

        :param x, y: data as :meth:`predict` and :func:`~pyro_bnn.inference.fit` take them.
        :param observed_site: of a model of your own with several, the site whose data are meant; by default the one
            whose values are y.
        :raises ValueError: when it cannot be told which site observes y, or draws and sites of the model differ.
        """
        x, y = inputs(x, like_of(self.model)), targets(y, like_of(self.model))
        if not isinstance(self.model, BayesianNetwork):
            count = self.draw_source.count(num_samples)
            return foreign.log_likelihood(self.draw_source, x, y, count, seed, observed_site)
        if observed_site is not None:
            raise ValueError(
                "observed_site= is for models of your own: one of this package observes y at its likelihood alone"
            )
        count_samples(x, y)
        prediction = self.predict(x, num_samples, batch_size, seed)
        return prediction.log_prob(y)

    def recompute_statistics(self, loader: Iterable[object] | None) -> None:
        """From now on every draw predicts with normalisation statistics of its own, gathered over ``loader``.

        Costs one pass over the loader for each draw; ``None`` goes back to the statistics of training, or to those that
        a sampler stored with each draw.

        :param loader: gives batches (x, y), dicts with ``labels``, or x alone, as often as it is gone through.
        """
        self._gathered = None if loader is None else Gathered(loader)

    def _statistics(self) -> Statistics:
        if self._gathered is not None:
            return self._gathered
        held = {} if self.draw_source.stored is None else self.draw_source.stored.statistics()
        return Stored(held) if held else OfNetwork()

    # ----------------------------------------------------------------------------------------------- sparsity

    @one_at_a_time
    def inclusion_probabilities(
        self, num_samples: int | None = None, seed: int | None = None, *, args: tuple[object, ...] = ()
    ) -> dict[str, Tensor]:
        """``{parameter: P(slab | data)}`` for every group of a spike-and-slab prior, shaped as the groups.

        The mean over draws (of all members) of ``P(slab | weights)``, which has less variance than to draw indicators;
        groups that were removed have 0. A weight ``[out, in, k, k]`` has groups ``[out, in, k, k]``, ``[out, in]``
        (kernels), ``[in]`` or ``[out]``.

        :param num_samples: draws of each member; by default all stored ones, or 100.
        :param args: what a model that is not of this package is called with.
        :raises ValueError: when the model has no spike-and-slab site.
        """
        draws = self.draw_source.groups(self.draw_source.count_all(num_samples, POSTERIOR_DRAWS), seed)
        return {name: odds.sigmoid() for name, odds in inclusion_log_odds(self.model, draws, args).items()}

    @one_at_a_time
    def sparsify(
        self,
        sparsity: float | None = None,
        *,
        example: Inputs = None,
        shrink: bool = True,
        num_samples: int | None = None,
        seed: int | None = None,
    ) -> Sparsified:
        """The posterior without the groups of weights that are probably spikes, on a smaller network.

        Channels go that no weight makes or none reads, with their biases, their part of normalisation layers, and the
        inputs of the next layers, in all draws alike. This changes no prediction beyond rounding: what a channel
        without weights still passes on moves into the biases of its readers, and where it cannot the channel stays.

        :param sparsity: share of the weights with a spike-and-slab prior to remove, those of the least probable groups;
            by default all groups of a probability below 1/2. Groups that training removed go in any case.
        :param example: an input of the network (one row is enough), for multiply-adds and for channels without weights.
        :param shrink: whether to cut channels, which takes a network that ``torch.fx`` can trace; else masks alone.
        :param num_samples: draws of each member; by default all stored ones, or 100.
        :raises TypeError: when the model is not one whose weights are sites.
        :raises ValueError: without a spike-and-slab site, for a sparsity out of range, a network that cannot be traced,
            or when an example is needed.
        """
        checks.truth("shrink", shrink)
        model = with_weight_sites(self.model)
        guide = self._stored(self.draw_source.count_all(num_samples, POSTERIOR_DRAWS), seed)
        odds = inclusion_log_odds(self.model, DrawSource(self.model, guide).groups(len(guide)))
        sparse = sparsify(model, guide.draws(), guide.statistics(), odds, sparsity, example=example, shrink=shrink)
        kept = DrawsGuide(sparse.draws, sparse.model, guide.num_chains, sparse.statistics, guide.is_sampled)
        posterior = Posterior(sparse.model, kept, losses=self.losses, sampler=self.sampler)
        return Sparsified(posterior, sparse.masks, sparse.before, sparse.after)

    # ------------------------------------------------------------------------------------------------ storage

    @one_at_a_time
    def save(self, path: str | os.PathLike[str], *, prior: bool = True) -> None:
        """Writes a folder with safetensors and JSON, whole or not at all; :func:`load` reads it.

        Likelihoods and priors of one's own are saved by the names of their classes, which are dataclasses; models and
        guides are decorated with :func:`~pyro_bnn.storable`. Their modules must be imported before the file is loaded.

        Of a Pyro model of your own the draws are saved, with the parameters and buffers of a model that is a module and
        those of Pyro's store that were trained. The program is not: ``load(path, model=...)`` is given it.

        :param path: a folder, which may hold an older posterior. Other files in it stay.
        :param prior: ``False`` leaves the prior out, and :func:`load` then needs ``prior=``.
        :raises TypeError: when model, guide, output or prior cannot be described in JSON; the message names the remedy.
        :raises FileExistsError: when ``path`` exists and is no posterior.
        :raises OSError: when the disk refuses it; what is there is whole then, the older posterior or this one.
        """
        checks.truth("prior", prior)
        path = checks.path("path", path)
        model, guide = self.model, self.guide
        if isinstance(model, BayesianNetwork):
            storage.write(path, model, guide, losses=self.losses, sampler=self.sampler, prior=prior)
        else:
            store = self.draw_source.store
            own_draws.write_draws(path, model, guide, store, losses=self.losses, sampler=self.sampler)


@dataclass(frozen=True)
class Sparsified:
    """What is left of a posterior.

    :param posterior: draws of the smaller network (of the same one with zeros, if nothing was cut).
    :param masks: by parameter of the network as it was, True for weights that are kept.
    :param before, after: sizes of the two networks; a parameter is nonzero if it is in any draw.
    """

    posterior: Posterior
    masks: dict[str, Tensor]
    before: Size
    after: Size

    def network(self, draw: int | None = None) -> nn.Module:
        """A plain network in eval mode: with the weights of one draw (of the first member), or with their mean."""
        stored = self.posterior.draw_source.stored
        assert stored is not None
        return network_of_draw(with_weight_sites(self.posterior.model), stored.draws(), stored.statistics(), draw)
