"""What a prior says before any data: the functions that it implies, and whether they are plausible."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_bnn.diagnostics.checking.findings import Finding, Findings
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inputs import Inputs, inputs, targets
from pyro_bnn.likelihoods import Bernoulli
from pyro_bnn.modes import frozen
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.posterior import Posterior, Prediction
from pyro_bnn.posterior.draw_source import MAX_ELEMENTS, PRIOR_DRAWS, in_groups
from pyro_bnn.posterior.foreign import predict_from_prior
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded, some_seed

#: probability of the central interval whose width measures the scale of a distribution
CENTRAL = 0.9
#: width of this interval for a standard Normal; dividing by it gives a robust standard deviation
NORMAL_WIDTH = 2 * math.sqrt(2) * float(torch.erfinv(torch.tensor(CENTRAL, dtype=torch.float64)))
#: distance of the data from the centre of the prior, in prior standard deviations: above FAR the data surprise the
#: prior, below NEAR the prior is vague
FAR, NEAR = 3.0, 0.1


@one_at_a_time
def prior_predictive(
    model: Program,
    x: Inputs,
    *,
    num_samples: int = PRIOR_DRAWS,
    batch_size: int | None = None,
    seed: int | None = None,
    return_site: str | None = None,
) -> Prediction:
    """The prior predictive distribution at x: functions ``f = net(x; w)`` with ``w ~ prior``, as a ``Prediction``.

    Parameters that are not latent sites keep their values in the network: the W of a rank-1 network, normalisation
    layers, the W_0 of Bella.

    :param model: a model of this package, or any Pyro model, which is called with x alone.
    :param x: tensor, array, frame, dict or tuple with N rows on axis 0.
    :param num_samples: number S of functions; ``.outputs`` is ``[S, 1, N, *output]``.
    :param batch_size: the most rows of x in one forward pass; by default as many as fit a fixed memory budget.
    :param seed: of the draws; ``None`` takes a new one at each call, from torch's global generator.
    :param return_site: for your own Pyro model, the site whose values are returned.
    :returns: a ``Prediction``, as ``Posterior.predict`` returns it.
    :raises TypeError: when ``model`` is not callable.
    :raises ValueError: for NaN in x, an improper prior (which has no draws), a ``return_site`` that is missing, that
        the model does not have, or that it observes without y, or ``return_site`` with a model of this package.
    """
    if not callable(model):
        raise TypeError(f"prior_predictive takes a Pyro model, got {type(model).__name__}")
    if not isinstance(model, BayesianNetwork):
        count = checks.count("num_samples", num_samples)
        with proper_priors():
            values = predict_from_prior(model, inputs(x, None), count, some_seed(seed), return_site)
        return Prediction(values, None)
    if return_site is not None:
        raise ValueError(
            f"return_site={return_site!r}: expected None, as a model of this package returns its functions; "
            "return_site is for models of your own"
        )
    parts = []
    with frozen(model):
        for draws in prior_draws(model, num_samples, some_seed(seed)):
            group = Posterior.from_draws(model, draws)
            parts.append(group.predict(x, len(next(iter(draws.values()))), batch_size))
    noise = [part.noise for part in parts if part.noise is not None]
    return Prediction(
        torch.cat([part.outputs for part in parts]), model.likelihood, torch.cat(noise) if noise else None
    )


@one_at_a_time
def prior_summary(
    model: BayesianNetwork,
    x: Inputs,
    y: object = None,
    *,
    num_samples: int = PRIOR_DRAWS,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Statistics of the functions that a prior implies at x. Functions that overflow count only in ``finite``.

    =====================  ==========================================================================================
    ``finite``             share of functions with finite outputs at all of x
    ``classes``            classification: their number C
    ``max_probability``    classification: mean over functions and rows of the largest class probability
    ``one_class``          classification: share of functions that assign all rows to one class
    ``entropy``            classification: entropy of the averaged probabilities in nats, mean over rows
    ``expected_entropy``   classification: entropy of a function's probabilities in nats, mean over functions and rows
    ``scale``              regression, counts: standard deviation over functions of the mean of y, in the unit of y,
                           median over rows
    ``distance``           regression, counts, with y: root mean square of ``(y - m) / s``, where m is the median and s
                           the standard deviation of the prior predictive distribution of each row, noise included
    =====================  ==========================================================================================

    Some priors have no variance, so standard deviations are robust: the distance between the 5 % and 95 % quantiles,
    divided by its value for a standard Normal (3.29). The variance of the estimated median (for a Normal,
    ``pi s^2 / 2`` over the number of functions) is subtracted from the mean square. For counts s is at least 1, their
    resolution.

    :param x: N rows, at least 2.
    :param y: targets of x; used by regressions and counts.
    :raises TypeError: for a model that is not of this package.
    :raises ValueError: for a model without a likelihood, fewer than 2 rows, or y that does not fit.
    """
    if not isinstance(model, BayesianNetwork):
        raise TypeError(
            f"check_prior takes one of pyro_bnn.models, got {type(model).__name__}: it cannot know what the outputs of "
            "another Pyro program mean. Look at prior_predictive(model, x, return_site=...)"
        )
    likelihood = model.likelihood
    if likelihood is None:
        raise ValueError(
            "the model has no likelihood, so it is unknown what its outputs mean: look at prior_predictive(...)"
        )
    x, y = inputs(x, like_of(model)), None if y is None else targets(y, like_of(model))
    if (rows := count_rows(x, y)) < 2:
        raise ValueError(f"x has {rows} rows: at least 2 are needed to see how a function differs from row to row")
    seed = some_seed(seed)
    everything = prior_predictive(model, x, num_samples=num_samples, batch_size=batch_size, seed=seed)
    finite = everything.per_member.isfinite().flatten(1).all(1) & everything.outputs.isfinite().flatten(1).all(1)
    numbers = {"finite": float(finite.double().mean())}
    if not finite.any():
        return numbers
    noise = None if everything.noise is None else everything.noise[finite]
    prediction = Prediction(everything.outputs[finite], likelihood, noise)
    if likelihood is not None and likelihood.kind == "classification":
        return numbers | _classes(prediction)
    mean = prediction.per_member[:, 0]
    numbers["scale"] = float(_scale(mean).median())
    if y is not None:
        likelihood.check(y, prediction.outputs[0, 0])
        drawn = prediction.sample(seed + 1)[:, 0].flatten(1)
        target = y.to(drawn).flatten()
        if target.shape != drawn.shape[1:]:
            raise ValueError(f"y has shape {tuple(y.shape)}; expected {tuple(mean.shape[1:])} for this network")
        s = _scale(drawn).clamp_min(1.0 if likelihood.kind == "count" else 0.0)
        squares = float(((target - drawn.median(0).values) / s).square().mean())
        numbers["distance"] = math.sqrt(max(0.0, squares - math.pi / (2 * len(drawn))))
    return numbers


@one_at_a_time
def check_prior(
    model: BayesianNetwork,
    x: Inputs,
    y: object = None,
    *,
    num_samples: int = PRIOR_DRAWS,
    batch_size: int | None = None,
    seed: int | None = None,
) -> Findings:
    """Whether the functions that a prior implies at x are plausible before any data.

    The statistics are those of ``prior_summary`` in the same module. These are reported:

    * **overflow**: any function that is infinite or NaN at x;
    * **saturation**: a mean largest probability above ``(1 + u) / 2``, half-way between certainty and ``u = H_C / C``
      (``H_C = 1 + 1/2 + ... + 1/C``), its value when class probabilities are uniform on the simplex;
    * **one class**: more than half of the functions assign all of x to one class;
    * a **preferred class**: ``exp(entropy)``, the effective number of classes, below 0.9 C (less for few functions);
    * **scale**: data more than 3 prior standard deviations from the centre of the prior, or less than a tenth of one.
      Under a Normal prior predictive distribution the first has a probability of 0.003 and the second of 0.08 if all
      rows move together, and less if rows differ.

    :param model: a model of this package with a likelihood.
    :param x: N rows, at least 2.
    :param y: targets of x, for the scale of a regression or counts.
    :param num_samples: number of functions drawn from the prior.
    :param batch_size: the most rows of x in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: the findings, with remedies.
    :raises TypeError: for a model that is not of this package.
    :raises ValueError: for a model without a likelihood, an improper prior, fewer than 2 rows, NaN in x, or y that does
        not fit.
    """
    settings: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed}
    numbers = prior_summary(model, x, y, **settings)
    found = Findings()
    if (infinite := 1 - numbers["finite"]) > 0:
        found.append(
            Finding(
                "problem" if infinite == 1 else "warning",
                "overflow",
                f"{infinite:.1%} of the prior's functions are infinite or NaN at some row of x.",
                "Give the prior lighter tails or smaller scales (see prior=), or use double precision.",
            )
        )
    if "max_probability" in numbers:
        found += _check_classes(numbers, round(numbers["finite"] * num_samples))
    elif "scale" in numbers:
        found += [_check_scale(numbers)]
    return found


def prior_draws(
    model: Program, n: int, seed: int | None = None, *, example: Inputs = None
) -> Iterator[dict[str, Tensor]]:
    """Yields n draws of all latent sites from the prior, ``{site: [group, 1, *event]}``, in groups of bounded size.

    :param example: the input for a model that is not of this package; ``None`` calls it without one.
    :raises ValueError: when n is not at least 1, or the prior is improper and has no draws.
    """
    elements = MAX_ELEMENTS  # so that a group has one draw, as a trace does
    if isinstance(model, BayesianNetwork):
        elements = sum(site.shape.numel() for site in model.sites())
    for _, size, own_seed in in_groups(n, elements, seed):
        with frozen(model), seeded(device_of(model), own_seed), torch.no_grad(), proper_priors():
            draws = _vectorised(model, size) if isinstance(model, BayesianNetwork) else _traced(model, example)
        yield draws


@contextlib.contextmanager
def proper_priors() -> Iterator[None]:
    """Context in which a prior without draws raises a ValueError that says what to do."""
    try:
        yield
    except NotImplementedError as error:
        raise ValueError(
            "the prior is improper (as with weight_prior=None) and has no draws: give all sites a proper one"
        ) from error


def _vectorised(model: BayesianNetwork, n: int) -> dict[str, Tensor]:
    device = str(model.like().device)
    draws = pyro.plate("_draws", n, dim=model.members_dim - 1, device=device)
    with poutine.block(), draws, pyro.plate(model.site("members"), 1, dim=model.members_dim, device=device):
        values = model.sample_latents()
    return {site.name: values[site.name].reshape((n, 1) + site.shape) for site in model.sites()}


def _traced(model: Program, example: Inputs) -> dict[str, Tensor]:
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        nodes: dict[str, Any] = poutine.trace(model).get_trace(*(() if example is None else (example,))).nodes
    return {
        name: site["value"][None, None]
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not poutine.util.site_is_subsample(site)
    }


def _scale(values: Tensor) -> Tensor:
    """Robust standard deviation along axis 0."""
    return central_width(values.flatten(1)) / NORMAL_WIDTH


def central_width(values: Tensor) -> Tensor:
    """``[draws, M] -> [M]``: width of the central interval of probability ``CENTRAL``."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    q = torch.tensor([(1 - CENTRAL) / 2, (1 + CENTRAL) / 2], dtype=values.dtype, device=values.device)
    # torch.quantile takes at most 2^24 numbers at a time
    columns = values.split(max(1, 2**24 // len(values)), 1)
    low, high = torch.cat([part.quantile(q, 0) for part in columns], 1)
    return high - low


def _classes(prediction: Prediction) -> dict[str, float]:
    probs = prediction.per_member[:, 0]
    if isinstance(prediction.likelihood, Bernoulli):
        probs = torch.stack((1 - probs, probs), -1)
    probs = probs.flatten(1, -2)
    decided = probs.argmax(-1)
    mean = probs.mean(0)
    return {
        "classes": float(probs.shape[-1]),
        "max_probability": float(probs.amax(-1).mean()),
        "one_class": float((decided == decided[:, :1]).all(1).double().mean()),
        "entropy": float(torch.special.entr(mean).sum(-1).mean()),
        "expected_entropy": float(torch.special.entr(probs).sum(-1).mean()),
    }


def _check_classes(numbers: dict[str, float], functions: int) -> list[Finding]:
    classes, certainty, one_class = int(numbers["classes"]), numbers["max_probability"], numbers["one_class"]
    uniform = sum(1 / k for k in range(1, classes + 1)) / classes
    bound, effective = (1 + uniform) / 2, math.exp(numbers["entropy"])
    found = [
        Finding(
            "warning",
            "saturation",
            f"before any data, a function of the prior gives its most probable class a probability of {certainty:.2f} "
            f"on average; above {bound:.2f} the prior is too certain.",
            "Scale the prior of weights by 1 / sqrt(fan in), or choose a smaller scale.",
        )
        if certainty > bound
        else Finding(
            "good",
            "saturation",
            f"a function of the prior gives its most probable class a probability of {certainty:.2f} on average, which "
            f"is at most {bound:.2f}, as it should be.",
        )
    ]
    if one_class > 0.5:
        found.append(
            Finding(
                "warning",
                "one class",
                f"{one_class:.0%} of the prior's functions assign all of x to one class, so they hardly depend on x.",
                "Give biases and the weights of the last layer a narrower prior, or standardise x.",
            )
        )
    # The average of a few one-hot functions has less entropy by chance, by about this much (Miller 1955).
    if effective < 0.9 * classes * math.exp(-(classes - 1) / (2 * functions)):
        found.append(
            Finding(
                "note",
                "preferred class",
                f"averaged over its functions, the prior has {effective:.1f} effective classes of {classes}: it "
                "prefers some class at these x, which is right only for a prior centred on a trained network.",
            )
        )
    return found


def _check_scale(numbers: dict[str, float]) -> Finding:
    scale, distance = numbers["scale"], numbers.get("distance")
    functions = f"functions of the prior have a standard deviation of {scale:.3g} at x"
    if distance is None:
        return Finding("note", "scale", f"{functions}; give y, to compare it with the data.")
    if distance > FAR:
        return Finding(
            "warning",
            "scale",
            f"{functions}, and the data lie {distance:.3g} prior standard deviations from the centre of the prior.",
            "Standardise y, or widen the prior.",
        )
    if distance < NEAR:
        return Finding(
            "warning",
            "scale",
            f"{functions}: the data lie within {distance:.2g} prior standard deviations of the centre of the prior, "
            "which finds far larger values just as probable.",
            "Scale the prior of weights by 1 / sqrt(fan in), or choose a smaller scale.",
        )
    return Finding(
        "good", "scale", f"{functions}, and the data lie {distance:.2g} prior standard deviations from its centre."
    )
