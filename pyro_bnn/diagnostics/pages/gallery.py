"""Figures for a page, each with its main numbers as text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from pyro_bnn.diagnostics import plots
from pyro_bnn.diagnostics.arviz.conversion import to_arviz
from pyro_bnn.diagnostics.checking.chains import comparable, convergence
from pyro_bnn.diagnostics.checking.checks import PROBES
from pyro_bnn.diagnostics.checking.training import loss_verdict
from pyro_bnn.diagnostics.pages.page import Picture
from pyro_bnn.diagnostics.plots.canvas import WIDTH
from pyro_bnn.diagnostics.scoring.calibration import reliability
from pyro_bnn.diagnostics.scoring.ood import auroc
from pyro_bnn.diagnostics.scoring.scored import Scored
from pyro_bnn.diagnostics.scoring.selective import aurc
from pyro_bnn.inputs import Inputs
from pyro_bnn.predicting import first_rows
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.sparsity.inclusion import has_inclusion

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction

#: level of the intervals that texts mention
_NAMED_LEVEL = 0.9


def calibration(scored: Scored, of: str = "") -> Picture:
    """Whether confidence matches the accuracy, or the level of intervals their coverage."""
    if scored.probs is not None:
        bins = reliability(scored.probs, scored.y)
        accuracy, confidence = 1 - float(scored.loss.mean()), float(scored.confidence.mean())
        return Picture(
            f"Reliability{of}",
            plots.plot_reliability(bins),
            f"Accuracy against confidence in {len(bins.count)} bins: accuracy {accuracy:.3f}, mean confidence "
            f"{confidence:.3f}, calibration error {bins.error:.3f}.",
            "On the dashed line the accuracy equals the confidence.",
        )
    if scored.pit is None:
        raise ValueError("there are neither class probabilities nor predictive distribution functions to draw")
    inside = float(((2 * scored.pit - 1).abs() <= _NAMED_LEVEL).double().mean())
    return Picture(
        f"Coverage of intervals{of}",
        plots.plot_calibration_curve(scored.pit.clamp(0, 1)),
        f"Share of data inside central intervals against their level: {inside:.1%} are inside the "
        f"{_NAMED_LEVEL:.0%} intervals.",
        "On the dashed line the coverage equals the level; above it intervals are too wide.",
    )


def selection(scored: Mapping[str, Scored]) -> Picture:
    """How much the loss falls if only the most confident predictions are kept."""
    areas = ", ".join(f"{name} {aurc(one.confidence, one.loss):.4g}" for name, one in scored.items())
    loss = "squared error" if next(iter(scored.values())).probs is None else "error"
    return Picture(
        "Risk and coverage",
        plots.plot_risk_coverage({name: (one.confidence, one.loss) for name, one in scored.items()}),
        f"Mean {loss} of the most confident predictions against the share that is kept. Area under the curve: {areas}.",
        "A curve that is low on the left shows that the most confident predictions are the best ones.",
    )


def elsewhere(scored: Scored, of: str = "") -> Picture:
    """Whether predictions are less certain for out-of-distribution inputs.

    :raises ValueError: when no such inputs were scored.
    """
    if scored.inside is None or scored.outside is None:
        raise ValueError("no out-of-distribution inputs were scored: give ood=")
    return Picture(
        f"Out-of-distribution inputs{of}",
        plots.plot_ood(scored.inside, scored.outside),
        f"Predictive entropy of {len(scored.inside):,} test inputs, mean {float(scored.inside.mean()):.3f} nats, "
        f"and of {len(scored.outside):,} others, mean {float(scored.outside.mean()):.3f} nats. AUROC "
        f"{auroc(scored.inside, scored.outside):.3f}.",
        "Inputs that differ from all training data should lie on the right.",
    )


def posterior_pictures(
    posterior: Posterior, x: Inputs, prediction: Prediction, y: Tensor, seed: int
) -> Iterator[Picture]:
    """Yields the figures of the posterior itself and of the run that found it.

    :param x: some test inputs, for the regression band if they are single numbers, and for R-hat.
    :param prediction: the prediction at x.
    :param y: the targets of x.
    """
    if _is_line(x, prediction):
        yield Picture(
            "Regression band",
            plots.plot_band(x, prediction, y),
            f"Mean and intervals of the prediction against the only input, with {len(y):,} test data.",
            "Intervals of y are blue; the uncertainty of the mean is hatched.",
        )
    if posterior.num_members > 1:
        distances = plots.member_distances(prediction)
        apart = distances[~torch.eye(len(distances), dtype=torch.bool, device=distances.device)]
        yield Picture(
            "Distances between members",
            plots.plot_particles(prediction),
            f"Distances between the predictions of all pairs of {posterior.num_members} members: between "
            f"{float(apart.min()):.3g} and {float(apart.max()):.3g}, on average {float(apart.mean()):.3g}.",
            "Members at distance 0 make the same predictions.",
        )
    if comparable(posterior):
        found = convergence(posterior, first_rows(x, PROBES), seed=seed)
        rhat, ess = (torch.as_tensor(found[name].values).flatten() for name in ("rhat", "ess_bulk"))
        moving = ess.isfinite() & rhat.isfinite()  # a class may have the same probability in all draws
        if bool(moving.any()):
            yield Picture(
                "Convergence",
                plots.plot_rhat(rhat[moving], ess[moving]),
                f"R-hat of the function at {PROBES} inputs, at most {float(rhat[moving].max()):.3f}, and its effective "
                f"sample size, at least {float(ess[moving].min()):.0f}, over {posterior.num_chains} chains.",
                "Chains agree where R-hat is below 1.01.",
            )
    if posterior.losses:
        losses = posterior.losses
        tail = losses[-max(1, len(losses) // 20) :]
        yield Picture(
            "Training",
            plots.plot_losses(losses, loss_verdict(losses)),
            f"Negative ELBO per datum over {len(losses):,} steps: {losses[0]:.4g} nats at the first, "
            f"{sum(tail) / len(tail):.4g} on average over the last {len(tail)}.",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its next release on import
        draws = to_arviz(posterior, x, groups="posterior", seed=seed)
    yield Picture(
        "Forest of sites",
        plots.plot_forest(draws),
        "Medians with central 50 % and 94 % intervals of scales, and of the mean and standard deviation of the weights "
        f"of each layer, over the draws of {posterior.num_members} member{'s' if posterior.num_members > 1 else ''}.",
    )
    if has_inclusion(posterior.model):
        inclusion = posterior.inclusion_probabilities()
        every = torch.cat([values.flatten() for values in inclusion.values()])
        yield Picture(
            "Inclusion",
            plots.plot_inclusion(inclusion),
            f"Posterior inclusion probabilities of {len(every):,} groups of weights: "
            f"{float((every > 0.5).float().mean()):.1%} are above one half.",
        )
    own = posterior.guide.figures() if isinstance(posterior.guide, MixtureGuide) else {}
    for name, figure in own.items():
        width, height = figure.get_size_inches()
        if width > WIDTH:  # scaling a wide figure down on the page would make its text too small
            figure.set_size_inches(WIDTH, height * WIDTH / width)
        yield Picture(name, figure, name)


def _is_line(x: Inputs, prediction: Prediction) -> TypeGuard[Tensor]:
    """Whether the prediction has one output and x one number per row."""
    one_input = isinstance(x, Tensor) and x[0].numel() == 1 and x.dim() <= 2
    return (
        one_input
        and prediction.likelihood is not None
        and (prediction.likelihood.kind != "classification" and prediction.mean[0].numel() == 1)
    )
