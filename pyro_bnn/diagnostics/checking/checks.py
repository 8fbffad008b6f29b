"""Whether a posterior can be trusted, in plain words: one finding for each check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.diagnostics.arviz.densities import has_density
from pyro_bnn.diagnostics.checking.chains import FEWEST, comparable, convergence, effective_size, rhat_limit
from pyro_bnn.diagnostics.checking.findings import Finding, Findings, gravest_first
from pyro_bnn.diagnostics.checking.importance import fixed_weights, pareto_k
from pyro_bnn.diagnostics.checking.inclusion_checks import inclusion_findings
from pyro_bnn.diagnostics.checking.predictive_checks import ERRORS, Predicted, out_of_domain
from pyro_bnn.diagnostics.checking.training import loss_verdict
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior
from pyro_bnn.diagnostics.scoring.metrics import evaluate_with
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.posterior import Posterior, Prediction
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.predicting import (
    first_rows,
    input_batches,
    predict_batches,
    require_posterior,
    require_repeatable,
    rows_with_labels,
)
from pyro_bnn.randomness import some_seed

#: number of rows at which the functions of chains are compared
PROBES = 20
#: R-hat above which chains disagree badly
RHAT_BAD = 1.1
#: effective sample size that each chain should reach (Vehtari et al. 2021, section 4.1)
ESS = 100
#: number of coordinates whose mean effective sample size stands for all
COORDINATES = 20
#: epistemic share of the predictive uncertainty below which functions hardly differ, and below which they are equal
HARDLY, SAME = 1e-3, 1e-6
#: relative error of the temperature that step size and gradient noise may cause
HEAT = 0.1


def check(
    posterior: Posterior,
    data: Data = None,
    *,
    x_train: Inputs = None,
    y_train: object = None,
    ood: Data = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Findings:
    """Runs every check that applies to a posterior, and says what was found and what to do about it.

    ===============  ==============================================================================================
    training         whether the loss has converged (:func:`loss_verdict`)
    sampler          divergences of NUTS; temperatures of SGHMC within 10 % of their expected values
    convergence      R-hat and effective sample size of the function at 20 rows, if there are several chains
    fit              Pareto k-hat of a guide with a density; needs the training data
    inclusion        of a spike-and-slab prior: whether chains agree; whether the training data lose more than 0.05 nats
                     per row without what is probably in the spike; whether each included input gains two standard
                     errors on ``data``
    spread           whether the draws are different functions
    accuracy         whether predictions beat the most frequent class, or the mean of y, by three standard errors of
                     the difference
    calibration      whether the mean confidence matches the accuracy, or the coverage of 95 % intervals their level,
                     within three standard errors; the error includes both the noise of the labels and the spread of
                     the functions
    out of domain    AUROC of the predictive entropy between ``data`` and ``ood``
    ===============  ==============================================================================================

    :param data: held-out data, as for :func:`evaluate`; without it only training, sampler and fit are checked.
    :param x_train, y_train: all training data, ``[num_data, ...]``.
    :param ood: out-of-distribution inputs.
    :param num_samples: draws from every member, for predictions.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :param metrics: what :func:`evaluate` returned with the same settings, if that is already known.
    :returns: findings, the worst first.
    :raises TypeError: when ``posterior`` is not a posterior, or data or ood is an iterator, which can be read only
        once.
    :raises ValueError: when data is empty or a prediction holds NaN, only one of x_train and y_train is given, they do
        not have all ``num_data`` rows, or ood is given for a regression.
    """
    require_posterior(posterior)
    require_repeatable(data, "data")
    require_repeatable(ood, "ood")
    if (x_train is None) != (y_train is None):
        raise ValueError("only one of x_train and y_train was given: give both, or neither")
    count, seed = posterior.draw_source.count(num_samples), some_seed(seed)
    settings: dict[str, Any] = {"num_samples": count, "batch_size": batch_size, "seed": seed}
    findings = [*_training(posterior), *_sampler(posterior), *_fit(posterior, x_train, y_train, batch_size, seed)]
    findings += inclusion_findings(posterior, data, x_train, y_train, count, batch_size, seed)
    if data is not None:
        predicted = Predicted()
        probes: list[Inputs] = []

        def add(x: Inputs, prediction: Prediction, y: Tensor) -> None:
            predicted.add(prediction, y)
            if not probes:
                probes.append(first_rows(x, PROBES))

        if metrics is None:
            found = evaluate_with(add, posterior, data, ood, **settings)
        else:
            found = dict(metrics)
            for batch in predict_batches(posterior, data, **settings):
                add(*batch)
        if not probes:
            raise ValueError("data is empty: check needs at least one row; look at the filter or split that made it")
        findings += _chains(posterior, probes[0], batch_size, seed)
        findings += [*_spread(found, count * posterior.num_members), *predicted.findings()]
        if "ood_auroc" in found:
            foreign = predicted.rows if ood is None else _rows_that_count(posterior, ood, batch_size)
            findings += out_of_domain(found, predicted.rows, foreign)
    return gravest_first(findings)


def _rows_that_count(posterior: Posterior, ood: Data, batch_size: int | None) -> int:
    """The number of rows, but for those that come with labels of which all are masked."""
    total = 0
    for x, y in input_batches(ood, batch_size):
        rows = None if y is None else rows_with_labels(posterior.model, y)
        total += count_rows(x) if rows is None else int(rows.sum())
    return total


def _training(posterior: Posterior) -> Iterator[Finding]:
    if not posterior.losses:
        return
    verdict = loss_verdict(posterior.losses)
    topic = "training"
    moved = f"the loss changed by {verdict.change:+.3g} nats per datum over the second half of training"
    match verdict.state:
        case "converged":
            yield Finding("good", topic, f"The loss has converged to {verdict.level:.4g} nats per datum.")
        case "falling":
            yield Finding(
                "warning",
                topic,
                f"The loss has not converged: {moved}, to {verdict.level:.4g}.",
                "Train for more epochs, or with a larger learning rate that decays to zero.",
            )
        case "rising":
            yield Finding(
                "warning",
                topic,
                f"The loss rises: {moved}, to {verdict.level:.4g}.",
                "Lower the learning rate. With kl_annealing a rise is expected while the weight of the prior grows.",
            )
        case "diverged":
            yield Finding(
                "problem",
                topic,
                "The last loss is not finite.",
                "Lower the learning rate, and check the data for NaN.",
            )
        case "unknown":
            steps = len(posterior.losses)
            yield Finding("note", topic, f"{steps} steps are too few to tell whether the loss has converged.")


def _sampler(posterior: Posterior) -> Iterator[Finding]:
    run, topic = posterior.sampler, "sampler"
    if "divergences" in run:
        yield (
            Finding(
                "warning",
                topic,
                f"{run['divergences']:.0f} transitions of NUTS diverged: parts of the posterior were not reached.",
                "Raise target_accept_prob, or reparametrise the model.",
            )
            if run["divergences"]
            else Finding("good", topic, "No transition diverged.")
        )
    if "kinetic temperature" in run and run["temperature"] > 0:
        ratios = {
            "kinetic": run["kinetic temperature"] / run["expected kinetic temperature"],
            "configurational": run["configurational temperature"] / run["temperature"],
        }
        text = " and ".join(f"the {name} temperature is {ratio:.2f}" for name, ratio in ratios.items())
        noise = _noise_of_heat(posterior)
        if noise > 1:
            yield Finding("note", topic, f"Relative to the expected values, {text}; there are too few draws to judge.")
        elif all(abs(ratio - 1) <= HEAT + noise for ratio in ratios.values()):
            yield Finding("good", topic, f"Relative to the expected values, {text}.")
        else:
            yield Finding(
                "warning",
                topic,
                f"The chain samples at the wrong temperature: relative to the expected values, {text}.",
                "Too hot: use a smaller step_size or larger batches (gradient noise heats the chain). Configurational "
                "temperature too cold: use more warm-up, as the chain has not yet left its start.",
            )


def _noise_of_heat(posterior: Posterior) -> float:
    """Three standard errors of the mean of ``(theta - theta_0) * grad U``, whose variance is 3 T^2 per coordinate.

    The number of draws is their effective sample size, estimated from a few coordinates.
    """
    if not isinstance(posterior.guide, DrawsGuide) or (posterior.num_stored or 0) < 2 * FEWEST * posterior.num_chains:
        return math.inf
    draws = posterior.guide.draws()
    coordinates = sum(value[0].numel() for value in draws.values())
    some = torch.cat([value.flatten(1)[:, :COORDINATES] for value in draws.values()], 1)[:, :COORDINATES]
    return ERRORS * math.sqrt(3 / (coordinates * max(1.0, effective_size(some, posterior.num_chains))))


def _fit(posterior: Posterior, x: Inputs, y: object, batch_size: int | None, seed: int) -> Iterator[Finding]:
    inside = posterior.posterior if isinstance(posterior, ScaledPosterior) else posterior
    if x is None or y is None or not has_density(inside):
        return
    found = pareto_k(inside, x, y, batch_size=batch_size, seed=seed)
    if found.k < found.good:
        fixed = fixed_weights(inside)
        given = f", given the {fixed:,} parameters of the network that are not random" if fixed else ""
        yield Finding("good", "fit", f"k-hat is {found.k:.2f}: the guide is close to the posterior{given}.")
    else:
        yield Finding(
            "note",
            "fit",
            f"k-hat is {found.k:.2f}, above {found.good:.2f}: in the space of weights the guide is far from the "
            "posterior, as for nearly every network.",
            "Do not reweight draws or compare models by the ELBO; judge predictions on held-out data.",
        )


def _chains(posterior: Posterior, probes: Inputs, batch_size: int | None, seed: int) -> Iterator[Finding]:
    topic = "convergence"
    if not posterior.is_sampled:
        return
    if posterior.num_chains < 2:
        yield Finding(
            "note",
            topic,
            "All draws come from one chain, so nothing shows whether another chain would agree.",
            "Sample with num_chains=4, or give several runs to convergence().",
        )
        return
    if not comparable(posterior):
        yield Finding(
            "warning",
            topic,
            f"{posterior.num_stored} draws of {posterior.num_chains} chains are too few to compare the chains.",
            "Draw more: 500 or more from each chain.",
        )
        return
    found = convergence(posterior, probes, batch_size=batch_size, seed=seed)
    rhat, ess = float(found["rhat"].max()), float(found["ess_bulk"].min())
    limit = rhat_limit(posterior.num_stored or 0, posterior.num_chains, found["rhat"].size)
    wanted = ESS * posterior.num_chains
    text = f"R-hat of the functions is at most {rhat:.3f}, the effective sample size at least {ess:.0f}"
    if rhat <= limit and ess >= wanted:
        yield Finding("good", topic, f"{text}, over {posterior.num_chains} chains.")
    else:
        yield Finding(
            "problem" if rhat > RHAT_BAD else "warning",
            topic,
            f"{text}; they should be at most {limit:.3f} and at least {wanted}.",
            "Sample longer. If R-hat does not fall, the chains are in different modes, and more chains are needed.",
        )


def _spread(metrics: Mapping[str, float], functions: int) -> Iterator[Finding]:
    topic = "spread"
    if functions == 1:
        yield Finding("note", topic, "One function makes all predictions: there is no epistemic uncertainty.")
        return
    share = metrics["epistemic"] / max(metrics["epistemic"] + metrics["aleatoric"], 1e-30)
    if share < SAME:
        yield Finding(
            "warning",
            topic,
            f"All {functions} draws are the same function: the posterior has collapsed to a point.",
            "This is expected of a point guide; otherwise check the guide's scales, the repulsion of the particles or "
            "the step size.",
        )
        return
    disagree = f"; they disagree on {metrics['disagreement']:.1%} of labels" if "disagreement" in metrics else ""
    if share < HARDLY:
        yield Finding(
            "note",
            topic,
            f"The differences between {functions} functions are {share:.1g} of the predictive uncertainty{disagree}: "
            "hardly more than for one function.",
            "With much data this may be correct; out-of-distribution inputs (ood=) should show more.",
        )
    else:
        yield Finding(
            "good",
            topic,
            f"The differences between {functions} functions are {share:.1%} of the predictive uncertainty{disagree}.",
        )
