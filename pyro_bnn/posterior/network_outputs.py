"""Outputs of a network under many draws of its weights, in pieces that fit a memory budget."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bnn import display
from pyro_bnn.entry.checks import Compile
from pyro_bnn.given.next_tokens import require_next_tokens
from pyro_bnn.inputs import Inputs, naming_shapes
from pyro_bnn.modes import evaluating
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.perturb.samples import batched
from pyro_bnn.posterior import draw_source
from pyro_bnn.posterior.prediction import Prediction
from pyro_bnn.precision import widened
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.recording.recorded import Recorded

#: predictions of one shape after which the compiled function is compared with the model again
VERIFY_EVERY = 100


def require_network_input(model: Program, x: Inputs, return_site: str | None) -> None:
    """Checks what a prediction with a model of this package is given; other models define their own input.

    :raises ValueError: for an empty x, or a site other than the likelihood.
    """
    if not isinstance(model, BayesianNetwork):
        return
    if not count_samples(x):
        raise ValueError("x is empty: give at least one row; check the filter or split that produced it")
    if return_site is not None and model.likelihood is not None:
        raise ValueError(
            f"return_site={return_site!r} is for your own Pyro models: a model of this package predicts at its "
            "likelihood; posterior.draws(n) returns its other sites"
        )


def require_observed(model: BayesianNetwork, x: Inputs, y: Tensor, observed_site: str | None) -> None:
    """Checks what a log-likelihood with a model of this package is given.

    :raises ValueError: for a named site, when x and y have different numbers of samples, or when y holds the tokens of
        x where a causal language model predicts the next ones.
    """
    if observed_site is not None:
        raise ValueError(
            f"observed_site={observed_site!r} is for your own Pyro models: a model of this package observes y only "
            "at its likelihood; leave it out"
        )
    count_samples(x, y)
    if model.likelihood is not None:
        require_next_tokens(model.core().net, x, y, model.likelihood.labelled(y))


def predict_network(
    source: draw_source.DrawSource,
    x: Inputs,
    count: int,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Prediction:
    """The predictive distribution of a network of this package at x, from ``count`` draws of every member."""
    model = source.model
    assert isinstance(model, BayesianNetwork)
    outputs, noise = [], []
    with torch.no_grad(), evaluating(model), naming_shapes(x):
        for group, index in source.indexed_groups(count, seed, example=x):
            if model.site("noise") in group:
                noise.append(group[model.site("noise")])
            before = _versions(group)
            for part in source.statistics.parts(model, group, index):
                outputs.append(network_outputs(model, part, x, source.num_members, batch_size, source.function))
            source.lends_views = before is not None and before == _versions(group)
    return Prediction(torch.cat(outputs), model.likelihood, torch.cat(noise) if noise else None)


def _versions(draws: dict[str, Tensor]) -> list[int] | None:
    """Numbers that change with each write into a draw; ``None`` for tensors that have none."""
    if any(value.is_inference() for value in draws.values()):
        return None
    return [value._version for value in draws.values()]


def network_outputs(
    model: BayesianNetwork,
    latents: dict[str, Tensor],
    x: Inputs,
    num_members: int,
    batch_size: int | None = None,
    function: draw_source.Function | None = None,
) -> Tensor:
    """Outputs of the network under every draw, ``[n, members, N, *output]``.

    :param latents: ``{site: [n, members, *event]}``.
    :param x: an input with N samples, on the device of the network.
    :param num_members: members of each draw, for the memory budget.
    :param batch_size: samples in one pass; by default as many as fit the budget.
    :param function: in the place of that of the model.
    """
    function = model.function if function is None else function
    size = count_samples(x)
    count = next(iter(latents.values())).shape[0]
    row = model.core().activation_elements(x, size)
    fitting = max(1, draw_source.MAX_ELEMENTS // (row * num_members))  # rows of one draw
    rows = min(size, batch_size or fitting)
    step = max(1, fitting // rows)
    groups = []
    for i in range(0, count, step):
        part = {name: model.plated(value[i : i + step]) for name, value in latents.items()}
        blocks = []
        for start in range(0, size, rows):
            stop = min(size, start + rows)
            piece = x if rows == size else _rows(x, size, start, stop)
            f = widened(function(piece, part, stop - start), model.like())
            blocks.append(f.reshape(f.shape[:2] + f.shape[-model.members_dim :]))
        groups.append(torch.cat(blocks, 2) if len(blocks) > 1 else blocks[0])
    return torch.cat(groups) if len(groups) > 1 else groups[0]


def _rows(x: Inputs, size: int, start: int, stop: int) -> object:
    return pytree.tree_map(lambda t: t[start:stop] if batched(t, size) else t, x)


def compiled_function(model: Program, compiles: Compile) -> draw_source.Function:
    """``model.function``, compiled once for each shape of its arguments.

    :raises TypeError: for a model that is not from this package.
    """
    if not isinstance(model, BayesianNetwork):
        raise TypeError(
            f"compile() is for models of this package, which know their network, not {display.name_of(model)}"
        )
    recorded = Recorded(
        lambda x, latents, size: (model.function(x, latents, size),),
        "a prediction",
        "auto",
        compiles=compiles,
        programs=[model],
        verify_every=VERIFY_EVERY,
        silence="Not calling posterior.compile()",
    )

    def function(x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        found = recorded(x, latents, size)
        if found is None or found[0] is None:
            return model.function(x, latents, size)
        return found[0]

    return function
