"""Whether a posterior can be trusted, in plain words: one finding for each thing that was looked at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.diagnostics.chains import FEWEST, comparable, convergence, effective_size
from pyro_bnn.diagnostics.densities import has_density
from pyro_bnn.diagnostics.findings import SEVERITIES, Finding
from pyro_bnn.diagnostics.importance import pareto_k
from pyro_bnn.diagnostics.metrics import LEVEL, evaluate
from pyro_bnn.diagnostics.precision import wide
from pyro_bnn.diagnostics.probabilities import class_probabilities
from pyro_bnn.diagnostics.scores import interval_coverage
from pyro_bnn.diagnostics.stream import first_rows, predictions
from pyro_bnn.diagnostics.training import loss_verdict
from pyro_bnn.posterior import Posterior
from pyro_bnn.stored_draws import DrawsGuide

#: rows at which the functions of chains are compared
PROBES = 20
#: R-hat up to which chains agree (Vehtari et al. 2021), and from which they do not agree at all
RHAT, RHAT_BAD = 1.01, 1.1
#: effective draws that are wanted of each chain (Vehtari et al. 2021, section 4.1)
ESS = 100
#: coordinates whose effective sample size stands for that of all
COORDINATES = 20
#: relative error of a temperature that step size and gradient noise may leave
HEAT = 0.1
#: standard errors beyond which a share differs from its expectation
ERRORS = 3.0


def check(
    posterior: Posterior,
    data: Any = None,
    *,
    x_train: Any = None,
    y_train: Tensor | None = None,
    ood: Any = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Looks at all that can be looked at, and says what was found and what to do.

    ===============  ==============================================================================================
    training         whether the loss has come to rest (:func:`loss_verdict`)
    sampler          divergences of NUTS; temperatures of SGHMC within 10 % of what they should be
    convergence      R-hat and effective sample size of the function at 20 data, of a posterior of several chains
    fit              Pareto k-hat of a guide with a density; needs the training data
    spread           whether the draws are different functions
    accuracy         better than always the most frequent class, or than the mean of y, by three standard errors
    calibration      mean confidence against accuracy, or coverage of 95 % intervals, within three standard errors
    out of domain    AUROC of the predictive entropy between ``data`` and ``ood``
    ===============  ==============================================================================================

    :param data: held-out data, as for :func:`evaluate`; without them training, sampler and fit are looked at alone.
    :param x_train, y_train: all training data.
    :param ood: inputs from elsewhere.
    :param num_samples: draws from every member, for predictions.
    :param metrics: what :func:`evaluate` found with these settings, where that is known already.
    :returns: findings, the worst first.
    """
    count = posterior.number_of_draws(num_samples)
    settings: dict[str, Any] = {"num_samples": count, "batch_size": batch_size, "seed": seed}
    findings = [*_training(posterior), *_sampler(posterior), *_fit(posterior, x_train, y_train, batch_size, seed)]
    if data is not None:
        kind, sums, probes = _summed(posterior, data, settings)
        found = dict(metrics or evaluate(posterior, data, ood, **settings))
        findings += _chains(posterior, probes, batch_size, seed)
        findings += _spread(posterior, found, count * posterior.members)
        if kind == "classification":
            findings += [_better_than_the_largest_class(found, sums), _confidence(sums), *_ood(found)]
        else:
            findings += [_better_than_the_mean(sums), _coverage(sums, kind)]
    return sorted(findings, key=lambda finding: -SEVERITIES.index(finding.severity))


def _training(posterior: Posterior) -> Iterator[Finding]:
    if not posterior.losses:
        return
    verdict = loss_verdict(posterior.losses)
    topic = "training"
    moved = f"the loss changed by {verdict.change:+.3g} nats a datum over the second half of training"
    match verdict.state:
        case "converged":
            yield Finding("good", topic, f"The loss has come to rest at {verdict.level:.4g} nats a datum.")
        case "falling":
            yield Finding(
                "warning",
                topic,
                f"It has not come to rest: {moved}, to {verdict.level:.4g}.",
                "Train for more epochs, or with a larger learning rate that falls to zero.",
            )
        case "rising":
            yield Finding(
                "warning",
                topic,
                f"The loss rises: {moved}, to {verdict.level:.4g}.",
                "Lower the learning rate; with kl_annealing a rise while the weight of the prior grows is expected.",
            )
        case "diverged":
            yield Finding(
                "problem",
                topic,
                "The last loss is not finite.",
                "Lower the learning rate, and look at the data for NaN.",
            )
        case "unknown":
            steps = len(posterior.losses)
            yield Finding("note", topic, f"{steps} steps are too few to tell whether the loss has come to rest.")


def _sampler(posterior: Posterior) -> Iterator[Finding]:
    run, topic = posterior.sampler, "sampler"
    if run.get("divergences"):
        yield Finding(
            "warning",
            topic,
            f"{run['divergences']:.0f} transitions of NUTS diverged: parts of the posterior were not reached.",
            "Raise target_accept_prob, or reparametrise the model.",
        )
    if "kinetic temperature" in run and run["temperature"] > 0:
        ratios = {
            "kinetic": run["kinetic temperature"] / run["expected kinetic temperature"],
            "configurational": run["configurational temperature"] / run["temperature"],
        }
        text = " and ".join(f"the {name} temperature is {ratio:.2f}" for name, ratio in ratios.items())
        noise = _noise_of_heat(posterior)
        if noise > 1:
            yield Finding("note", topic, f"In units of what they should be, {text}; the draws are too few to judge it.")
        elif all(abs(ratio - 1) <= HEAT + noise for ratio in ratios.values()):
            yield Finding("good", topic, f"In units of what they should be, {text}.")
        else:
            yield Finding(
                "warning",
                topic,
                f"The chain samples another temperature: in units of what they should be, {text}.",
                "Too hot: a smaller step_size or larger batches (gradient noise heats). Configurational too cold: more "
                "warm-up, as the chain has not yet left its start.",
            )


def _noise_of_heat(posterior: Posterior) -> float:
    """Three standard errors of the mean of ``(theta - theta_0) * grad U``, whose variance is 3 T^2 a coordinate.

    Draws count with the effective sample size of some coordinates.
    """
    if not isinstance(posterior.guide, DrawsGuide) or (posterior.stored or 0) < 2 * FEWEST * posterior.chains:
        return math.inf
    draws = posterior.guide.draws()
    coordinates = sum(value[0].numel() for value in draws.values())
    some = torch.cat([value.flatten(1)[:, :COORDINATES] for value in draws.values()], 1)[:, :COORDINATES]
    return ERRORS * math.sqrt(3 / (coordinates * max(1.0, effective_size(some, posterior.chains))))


def _fit(posterior: Posterior, x: Any, y: Tensor | None, batch_size: int | None, seed: int) -> Iterator[Finding]:
    if x is None or y is None or not has_density(posterior):
        return
    found = pareto_k(posterior, x, y, batch_size=batch_size, seed=seed)
    if found.k < found.good:
        yield Finding("good", "fit", f"k-hat is {found.k:.2f}: the guide is close to the posterior.")
    else:
        yield Finding(
            "note",
            "fit",
            f"k-hat is {found.k:.2f}, above {found.good:.2f}: in the space of weights the guide is far from the "
            "posterior, as it is with nearly every network.",
            "Do not reweigh draws, nor trust the evidence bound to compare models; judge predictions by held-out data.",
        )


def _chains(posterior: Posterior, probes: Any, batch_size: int | None, seed: int) -> Iterator[Finding]:
    topic = "convergence"
    if not posterior.sampled:
        return
    if posterior.chains < 2:
        yield Finding(
            "note",
            topic,
            "All draws are of one chain, so nothing shows whether another would agree.",
            "Sample with num_chains=4, or give several runs to convergence().",
        )
        return
    if not comparable(posterior):
        yield Finding(
            "warning",
            topic,
            f"{posterior.stored} draws of {posterior.chains} chains are too few to compare them.",
            "Draw more: some hundred from each chain.",
        )
        return
    found = convergence(posterior, probes, batch_size=batch_size, seed=seed)
    rhat, ess = float(found["rhat"].max()), float(found["ess_bulk"].min())
    wanted = ESS * posterior.chains
    text = f"R-hat of the functions is at most {rhat:.3f}, the effective sample size at least {ess:.0f}"
    if rhat <= RHAT and ess >= wanted:
        yield Finding("good", topic, f"{text}, over {posterior.chains} chains.")
    else:
        yield Finding(
            "problem" if rhat > RHAT_BAD else "warning",
            topic,
            f"{text}; up to {RHAT} and at least {wanted} are wanted.",
            "Sample longer; if R-hat stays, chains are in different modes, and more of them are needed.",
        )


def _spread(posterior: Posterior, metrics: Mapping[str, float], functions: int) -> Iterator[Finding]:
    topic = "spread"
    if functions == 1:
        yield Finding("note", topic, "One function makes all predictions: there is no epistemic uncertainty.")
        return
    share = metrics["epistemic"] / max(metrics["epistemic"] + metrics["aleatoric"], 1e-30)
    if share < 1e-6:
        yield Finding(
            "warning",
            topic,
            f"All {functions} draws are the same function: the posterior has collapsed to a point.",
            "A point guide is meant to; else look at the guide's scales, the repulsion of particles or the step size.",
        )
    else:
        disagree = f", and disagree on {metrics['disagreement']:.1%} of labels" if "disagreement" in metrics else ""
        yield Finding("good", topic, f"{functions} functions hold {share:.1%} of the predictive uncertainty{disagree}.")


def _better_than_the_largest_class(metrics: Mapping[str, float], sums: Mapping[str, float]) -> Finding:
    base, accuracy = sums["largest class"], metrics["accuracy"]
    error = math.sqrt(base * (1 - base) / sums["count"])
    text = f"Accuracy is {accuracy:.1%}; always the most frequent class has {base:.1%}."
    if accuracy > base + ERRORS * error or accuracy == 1:
        return Finding("good", "accuracy", text)
    return Finding(
        "problem", "accuracy", text, "Nothing was learned: look at the labels, the learning rate and the prior's scale."
    )


def _better_than_the_mean(sums: Mapping[str, float]) -> Finding:
    variance = max(sums["variance"], 1e-30)
    text = (
        f"The mean squared error is {sums['squared error'] / variance:.1%} of that of always the mean of y (standard "
        f"error {sums['error of gain'] / variance:.1%})."
    )
    if sums["variance"] - sums["squared error"] > ERRORS * sums["error of gain"]:
        return Finding("good", "accuracy", text)
    return Finding(
        "problem", "accuracy", text, "Nothing was learned: look at the scale of y, the learning rate and the prior."
    )


def _confidence(sums: Mapping[str, float]) -> Finding:
    count, confidence, accuracy = sums["count"], sums["confidence"] / sums["count"], sums["correct"] / sums["count"]
    error = math.sqrt(max(sums["variance"], 0.25) / count**2)
    gap = confidence - accuracy
    text = f"Mean confidence is {confidence:.1%} at an accuracy of {accuracy:.1%} (standard error {error:.2%})."
    if abs(gap) <= ERRORS * error:
        return Finding("good", "calibration", text)
    if gap > 0:
        remedy = (
            "Too certain: scale_temperature or conformal sets, more members, or a prior that lets weights vary more."
        )
    else:
        remedy = (
            "Too uncertain: train longer, look at the temperature and at the scale of the prior, or scale_temperature."
        )
    return Finding("warning", "calibration", text, remedy)


def _coverage(sums: Mapping[str, float], kind: str) -> Finding:
    share, count = sums["inside"] / sums["count"], sums["count"]
    error = math.sqrt(LEVEL * (1 - LEVEL) / count)
    text = f"Intervals that should hold {LEVEL:.0%} of y hold {share:.1%} (standard error {error:.2%})."
    if abs(share - LEVEL) <= ERRORS * error or kind == "count" and share > LEVEL:  # counts come in steps
        return Finding("good", "calibration", text)
    if share < LEVEL:
        remedy = "Too narrow: learn the noise (Gaussian(scale=None)), look for outliers, or use conformal intervals."
    else:
        remedy = "Too wide: the noise or the epistemic part is too large; train longer, or use conformal intervals."
    return Finding("warning", "calibration", text, remedy)


def _ood(metrics: Mapping[str, float]) -> Iterator[Finding]:
    auroc = metrics.get("ood_auroc")
    if auroc is None:
        return
    text = f"The entropy ranks foreign inputs above own ones with an AUROC of {auroc:.3f}."
    if auroc >= 0.9:
        yield Finding("good", "out of domain", text)
    elif auroc > 0.5:
        yield Finding(
            "note",
            "out of domain",
            text,
            "Look at the other scores of evaluate(); more members or particles often help.",
        )
    else:
        yield Finding(
            "warning",
            "out of domain",
            f"{text} It is more certain of foreign inputs than of its own.",
            "Do not use its uncertainty to reject inputs; look at the normalisation of both data sets.",
        )


def _summed(posterior: Posterior, data: Any, settings: dict[str, Any]) -> tuple[str, dict[str, float], Any]:
    """The kind of likelihood, sums over the labels, and the first rows of x."""
    sums: dict[str, float] = {"count": 0.0}
    labels, errors = [], []
    probes, kind = None, ""
    for x, prediction, y in predictions(posterior, data, **settings):
        if probes is None:
            probes = first_rows(x, PROBES)
        kind = str(getattr(prediction.likelihood, "kind", ""))
        if kind == "classification":
            confidence, predicted = class_probabilities(prediction.probs, prediction.likelihood).flatten(0, -2).max(-1)
            confidence = wide(confidence)
            part = {
                "confidence": confidence.sum(),
                "variance": (confidence * (1 - confidence)).sum(),
                "correct": (predicted == y.flatten()).sum(),
            }
        else:
            part = {"inside": interval_coverage(prediction.interval(LEVEL), y).sum()}
            errors.append((wide(prediction.mean) - y.reshape(prediction.mean.shape)).square().reshape(len(y), -1).cpu())
        labels.append(y.reshape(len(y), -1).cpu())
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        sums["count"] += y.numel()
    if not labels:
        raise ValueError("data is empty: check needs at least one row; look at the filter or split that made it")
    whole = torch.cat(labels)
    if kind == "classification":
        sums["largest class"] = float(torch.unique(whole, return_counts=True)[1].max()) / whole.numel()
    else:
        error, deviation = torch.cat(errors), wide(whole)
        gain = (deviation - deviation.mean(0)).square() - error.reshape(deviation.shape)
        sums["squared error"], sums["variance"] = float(error.mean()), float((gain + error.reshape(gain.shape)).mean())
        sums["error of gain"] = float(gain.mean(1).std(correction=0)) / math.sqrt(len(gain))
    return kind, sums, probes
