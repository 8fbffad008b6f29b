"""One object for what any engine found: it draws, predicts, and hands out a Pyro guide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, Predictive
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bnn.guide import MixtureGuide
from pyro_bnn.inclusion import inclusion_log_odds
from pyro_bnn.inputs import require_finite, to_device
from pyro_bnn.layer_statistics import gather_statistics
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.modes import evaluating, training_mode
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.prediction import Prediction
from pyro_bnn.probe import batched
from pyro_bnn.randomness import derive_seeds, device_of, seeded
from pyro_bnn.stored_draws import DrawsGuide

if TYPE_CHECKING:
    from pyro_bnn.sparsify import Sparsified

#: numbers held at once by one pass of prediction: weights of a group of draws, or the largest activation
MAX_ELEMENTS = 2**24


class Posterior:
    """An approximate posterior of a Pyro model, whatever engine it came from.

    :param model: a model of this package, or any Pyro model (``predict`` then needs ``return_site=``).
    :param guide: a Pyro guide for it: ours, an AutoGuide or a function.
    :param losses: negative ELBO per datum in nats, one for each training step.
    :param sampler: what a sampler says of its run, by name: temperatures of SGHMC, divergences of NUTS.
    :param example: an input for guides that need one when they draw.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        losses: Sequence[float] = (),
        sampler: Mapping[str, float] = MappingProxyType({}),
        example: Any = None,
    ) -> None:
        self.model, self._guide = model, guide
        self.losses, self.sampler = list(losses), dict(sampler)
        self._example = example
        self._statistics: Iterable[Any] | None = None
        self._store: Any = None
        for program in (model, guide):
            if isinstance(program, nn.Module):
                program.eval()

    @classmethod
    def from_mcmc(cls, mcmc: MCMC, model: Callable[..., Any]) -> Posterior:
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
        model: Callable[..., Any],
        draws: dict[str, Tensor],
        chains: int = 1,
        statistics: dict[str, Tensor] | None = None,
        *,
        sampled: bool = True,
    ) -> Posterior:
        """From draws ``{site: [n, *event]}``; plate axes of size 1 that a model of ours adds may be there.

        :param chains: how many chains they are of, chain after chain, all of one length.
        :param statistics: ``{buffer of the network: [n, *shape]}`` of normalisation layers, with which each draw
            predicts; by default all predict with those of the network.
        :param sampled: whether they are of a sampler of the posterior, as after MCMC, so that chains can be compared
            and leave-one-out needs no other weights; ``False`` for networks of an ensemble, or draws of a guide.
        :raises ValueError: when a site lacks draws, or they do not divide into the chains.
        """
        counts = {len(value) for value in draws.values()}
        if len(counts) != 1 or chains < 1 or counts.pop() % chains:
            raise ValueError(
                f"the sites have {sorted({len(v) for v in draws.values()})} draws, which are not {chains} chains of "
                "one length"
            )
        return cls(model, DrawsGuide(_with_members(model, draws), model, chains, statistics, sampled))

    @property
    def chains(self) -> int:
        """Number of chains that the stored draws are of, chain after chain; 1 for anything else."""
        return self._guide.chains if isinstance(self._guide, DrawsGuide) else 1

    @property
    def sampled(self) -> bool:
        """Whether the stored draws are of a sampler, rather than of a guide or an ensemble."""
        return isinstance(self._guide, DrawsGuide) and self._guide.sampled

    @property
    def guide(self) -> Callable[..., Any]:
        """A Pyro guide that gives one draw a call: ``Predictive(model, guide=posterior.guide, num_samples=...)``.

        Statistics of normalisation layers are then those of the network: only ``predict`` has those of each draw.
        """
        return self._guide

    @property
    def members(self) -> int:
        """Number of mixture components or particles; 1 for a plain guide."""
        if isinstance(self._guide, DrawsGuide):
            return int(next(iter(self._guide.draws().values())).shape[1])
        return self._guide.num_members if isinstance(self._guide, MixtureGuide) else 1

    @property
    def points(self) -> bool:
        """Whether every draw of a member is the same, as of particles and of a deterministic network."""
        return isinstance(self._guide, MixtureGuide) and self._guide.deterministic

    def number_of_draws(self, asked: int | None = None) -> int:
        """Of each member as asked, or 16, or fewer where fewer are stored; 1 where all draws are the same."""
        count = min(16, self.stored or 16) if asked is None else asked
        return min(count, 1) if self.points else count

    # ------------------------------------------------------------------------------------------------- draws

    @property
    def stored(self) -> int | None:
        """Number of stored draws of each member; ``None`` when draws come from a guide."""
        if not isinstance(self._guide, DrawsGuide):
            return None
        return int(next(iter(self._guide.draws().values())).shape[0])

    def draws(self, n: int, seed: int | None = None, *, example: Any = None) -> dict[str, Tensor]:
        """``{site: [n, members, *event]}``: n draws of each member. Of stored draws: n evenly spaced ones.

        :param seed: ``predict`` with the same seed uses these very draws.
        :param example: an input, for guides of other packages that need one.
        :raises ValueError: when fewer than n draws are stored.
        """
        groups = list(self.draw_groups(n, seed, example=example))
        return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}

    def draw_groups(self, n: int, seed: int | None = None, *, example: Any = None) -> Iterator[dict[str, Tensor]]:
        """The same draws in groups that fit a fixed memory budget, which depends on the model alone."""
        return (draws for draws, _ in self._groups(n, seed, example))

    def _groups(self, n: int, seed: int | None, example: Any) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """The groups of draws; for stored ones, with their indices."""
        for start, size, own_seed in self._plan(n, seed):
            if isinstance(self._guide, DrawsGuide):
                index = torch.linspace(0, (self.stored or 1) - 1, n).round().long()[start : start + size]
                yield {name: value[index.to(value.device)] for name, value in self._guide.draws().items()}, index
            else:
                yield self._values(size, self._traces(size, own_seed, example)), None

    def traces(
        self, n: int, seed: int | None = None, *, example: Any = None
    ) -> Iterator[tuple[dict[str, Tensor], list[poutine.Trace]]]:
        """The draws of :meth:`draw_groups`, each group with the traces of the guide that it comes from.

        A group has one trace, with the draws in a plate on the left, or one trace for each draw.

        :raises TypeError: for stored draws, which no guide made.
        """
        if isinstance(self._guide, DrawsGuide):
            raise TypeError("the draws are stored: there is no guide to trace")
        for _, size, own_seed in self._plan(n, seed):
            found = self._traces(size, own_seed, example)
            yield self._values(size, found), found

    def _plan(self, n: int, seed: int | None) -> Iterator[tuple[int, int, int | None]]:
        """Where each group starts, its size, and its seed."""
        if self.stored is not None and n > self.stored:
            raise ValueError(f"num_samples={n}, but only {self.stored} draws are stored")
        if not isinstance(self.model, BayesianNetwork):
            return in_groups(n, 0, seed)
        return in_groups(n, self.members * sum(site.shape.numel() for site in self.model.sites()), seed)

    def _traces(self, n: int, seed: int | None, example: Any) -> list[poutine.Trace]:
        guide, model = self._guide, self.model
        example = self._example if example is None else example
        if isinstance(model, BayesianNetwork) and example is not None:
            example = to_device(example, model.like())
        args = () if example is None else (example,)
        with seeded(device_of(self.model), seed), self._programs():
            if not self._vectorises:
                return [poutine.trace(guide).get_trace(*args) for _ in range(n)]
            assert isinstance(model, BayesianNetwork)
            every = guide.every_member() if isinstance(guide, MixtureGuide) else contextlib.nullcontext()
            if isinstance(guide, MixtureGuide):
                args = (model.like(),)  # nothing of x is used without rows
            with every, pyro.plate("_draws", n, dim=model.members_dim - 1, device=str(model.like().device)):
                return [poutine.trace(guide).get_trace(*args)]

    @property
    def _vectorises(self) -> bool:
        return isinstance(self.model, BayesianNetwork) and isinstance(self._guide, (MixtureGuide, AutoGuide))

    def _values(self, n: int, traces: list[poutine.Trace]) -> dict[str, Tensor]:
        """``{site: [n, members, *event]}``."""
        model, values = self.model, [_latents(trace) for trace in traces]
        if not self._vectorises:
            return _with_members(model, {name: torch.stack([v[name] for v in values]) for name in values[0]})
        assert isinstance(model, BayesianNetwork)
        shapes = {s.name: s.shape for s in model.sites()}
        return {
            name: v.expand(torch.broadcast_shapes(v.shape, _one_draw(n, model, shapes[name]))).reshape(
                (n, -1) + shapes[name]
            )
            for name, v in values[0].items()
            if name in shapes
        }

    def sample(self, n: int, seed: int | None = None) -> dict[str, Tensor]:
        """``{site: [n, *event]}``: n draws, each of a random member; a draw is a draw."""
        draws = self.draws(n, seed)
        with seeded(device_of(self.model), None if seed is None else seed + 1):
            member = torch.randint(self.members, (n,))
        return {name: value[torch.arange(n), member.to(value.device) % value.shape[1]] for name, value in draws.items()}

    # -------------------------------------------------------------------------------------------- prediction

    def predict(
        self,
        x: Any,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        *,
        return_site: str | None = None,
    ) -> Prediction:
        """The predictive distribution at x, from draws of every member.

        A draw is a whole function: the same for all rows of x and for every ``batch_size``.

        :param x: tensor, dict or tuple with N samples on axis 0, on any device.
        :param num_samples: draws of every member, 16 by default, as :meth:`number_of_draws` has it: particles and
            points have one, as all their draws are the same.
        :param batch_size: number of samples in one pass; by default what fits a fixed memory budget.
        :param seed: makes the draws reproducible, and leaves the global random state alone.
        :param return_site: for a model that is not of this package, the site whose values are wanted.
        :raises ValueError: for NaN in x, or when draws are asked for that are not stored.
        """
        model = self.model
        if not isinstance(model, BayesianNetwork) or model.likelihood is None and return_site is not None:
            return Prediction(self._foreign(x, self.number_of_draws(num_samples), seed, return_site), None)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a number of samples, at least 1")
        require_finite(x)
        like = model.like()
        x = to_device(x, like)
        outputs, noise = [], []
        with torch.no_grad(), evaluating(model):
            for group, index in self._groups(self.number_of_draws(num_samples), seed, x):
                if model.site("noise") in group:
                    noise.append(group[model.site("noise")])
                stored = self._guide.statistics() if isinstance(self._guide, DrawsGuide) else {}
                if self._statistics is None and not stored:
                    outputs.append(self._outputs(model, group, x, batch_size))
                    continue
                for i in range(len(next(iter(group.values())))):
                    one = {name: value[i : i + 1] for name, value in group.items()}
                    if self._statistics is not None:
                        gather_statistics(model, one, self._statistics)
                    elif index is not None:
                        buffers = dict(model.core().net.named_buffers())
                        for name, value in stored.items():
                            buffers[name].copy_(value[index[i]])
                    outputs.append(self._outputs(model, one, x, batch_size))
        return Prediction(torch.cat(outputs), model.likelihood, torch.cat(noise) if noise else None)

    def log_likelihood(
        self, x: Any, y: Tensor, num_samples: int | None = None, batch_size: int | None = None, seed: int | None = None
    ) -> Tensor:
        """``[draws, members, N]``: ``log p(y | x, weights)`` under every draw of every member, in nats."""
        if not isinstance(self.model, BayesianNetwork):
            return self._foreign_log_likelihood(x, y, self.number_of_draws(num_samples), seed)
        count_samples(x, y)
        prediction = self.predict(x, num_samples, batch_size, seed)
        return prediction.log_prob(y.to(prediction.outputs.device))

    def recompute_statistics(self, loader: Iterable[Any] | None) -> None:
        """From now on every draw predicts with normalisation statistics of its own, gathered over ``loader``.

        Costs one pass over the loader for each draw; ``None`` goes back to the statistics of training, or to those that
        a sampler stored with each draw.
        """
        self._statistics = loader

    def inclusion_probabilities(
        self, num_samples: int | None = None, seed: int = 0, *, args: tuple[Any, ...] = ()
    ) -> dict[str, Tensor]:
        """``{parameter: P(slab | data)}`` for every group of a spike-and-slab prior, shaped as the groups.

        The mean over draws (of all members) of ``P(slab | weights)``, which has less variance than to draw indicators;
        groups that were removed have 0. A weight ``[out, in, k, k]`` has groups ``[out, in, k, k]``, ``[out, in]``
        (kernels), ``[in]`` or ``[out]``.

        :param num_samples: draws of each member; by default all stored ones, or 100.
        :param args: what a model that is not of this package is called with.
        :raises ValueError: when the model has no spike-and-slab site.
        """
        return {n: odds.sigmoid() for n, odds in inclusion_log_odds(self, num_samples, seed, args).items()}

    def sparsify(
        self,
        level: float | None = None,
        *,
        example: Any = None,
        shrink: bool = True,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> Sparsified:
        """The posterior without the groups of weights that are probably spikes, on a smaller network.

        Channels go that no weight makes or none reads, with their biases, their part of normalisation layers, and the
        inputs of the next layers, in all draws alike. This changes no prediction beyond rounding: what a channel
        without weights still passes on moves into the biases of its readers, and where it cannot the channel stays.

        :param level: share of the weights with a spike-and-slab prior to remove, those of the least probable groups;
            by default all groups of a probability below 1/2. Groups that training removed go in any case.
        :param example: an input of the network (one row is enough), for multiply-adds and for channels without weights.
        :param shrink: whether to cut channels, which takes a network that ``torch.fx`` can trace; else masks alone.
        :param num_samples: draws of each member; by default all stored ones, or 100.
        :raises TypeError: when the model is not one whose weights are sites.
        :raises ValueError: without a spike-and-slab site, for a level out of range, a network that cannot be traced, or
            when an example is needed.
        """
        from pyro_bnn.sparsify import sparsify

        return sparsify(self, level, example=example, shrink=shrink, num_samples=num_samples, seed=seed)

    def _outputs(self, model: BayesianNetwork, latents: dict[str, Tensor], x: Any, batch_size: int | None) -> Tensor:
        size = count_samples(x)
        count = next(iter(latents.values())).shape[0]
        row = model.core().activation_elements(x, size)
        fitting = max(1, MAX_ELEMENTS // (row * self.members))  # rows of one draw
        rows = min(size, batch_size or fitting)
        step = max(1, fitting // rows)
        groups = []
        for i in range(0, count, step):
            part = {name: model.plated(value[i : i + step]) for name, value in latents.items()}
            blocks = []
            for start in range(0, size, rows):
                stop = min(size, start + rows)
                piece = x if rows == size else _rows(x, size, start, stop)
                f = model.function(piece, part, stop - start)
                blocks.append(f.reshape(f.shape[:2] + f.shape[-model.members_dim :]))
            groups.append(torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0])
        return torch.cat(groups) if len(groups) > 1 else groups[0]

    # ---------------------------------------------------------------------------- models of other packages

    def _foreign(self, x: Any, n: int, seed: int | None, site: str | None) -> Tensor:
        if site is None:
            raise ValueError(
                "predict() of a model that is not of this package needs return_site=, the name of the site wanted; "
                "diagnostics of predictions are for models of this package, which say what their outputs mean"
            )
        draws = {k: v[:, 0] for k, v in self.draws(n, seed, example=x).items()}
        with seeded(device_of(self.model), seed), self._programs():
            values = Predictive(self.model, posterior_samples=draws, return_sites=[site])(x)
        if site not in values:
            raise ValueError(f"the model has no site {site!r}")
        return values[site].unsqueeze(1)

    def _foreign_log_likelihood(self, x: Any, y: Tensor, n: int, seed: int | None) -> Tensor:
        draws = self.draws(n, seed, example=x)
        rows = []
        with self._programs():
            for i in range(n):
                conditioned = poutine.condition(self.model, {k: v[i, 0] for k, v in draws.items()})
                trace = poutine.trace(conditioned).get_trace(x, y)
                sites: list[Any] = list(trace.nodes.values())
                observed = [
                    site["fn"].log_prob(site["value"])
                    for site in sites
                    if site["type"] == "sample" and site["is_observed"] and _same_values(site["value"], y)
                ]
                if len(observed) != 1:
                    raise ValueError(f"expected one site that observes y, found {len(observed)}")
                rows.append(observed[0].reshape(-1))
        return torch.stack(rows).unsqueeze(1)

    def save(self, path: Any, *, prior: bool = True) -> None:
        """Writes a folder with safetensors and JSON, whole or not at all. See :func:`pyro_bnn.storage.save`."""
        from pyro_bnn.storage import save

        save(self, path, prior=prior)

    def keep_store(self, state: Any) -> None:
        """The parameter store in which programs that are functions were trained; they run in it from now on."""
        self._store = state

    @contextlib.contextmanager
    def _programs(self) -> Iterator[None]:
        """Where guide and model run: without gradients, in eval mode, with the parameters they were trained with."""
        with torch.no_grad(), training_mode(False), pyro.get_param_store().scope(self._store):
            yield

    def as_draws(self, n: int, seed: int | None = None) -> Posterior:
        """The same posterior as n stored draws of every member: the form that any guide can be saved in."""
        groups = list(self._groups(n, seed, None))
        draws = {name: torch.cat([group[name] for group, _ in groups]) for name in groups[0][0]}
        statistics = {}
        if isinstance(self._guide, DrawsGuide):
            index = torch.cat([index for _, index in groups if index is not None])
            statistics = {name: value[index.to(value.device)] for name, value in self._guide.statistics().items()}
        guide = DrawsGuide(draws, self.model, self.chains if n == self.stored else 1, statistics, self.sampled)
        return Posterior(self.model, guide, losses=self.losses, sampler=self.sampler)


def in_groups(n: int, elements: int, seed: int | None = None) -> Iterator[tuple[int, int, int | None]]:
    """``(start, size, seed)`` of groups of n draws that fit a fixed memory budget, with a seed of its own for each.

    :param elements: how many numbers a draw has.
    :raises ValueError: when n is not at least 1.
    """
    if n < 1:
        raise ValueError(f"num_samples={n!r}: expected at least one draw")
    group = max(1, MAX_ELEMENTS // max(1, elements))
    starts = range(0, n, group)
    for start, own_seed in zip(starts, derive_seeds(seed, len(starts)), strict=True):
        yield start, min(group, n - start), own_seed


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    nodes: dict[str, Any] = trace.nodes
    return {
        name: site["value"].detach()
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary")
        and type(site["fn"]).__name__ != "_Subsample"
    }


def _with_members(model: Callable[..., Any], draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """``{site: [n, members, *event]}`` from draws that a trace or a sampler gave."""
    if not isinstance(model, BayesianNetwork):
        return {name: value.unsqueeze(1) for name, value in draws.items()}
    shapes = {s.name: s.shape for s in model.sites()}
    missing = [name for name in shapes if name not in draws]
    if missing:
        raise ValueError(f"the draws lack {len(missing)} sites of the model, the first is {missing[0]!r}")
    return {name: draws[name].reshape((draws[name].shape[0], -1) + shape) for name, shape in shapes.items()}


def _one_draw(n: int, model: BayesianNetwork, shape: torch.Size) -> tuple[int, ...]:
    return (n,) + (1,) * -model.members_dim + shape


def _rows(x: Any, size: int, start: int, stop: int) -> Any:
    return pytree.tree_map(lambda t: t[start:stop] if batched(t, size) else t, x)


def _same_values(value: Tensor, y: Tensor) -> bool:
    return value.numel() == y.numel() and torch.equal(value.reshape(y.shape), y)
