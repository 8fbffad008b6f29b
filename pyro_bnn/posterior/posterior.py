"""The result of every engine: an object that draws, predicts, saves itself and provides a Pyro guide."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from pyro.infer import MCMC
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, inputs, require_finite, targets
from pyro_bnn.posterior import foreign, network_outputs, own_draws, storage
from pyro_bnn.posterior.draw_source import POSTERIOR_DRAWS, DrawSource, with_members
from pyro_bnn.posterior.export.exporting import export
from pyro_bnn.posterior.export.plain_networks import plain_networks
from pyro_bnn.posterior.importance import ChainInclusion, Importance, chain_inclusion, excess_loss, importance
from pyro_bnn.posterior.prediction import Prediction
from pyro_bnn.posterior.statistics import Gathered
from pyro_bnn.posterior.stored_draws import DrawsGuide, require_chains
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded
from pyro_bnn.sparsity.channels import Size
from pyro_bnn.sparsity.inclusion import inclusion_log_odds
from pyro_bnn.sparsity.sparsify import network_of_draw, sparsify, with_weight_sites


class Posterior:
    """An approximate posterior of a Pyro model, whichever engine it came from.

    Several threads may share one: methods that run Pyro wait for each other, because Pyro's and torch's random states
    are global to the process. Model and guide keep their train or eval modes, so they may still be in training.

    :param model: a model of this package, or any Pyro model (``predict`` then needs ``return_site=``).
    :param guide: a Pyro guide for it: one of this package, an AutoGuide or a function.
    :param losses: negative ELBO per datum in nats, one for each training step.
    :param sampler: statistics of the sampler's run, by name: temperatures of SGHMC, divergences of NUTS.
    :param example: an input for guides that need one when they draw.
    :param store: the state of Pyro's parameter store with which a model or guide that is a function was trained.
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
        #: supplies draws in groups, and the traces of the guide
        self.draw_source = DrawSource(model, guide, example, store)

    @classmethod
    def from_mcmc(cls, mcmc: MCMC, model: Program) -> Posterior:
        """The posterior of a finished ``pyro.infer.MCMC`` run of ``model``: the draws of all its chains."""
        return cls.from_draws(model, mcmc.get_samples(), mcmc.num_chains, sampler=foreign.sampler_statistics(mcmc))

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
        """The posterior of draws ``{site: [n, *event]}`` in constrained space.

        :param draws: for a model of this package, they may keep the plate axes of size 1 that the model adds.
        :param num_chains: number of chains, which follow one another and have equal length.
        :param statistics: ``{buffer of the network: [n, *shape]}``, the statistics of normalisation layers with which
            each draw predicts; by default all draws use those of the network.
        :param is_sampled: ``True`` for draws of a sampler such as MCMC, whose chains can be compared and whose
            leave-one-out needs no correction for a guide; ``False`` for networks of an ensemble or draws from a guide.
        :param losses, sampler, store: see :class:`Posterior`.
        :raises ValueError: when sites lack draws, or the draws do not divide into the chains.
        """
        num_chains = checks.count("num_chains", num_chains)
        checks.truth("is_sampled", is_sampled)
        require_chains(draws, num_chains)
        guide = DrawsGuide(with_members(model, draws), model, num_chains, statistics, is_sampled)
        return cls(model, guide, losses=losses, sampler=sampler, store=store)

    @property
    def model(self) -> Program:
        """The Pyro model."""
        return self.draw_source.model

    @property
    def guide(self) -> Program:
        """A Pyro guide that returns one draw per call: ``Predictive(model, guide=posterior.guide, num_samples=...)``.

        Engines leave it in eval mode; a guide that was passed in train mode stays in it until ``eval()`` is called.
        ``Predictive`` uses the normalisation statistics of the network: only :meth:`predict` uses those of each draw.
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
        """Number of chains of the stored draws, which follow one another; 1 when a guide makes the draws."""
        return 1 if self.draw_source.stored is None else self.draw_source.stored.num_chains

    @property
    def is_sampled(self) -> bool:
        """Whether the draws are stored and come from a sampler, rather than from a guide or an ensemble."""
        return self.draw_source.stored is not None and self.draw_source.stored.is_sampled

    @property
    def is_deterministic(self) -> bool:
        """Whether all draws of a member are equal, as for particles and for a deterministic network."""
        return self.draw_source.is_deterministic

    def __repr__(self) -> str:
        return display.text(self.draw_source.title(), self.draw_source.fields(self.losses, self.sampler))

    def _repr_html_(self) -> str:
        return display.html_text(self.draw_source.title(), self.draw_source.fields(self.losses, self.sampler))

    # ------------------------------------------------------------------------------------------------- draws

    @one_at_a_time
    def draws(self, n: int, seed: int | None = None, *, example: Inputs = None) -> dict[str, Tensor]:
        """``{site: [n, members, *event]}``: n draws of each member; of stored draws, n evenly spaced ones.

        :param seed: makes the draws reproducible; :meth:`predict` with the same seed and number uses the same draws.
        :param example: an input, for guides of other packages that need one.
        :raises ValueError: when fewer than n draws are stored.
        """
        n = checks.count("n", n)
        groups = list(self.draw_source.groups(n, seed, example=example))
        return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}

    @one_at_a_time
    def sample(self, n: int, seed: int | None = None) -> dict[str, Tensor]:
        """``{site: [n, *event]}``: n draws from the posterior, each from a random member; see :meth:`draws`."""
        checks.seed("seed", seed)
        draws, member = self.draws(n, seed), self._random_members(n, seed)
        return {name: value[torch.arange(n), member.to(value.device) % value.shape[1]] for name, value in draws.items()}

    def _random_members(self, n: int, seed: int | None) -> Tensor:
        """The member of each of n draws, ``[n]``."""
        with seeded(device_of(self.model), None if seed is None else seed + 1):
            return torch.randint(self.num_members, (n,))

    @one_at_a_time
    def networks(self, n: int, seed: int | None = None) -> list[nn.Module]:
        """n plain networks in eval mode, without Pyro: each has the weights of one draw from a random member.

        Network i has the weights of draw i of :meth:`sample` with the same n and seed, in their full form (rank-1:
        ``W o (r s^T)``; low-rank: ``W_0 + scale B A``), and the normalisation statistics with which that draw predicts.
        It returns everything that the original network returns; ``output=`` does not apply.

        :raises TypeError: when the draws are not weights, as with MC dropout, or the model is not from this package.
        :raises ValueError: when fewer than n draws are stored.
        """
        n = checks.count("n", n)
        checks.seed("seed", seed)
        return plain_networks(self.draw_source, self._random_members(n, seed), seed)

    @one_at_a_time
    def export(
        self,
        example: Inputs,
        draws: int | None = None,
        outputs: str | Iterable[str] = ("mean", "epistemic"),
        seed: int | None = None,
    ) -> nn.Module:
        """One plain module ``{output: tensor}`` without Pyro, for ``torch.export``, ONNX and ``torch.compile``.

        It averages the draws of ``predict(x, draws, seed=seed)``, gives the same numbers for any number of samples, and
        checks neither NaN nor infinity. Networks of all rank-1 and low-rank draws share one W. See docs/guide.md.

        :param example: an input as for :meth:`predict`; the module is called as the network, on tensors of its dtypes
            and of its shapes but for axis 0. As many draws share a pass as fit the memory budget at its size.
        :param draws: of every member; by default those of :meth:`predict`.
        :param outputs: properties of :class:`Prediction`: ``mean``, ``probs``, ``entropy``, ``mutual_information``,
            ``aleatoric``, ``epistemic``, ``variance``, ``std``.
        :raises TypeError: for a model that is not of this package, or outputs that its likelihood does not have.
        :raises ValueError: for an unknown output, more draws than are stored, or an example that does not fit.
        :raises RuntimeError: when the network cannot be traced for any number of samples.
        """
        return export(self.draw_source, example, draws, outputs, seed)

    @one_at_a_time
    def as_draws(self, n: int, seed: int | None = None, *, example: Inputs = None) -> Posterior:
        """The same posterior as n stored draws of every member, a form in which any posterior can be saved.

        :param seed, example: see :meth:`draws`, also for the errors.
        """
        guide = self.draw_source.as_stored(n, seed, example=example)
        posterior = Posterior(self.model, guide, losses=self.losses, sampler=self.sampler)
        posterior.draw_source = self.draw_source.with_guide(guide)
        return posterior

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

        Each draw is one function: the same weights apply to all rows of x, whatever the ``batch_size``.

        :param x: tensor, array, frame or list with N samples on axis 0, on any device, or a dict or tuple of these;
            see :mod:`pyro_bnn.inputs`.
        :param num_samples: draws of every member; 1 for members that are points. By default 16, or all stored draws if
            these are fewer or not from a sampler (an ensemble, particles of your own model, ``as_draws`` of a guide).
        :param batch_size: number of rows in one pass; by default as many as fit a fixed memory budget.
        :param seed: makes the draws reproducible and leaves the global random state unchanged.
        :param return_site: for a model that is not from this package, the site whose values to return.
        :raises TypeError: when x does not hold numbers.
        :raises ValueError: for an empty x, NaN in x, ragged lists, more draws than are stored, or a wrong return_site.
        """
        batch_size = checks.optional(checks.count, "batch_size", batch_size)
        checks.seed("seed", seed)
        model, source, count = self.model, self.draw_source, self.draw_source.count(num_samples)
        x = inputs(x, like_of(model))
        network_outputs.require_network_input(model, x, return_site)
        if not isinstance(model, BayesianNetwork) or model.likelihood is None and return_site is not None:
            return Prediction(foreign.predict_site(source, x, count, seed, return_site), None)
        require_finite(x)
        return network_outputs.predict_network(source, x, count, batch_size, seed)

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

        :param x, y: data in the forms that :meth:`predict` and :func:`~pyro_bnn.inference.fit` accept.
        :param num_samples, batch_size, seed: see :meth:`predict`.
        :param observed_site: for your own model with several observed sites, the one that y belongs to; by default the
            one whose values equal y.
        :raises ValueError: for a y outside the likelihood's range, or when it is unclear which site observes y.
        """
        x, y = inputs(x, like_of(self.model)), targets(y, like_of(self.model))
        if not isinstance(self.model, BayesianNetwork):
            count = self.draw_source.count(num_samples)
            return foreign.log_likelihood(self.draw_source, x, y, count, seed, observed_site)
        network_outputs.require_observed(self.model, x, y, observed_site)
        prediction = self.predict(x, num_samples, batch_size, seed)
        return prediction.log_prob(y)

    def recompute_statistics(self, loader: Iterable[object] | None) -> None:
        """Gives every draw its own statistics of normalisation layers in later predictions, gathered over ``loader``.

        Every later prediction makes one pass over the loader for each draw. ``None`` restores the statistics of
        training, or those that a sampler stored with each draw.

        :param loader: gives batches (x, y), dicts with ``labels``, or x alone; it must allow repeated passes.
        """
        self.draw_source.gathered = None if loader is None else Gathered(loader)

    def compile(self, mode: Literal["default", "reduce-overhead"] = "default") -> None:
        """Later predictions are those of machine code of ``torch.compile``, equal but for rounding.

        It is made once for each shape, in seconds or minutes, by a C++ compiler. Where it cannot be, they warn.

        :param mode: ``"reduce-overhead"`` launches it by CUDA graphs.
        :raises TypeError: for a model that is not from this package.
        """
        checks.choice("mode", mode, ("default", "reduce-overhead"))
        self.draw_source.function = network_outputs.compiled_function(self.model, True if mode == "default" else mode)

    # ----------------------------------------------------------------------------------------------- sparsity

    @one_at_a_time
    def inclusion_probabilities(
        self, num_samples: int | None = None, seed: int | None = None, *, args: tuple[object, ...] = ()
    ) -> dict[str, Tensor]:
        """``{parameter: P(slab | data)}``: inclusion probabilities of all groups of a spike-and-slab prior.

        The mean over draws (of all members) of ``P(slab | weights)``, which has less variance than drawing indicators;
        groups that were removed have probability 0. Depending on the prior, a weight ``[out, in, k, k]`` has
        probabilities of shape ``[out, in, k, k]``, ``[out, in]`` (kernels), ``[in]`` or ``[out]``.

        :param num_samples: draws of each member; by default all, or 100. Of chains, all warn as inclusion_by_chain().
        :param args: the arguments with which to call a model that is not from this package.
        :raises ValueError: when the model has no spike-and-slab site.
        """
        if num_samples is None and self.num_chains > 1:
            return {name: of.probability.mean(0) for name, of in chain_inclusion(self.draw_source, args).items()}
        draws = self.draw_source.groups(self.draw_source.count_all(num_samples, POSTERIOR_DRAWS), seed)
        return {name: odds.sigmoid() for name, odds in inclusion_log_odds(self.model, draws, args).items()}

    @one_at_a_time
    def inclusion_by_chain(self, *, args: tuple[object, ...] = ()) -> dict[str, ChainInclusion]:
        """``{parameter: ChainInclusion}``: the same by each chain alone, and the Monte Carlo error of their mean.

        It warns when chains differ by more than 1/2 on a group: they have not found the same groups.
        """
        return chain_inclusion(self.draw_source, args)

    @one_at_a_time
    def importance(
        self,
        x: Inputs,
        y: object,
        *,
        least: float = 0.0,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
    ) -> dict[str, Importance]:
        """``{parameter: Importance}``: what each group of a spike-and-slab prior is worth, beside its inclusion.

        The loss of a group is the fall of the log predictive density, in nats per row, when its weights are put to 0 in
        all draws: a prediction for each group. An input that is never 0 may then seem to matter; ``check`` shuffles.

        :param x, y: rows to predict, held-out ones unless the fit itself is asked about.
        :param least: groups with a smaller inclusion probability are not visited, and have a loss of NaN.
        :param num_samples, batch_size, seed: see :meth:`predict`; by default all stored draws, or 100.
        :raises TypeError, ValueError: as :meth:`sparsify` and :meth:`log_likelihood`.
        """
        guide = self.draw_source.as_stored(self.draw_source.count_all(num_samples, POSTERIOR_DRAWS), seed)
        return importance(DrawSource(with_weight_sites(self.model), guide), x, y, least, batch_size)

    @one_at_a_time
    def sparsify(
        self,
        sparsity: float | None = None,
        *,
        example: Inputs = None,
        shrink: bool = True,
        num_samples: int | None = None,
        seed: int | None = None,
        data: tuple[Inputs, object] | None = None,
    ) -> Sparsified:
        """The posterior without the groups of weights that are probably in the spike, on a smaller network.

        Channels without remaining incoming or outgoing weights are cut in all draws, with their biases, their part of
        normalisation layers and the inputs of later layers. Cutting changes predictions only by rounding: the constant
        output of a channel without incoming weights moves to the biases of later layers, or else the channel stays.

        :param sparsity: the share of the weights with a spike-and-slab prior to remove, in the least probable groups;
            by default all groups with an inclusion probability below 1/2. Groups that training removed stay removed.
        :param example: an input (one row is enough), to count multiply-adds and find the output of such channels.
        :param shrink: whether to cut channels, for which ``torch.fx`` must be able to trace the network; ``False`` sets
            the removed weights to zero and keeps all shapes.
        :param num_samples: number of draws of each member; by default all stored draws, or 100.
        :param data: training data (x, y); with them it warns when their NLL grows by more than 0.05 nats per row.
        :raises TypeError: when the weights of the network are not sites of the model.
        :raises ValueError: without a spike-and-slab site, for a sparsity out of range, for a network that cannot be
            traced, or without ``example`` when it is needed.
        """
        checks.truth("shrink", shrink)
        model = with_weight_sites(self.model)
        guide = self.draw_source.as_stored(self.draw_source.count_all(num_samples, POSTERIOR_DRAWS), seed)
        full = DrawSource(model, guide)
        odds = inclusion_log_odds(model, full.groups(len(guide)))
        sparse = sparsify(model, guide.draws(), guide.statistics(), odds, sparsity, example=example, shrink=shrink)
        kept = DrawsGuide(sparse.draws, sparse.model, guide.num_chains, sparse.statistics, guide.is_sampled)
        posterior = Posterior(sparse.model, kept, losses=self.losses, sampler=self.sampler)
        excess = None if data is None else excess_loss(full, posterior.draw_source, data)
        return Sparsified(posterior, sparse.masks, sparse.before, sparse.after, excess)

    @one_at_a_time
    def save(self, path: str | os.PathLike[str], *, prior: bool = True) -> None:
        """Writes a folder with safetensors and JSON, completely or not at all; :func:`load` reads it.

        Likelihoods and priors of your own must be dataclasses, models and guides decorated with
        :func:`~pyro_bnn.storable`; import the modules that define them before you load the posterior.
        For any other Pyro model, the draws are saved, with the parameters and buffers of a model that is a module and
        the trained parameters of Pyro's store. The program itself is not saved: pass it to ``load(path, model=...)``.

        :param path: a folder, which may hold an older posterior. Other files in it stay.
        :param prior: ``False`` leaves the prior out; :func:`load` then needs ``prior=``.
        :raises TypeError: when model, guide, output or prior cannot be described in JSON; the message names the remedy.
        :raises FileExistsError: when ``path`` exists and is not a posterior.
        :raises OSError: when the disk cannot be written; the folder then holds either the older posterior or this one.
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
    """The result of :meth:`Posterior.sparsify`.

    :param posterior: draws of the smaller network (or of the same network with zeros, if nothing was cut).
    :param masks: ``{parameter of the original network: mask}``, True where a weight is kept.
    :param before, after: sizes of the two networks; a parameter counts as nonzero if it is nonzero in any draw.
    :param excess: by how much the NLL of ``data`` grew, in nats per row; ``None`` where none were given.
    """

    posterior: Posterior
    masks: dict[str, Tensor]
    before: Size
    after: Size
    excess: float | None = None

    def network(self, draw: int | None = None) -> nn.Module:
        """A plain network in eval mode: the weights of this draw of the first member, or the mean over all draws."""
        stored = self.posterior.draw_source.stored
        assert stored is not None
        return network_of_draw(with_weight_sites(self.posterior.model), stored.draws(), stored.statistics(), draw)
