"""The source of draws: a guide that makes them, or the stored draws of a sampler or an ensemble."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.modes import keeping_modes, settle, training_mode
from pyro_bnn.posterior.statistics import Statistics, held_by
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.precision import full_precision
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program
from pyro_bnn.program.statements import NotTraceableError, plate, traced
from pyro_bnn.randomness import RandomState, derive_seeds, device_of, seeded

#: numbers held at once by one pass of prediction: weights of a group of draws, or the largest activation
MAX_ELEMENTS = 2**22
#: groups of draws that are held for all batches of a data set instead of being made anew for each
HELD_GROUPS = 4
# Default numbers of draws of each member (``num_samples=None``). See DrawSource.count and count_all.
#: for predictions, where every draw costs a pass of the network: the error of an average over S draws is 1 / sqrt(S) of
#: their standard deviation, a quarter with 16
PREDICTION_DRAWS = 16
#: for summaries of the posterior itself, such as means, inclusion probabilities and R-hat: this error is then a tenth
POSTERIOR_DRAWS = 100
#: for tails, such as 5 % quantiles (with 50 draws beyond each) and importance weights
TAIL_DRAWS = 1000
#: for the functions that a prior implies: 10 draws lie beyond their 5 % quantiles, enough to detect a factor of 2
PRIOR_DRAWS = 200

#: ``(x, latents, size) -> outputs`` of a network, as :meth:`~pyro_bnn.program.model.BayesianNetwork.function`
Function = Callable[[Inputs, dict[str, Tensor], int], Tensor]


class DrawSource:
    """Draws of all latent sites of a model, ``{site: [n, members, *event]}``, in groups that fit a memory budget.

    :param model: a model of this package, or any Pyro model.
    :param guide: a Pyro guide for it.
    :param example: an input for guides that need one when they draw.
    :param store: the state of Pyro's parameter store in which a model or guide that is a function was trained.
    """

    def __init__(self, model: Program, guide: Program, example: Inputs = None, store: Any = None) -> None:
        self.model, self.guide, self.example, self.store = model, guide, example, store
        #: what gives draws their statistics of normalisation layers, where that is not how they were stored
        self.gathered: Statistics | None = None
        #: whether stored draws are lent without a copy, since the network was seen not to write into its weights
        self.lends_views = False
        #: in the place of the function of a model of this package
        self.function: Function | None = None

    def with_guide(self, guide: Program) -> DrawSource:
        """The draws of another guide, for the same model in every other respect."""
        source = copy.copy(self)
        source.guide = guide
        return source

    @property
    def statistics(self) -> Statistics:
        """The statistics of normalisation layers with which each draw predicts."""
        return held_by(self.stored) if self.gathered is None else self.gathered

    @property
    def stored(self) -> DrawsGuide | None:
        """The stored draws; ``None`` when a guide makes them."""
        return self.guide if isinstance(self.guide, DrawsGuide) else None

    @property
    def num_members(self) -> int:
        """Number of mixture components or particles; 1 for a plain guide."""
        if self.stored is not None:
            return self.stored.num_members
        return self.guide.num_members if isinstance(self.guide, MixtureGuide) else 1

    @property
    def is_deterministic(self) -> bool:
        """Whether all draws of a member are equal, as for particles and for a deterministic network."""
        return isinstance(self.guide, MixtureGuide) and self.guide.is_deterministic

    def count(self, asked: int | None = None) -> int:
        """Number of draws of each member for a prediction: as asked, else 16, or all stored draws if there are fewer.

        Also all stored draws if they are not a chain: leaving out networks of an ensemble would change the method.
        1 if all draws of a member are equal.
        """
        return self.count_all(asked, PREDICTION_DRAWS, most=PREDICTION_DRAWS)

    def count_all(self, asked: int | None, default: int, *, most: int | None = None) -> int:
        """Number of draws of each member that represent the posterior: as asked, else all stored draws, or ``default``
        if a guide makes them.

        1 if all draws of a member are equal.

        :param most: largest number of stored draws of a chain when no number is asked for.
        """
        asked = checks.optional(checks.count, "num_samples", asked)
        if asked is None:
            asked = default if self.stored is None else len(self.stored)
            if self.stored is not None and self.stored.is_sampled and most is not None:
                asked = min(asked, most)
        return min(asked, 1) if self.is_deterministic else asked

    def groups(self, n: int, seed: int | None = None, *, example: Inputs = None) -> Iterator[dict[str, Tensor]]:
        """n draws of each member; of stored draws, evenly spaced ones. The group sizes depend only on the model.

        :raises ValueError: when fewer than n draws are stored.
        """
        return (draws for draws, _ in self.indexed_groups(n, seed, example=example))

    def indexed_groups(
        self, n: int, seed: int | None = None, *, example: Inputs = None
    ) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """As :meth:`groups`, with the positions ``[size]`` of stored draws; ``None`` when a guide makes the draws.

        All stored draws are views of these where ``lends_views``.
        """
        for start, size, own_seed in self._plan(n, seed):
            if self.stored is not None:
                index = torch.linspace(0, len(self.stored) - 1, n).round().long()[start : start + size]
                some = slice(start, start + size) if n == len(self.stored) and self.lends_views else index
                draws = {
                    name: value[some if isinstance(some, slice) else some.to(value.device)]
                    for name, value in self.stored.draws().items()
                }
                yield self._held(draws), index
            else:
                yield self._values(size, self._trace(size, own_seed, example)), None

    def title(self) -> str:
        """The first line of what a posterior shows of itself: the model, and its network."""
        of = f" of {display.name_of(self.model.core().net)}" if isinstance(self.model, BayesianNetwork) else ""
        return f"Posterior of {display.name_of(self.model)}{of}"

    def fields(self, losses: Sequence[float], sampler: Mapping[str, float]) -> dict[str, object]:
        """The fields below it, by name: of the model, the guide, the draws, and the run that made them."""
        found: dict[str, object] = dict(self.model.repr_fields()) if isinstance(self.model, BayesianNetwork) else {}
        members = display.plural(self.num_members, "member")
        if self.stored is None:
            draws = f"made by the guide, for {members}"
        else:
            chains = f" in {display.plural(self.stored.num_chains, 'chain')}" if self.stored.is_sampled else ""
            draws = f"{len(self.stored):,} stored{chains}, for {members}"
        is_own = isinstance(self.guide, (MixtureGuide, DrawsGuide))
        found |= {"guide": repr(self.guide) if is_own else display.name_of(self.guide), "draws": draws}
        if losses:
            steps = display.plural(len(losses), "step")
            found["training"] = f"{steps}, last loss {display.number(float(losses[-1]))} nats/datum"
        said = (f"{name} {display.number(value)}" for name, value in sampler.items())
        return found | {"sampler": ", ".join(said)}

    def as_stored(self, n: int, seed: int | None = None, *, example: Inputs = None) -> DrawsGuide:
        """n draws of each member, with the statistics of normalisation layers that were stored with them."""
        n = checks.count("n", n)
        groups = list(self.indexed_groups(n, seed, example=example))
        draws = {name: torch.cat([group[name] for group, _ in groups]) for name in groups[0][0]}
        if self.stored is None:
            return DrawsGuide(draws, self.model, is_sampled=False)
        index = torch.cat([index for _, index in groups if index is not None])
        held = self.stored.statistics()
        statistics = {name: value[index.to(value.device)] for name, value in held.items()}
        num_chains = self.stored.num_chains if n == len(self.stored) else 1
        return DrawsGuide(draws, self.model, num_chains, statistics, self.stored.is_sampled)

    def makes_all_at_once(self, n: int) -> bool:
        """Whether a guide makes n draws of each member from a seed alone, in few enough groups to hold them all.

        Not so for points, which are no draws and cost none.
        """
        makes = isinstance(self.model, BayesianNetwork) and isinstance(self.guide, MixtureGuide)
        if not makes or self.is_deterministic:
            return False
        return len(list(self._plan(n, 0))) <= HELD_GROUPS

    def by_chain(self) -> list[DrawSource]:
        """The draws of each chain on their own; all draws, once, where a guide makes them."""
        if self.stored is None:
            return [self]
        chains = self.stored.num_chains
        parts = {name: value.unflatten(0, (chains, -1)) for name, value in self.stored.draws().items()}
        return [
            DrawSource(self.model, DrawsGuide({name: part[i] for name, part in parts.items()}, self.model))
            for i in range(chains)
        ]

    def traces(
        self, n: int, seed: int | None = None, *, example: Inputs = None
    ) -> Iterator[tuple[dict[str, Tensor], list[poutine.Trace]]]:
        """The draws of :meth:`groups`, each group with the guide traces that it comes from.

        A group has one trace, with the draws in a plate on the left, or one trace for each draw.

        :raises TypeError: for stored draws, which no guide made.
        """
        if self.stored is not None:
            raise TypeError("the draws are stored, so there is no guide to trace: give a posterior whose guide draws")
        for _, size, own_seed in self._plan(n, seed):
            found = self._trace(size, own_seed, example)
            yield self._values(size, found), found

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, guide and model run without gradients, in eval mode and with their trained parameters.

        On exit their modes, Pyro's modes and its parameter store are restored. Other threads wait meanwhile.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_at_a_time)
            stack.enter_context(keeping_modes(self.model, self.guide))
            settle(self.model, self.guide)
            stack.enter_context(torch.no_grad())
            stack.enter_context(training_mode(False))
            stack.enter_context(pyro.get_param_store().scope(self.store))
            yield

    def _plan(self, n: int, seed: int | None) -> Iterator[tuple[int, int, int | None]]:
        """The start, the size and the seed of each group."""
        n = checks.count("num_samples", n)
        if self.stored is not None and n > len(self.stored):
            raise ValueError(
                f"num_samples={n}, but only {len(self.stored)} draws are stored: ask for no more than these"
            )
        if not isinstance(self.model, BayesianNetwork):
            return in_groups(n, 0, seed)
        return in_groups(n, self.num_members * sum(site.shape.numel() for site in self.model.sites()), seed)

    @property
    def _vectorises(self) -> bool:
        return isinstance(self.model, BayesianNetwork) and isinstance(self.guide, (MixtureGuide, AutoGuide))

    def _trace(self, n: int, seed: int | None, example: Inputs) -> list[poutine.Trace]:
        guide, model = self.guide, self.model
        example = self.example if example is None else example
        args = () if example is None else (inputs(example, like_of(model)),)
        with seeded(device_of(model), seed), self.running(), full_precision():
            if not self._vectorises:
                return [poutine.trace(guide).get_trace(*args) for _ in range(n)]
            assert isinstance(model, BayesianNetwork)
            every = guide.every_member() if isinstance(guide, MixtureGuide) else contextlib.nullcontext()
            like = model.like()

            def draw() -> None:
                with plate("_draws", n, model.members_dim - 1, like.device):
                    guide(*(like,) if isinstance(guide, MixtureGuide) else args)  # these guides do not use x

            with every:
                return [_traced(draw, like) if isinstance(guide, MixtureGuide) else poutine.trace(draw).get_trace()]

    def _values(self, n: int, traces: list[poutine.Trace]) -> dict[str, Tensor]:
        """``{site: [n, members, *event]}``."""
        model, values = self.model, [_latents(trace) for trace in traces]
        if not self._vectorises:
            stacked = {name: torch.stack([v[name] for v in values]) for name in values[0]}
            return self._held(with_members(model, stacked))
        assert isinstance(model, BayesianNetwork)
        shapes = {s.name: s.shape for s in model.sites()}
        plates = (n,) + (1,) * -model.members_dim
        draws = {
            name: _broadcast(value, plates + shapes[name]).reshape((n, -1) + shapes[name])
            for name, value in values[0].items()
            if name in shapes
        }
        return self._held(draws)

    def _held(self, draws: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.held(draws) if isinstance(self.model, BayesianNetwork) else draws


def in_groups(n: int, elements: int, seed: int | None = None) -> Iterator[tuple[int, int, int | None]]:
    """Splits n draws into groups that fit a fixed memory budget: ``(start, size, seed)`` of each, with its own seed.

    :param elements: number of elements of one draw.
    :raises ValueError: when n is not at least 1.
    """
    n = checks.count("num_samples", n)
    group = max(1, MAX_ELEMENTS // max(1, elements))
    starts = range(0, n, group)
    for start, own_seed in zip(starts, derive_seeds(seed, len(starts)), strict=True):
        yield start, min(group, n - start), own_seed


def _broadcast(value: Tensor, shape: torch.Size) -> Tensor:
    """The value with the axes of a shape, each as long as the longer of both."""
    if value.dim() == len(shape) and all(n in (1, own) for own, n in zip(value.shape, shape, strict=True)):
        return value  # most are: torch.broadcast_shapes takes 40 microseconds
    return value.expand(torch.broadcast_shapes(value.shape, shape))


def with_members(model: Program, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reshapes the draws of a trace or a sampler to ``{site: [n, members, *event]}``.

    :raises ValueError: when sites of the model are missing.
    """
    if not isinstance(model, BayesianNetwork):
        return {name: value.unsqueeze(1) for name, value in draws.items()}
    shapes = {s.name: s.shape for s in model.sites()}
    missing = [name for name in shapes if name not in draws]
    if missing:
        raise ValueError(f"the draws lack {len(missing)} sites of the model, the first is {missing[0]!r}")
    return {name: draws[name].reshape((draws[name].shape[0], -1) + shape) for name, shape in shapes.items()}


def _traced(draw: Callable[[], None], like: Tensor) -> poutine.Trace:
    """The trace of a guide of this package, by Pyro itself beside other handlers and for statements of Pyro in it."""
    if not poutine.runtime.am_i_wrapped():
        before = RandomState(like)
        try:
            return traced(draw, (), {})
        except NotTraceableError:
            before.restore()  # a seed gives the draws of Pyro's trace
    return poutine.trace(draw).get_trace()


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
