"""How much functions agree: a posterior with a reference, and the functions of one posterior with each other."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from pyro_bnn.diagnostics.scoring.precision import running_mean, wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities, member_probabilities, require_probabilities
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Data
from pyro_bnn.predicting import input_batches, kept, labelled, predict_batch, require_posterior
from pyro_bnn.randomness import some_seed

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior, Prediction


def agreement(prediction: Prediction | Tensor, reference: Prediction | Tensor) -> float:
    """Share of the inputs on which both have the same most probable class, in [0, 1].

    If several classes are equally probable, the first counts.

    :param prediction: a prediction of classes, or averaged class probabilities ``[N, C]``.
    :param reference: the same for the same inputs, such as the prediction of Hamiltonian Monte Carlo.
    :raises TypeError: for a prediction without classes.
    :raises ValueError: when the two differ in shape, or rows are not probabilities.

    Source: Izmailov et al. (2021), section 4 and appendix B.
    """
    return float(_same_class(*_both(prediction, reference)).mean())


def total_variation(prediction: Prediction | Tensor, reference: Prediction | Tensor) -> float:
    """The total variation distance (1/2) sum_c abs(p(c) - q(c)), averaged over the inputs, in [0, 1].

    Arguments, errors and source as for :func:`agreement`.
    """
    return float(_distance(*_both(prediction, reference)).mean())


def disagreement(prediction: Prediction) -> Tensor:
    """Share of the pairs of functions that have different most probable classes, for every label: ``[M]``.

    The F functions are the draws of all members. If n_c of them choose class c, this is
    1 - sum_c n_c (n_c - 1) / (F (F - 1)), in [0, F / (F - 1) (1 - 1/C)]. It is 0 with a single function.

    :param prediction: what ``Posterior.predict`` returns, for M labels in total.
    :raises TypeError: unless the likelihood is a classification.
    """
    probs = member_probabilities(prediction)
    functions, _, classes = probs.shape
    choice = probs.argmax(-1).T
    votes = wide(torch.zeros(len(choice), classes, device=choice.device))
    votes.scatter_add_(1, choice, torch.ones_like(choice, dtype=votes.dtype))
    pairs = functions * (functions - 1)
    return (pairs - (votes * (votes - 1)).sum(-1)) / max(1, pairs)


def compare_to_reference(
    posterior: Posterior,
    reference: Posterior,
    data: Data,
    *,
    num_samples: int | None = None,
    reference_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Compares a posterior with a reference by :func:`agreement` and :func:`total_variation`, batch by batch.

    :param reference: another posterior for the same task, such as one of Hamiltonian Monte Carlo.
    :param data: inputs, with labels or without: a loader, a dataset, one pair ``(x, y)``, or x as a tensor or dict. A
        pair of tensors is taken to be ``(x, y)``.
    :param num_samples: draws from every member of the posterior.
    :param reference_samples: draws of the reference; by default all stored draws, as after MCMC, otherwise
        ``num_samples``.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws of both posteriors; ``None`` takes a new one at each call.
    :returns: ``agreement`` and ``total_variation``. If a target has several labels, each of them counts.
    :raises TypeError: when data has another form, or the likelihood is not a classification.
    :raises ValueError: when data is empty, the classes differ, or a prediction holds NaN.

    Source: Izmailov et al. (2021), section 4 and appendix B.
    """
    require_posterior(reference)
    checks.optional(checks.count, "reference_samples", reference_samples)
    reference_samples = reference_samples or reference.num_stored or num_samples
    seed = some_seed(seed)
    means: dict[str, Metric] = {}
    for x, y in input_batches(data, batch_size):
        first = predict_batch(posterior, x, num_samples, batch_size, seed)
        second = predict_batch(reference, x, reference_samples, batch_size, seed)
        _require_classes(first, "compare_to_reference")
        there = None if y is None else labelled(first, y.to(first.outputs.device))
        p, q = (kept(one, there) for one in _both(first, second))
        if not len(p):
            continue
        means = means or {name: running_mean(p.device) for name in ("agreement", "total_variation")}
        means["agreement"].update(_same_class(p, q))
        means["total_variation"].update(_distance(p, q))
    return _computed(means)


def diversity(
    posterior: Posterior,
    data: Data,
    *,
    num_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """How different the functions of a posterior (the draws of all members) are, computed batch by batch.

    ===========================  ================================================================================
    ``kl_to_mean``               mean of KL(p_i || average of all p_j) over functions and data, in nats: the mutual
                                 information of label and weights
    ``disagreement``             share of data on which two distinct functions choose different classes, over all
                                 pairs, in [0, 1]; 0 with a single function
    ``error_rate``               mean error rate of a single function, in [0, 1]; only with y
    ``normalised_disagreement``  disagreement / error_rate: near 0 for copies of one function, near 1 or above for
                                 functions with unrelated errors; 0 if there are no errors; only with y
    ===========================  ================================================================================

    :param data: as for :func:`compare_to_reference`; y is used if the batches are pairs ``(x, y)``.
    :param num_samples: draws from every member.
    :param batch_size: the most rows in one forward pass.
    :param seed: of the draws; ``None`` takes a new one at each call.
    :returns: ``{name: value}`` with the names in the table.
    :raises TypeError: when data has another form, or the likelihood is not a classification.
    :raises ValueError: when data is empty or a prediction holds NaN.

    Source: Fort, Hu and Lakshminarayanan (2019), section 4.2; Depeweg et al. (2018) for the mutual information.
    """
    seed = some_seed(seed)
    means: dict[str, Metric] = {}
    for x, y in input_batches(data, batch_size):
        prediction = predict_batch(posterior, x, num_samples, batch_size, seed)
        if not means:
            _require_classes(prediction, "diversity")
            means = defaultdict(partial(running_mean, prediction.per_member.device))
        there = None if y is None else labelled(prediction, y.to(prediction.outputs.device))
        if there is not None and not there.any():
            continue
        means["kl_to_mean"].update(kept(prediction.mutual_information.flatten(), there))
        means["disagreement"].update(kept(disagreement(prediction), there))
        if y is not None:
            means["error_rate"].update(kept(_errors(prediction, y), there, axis=1))
    result = _computed(means)
    if "error_rate" in result:
        # Functions that are always right never disagree.
        result["normalised_disagreement"] = result["disagreement"] / (result["error_rate"] or 1)
    return result


def _require_classes(prediction: Prediction, what: str) -> None:
    if getattr(prediction.likelihood, "kind", None) != "classification":
        raise TypeError(
            f"{what} compares the classes that functions choose, but this posterior has {prediction.likelihood!r}: for "
            "a regression use evaluate(posterior, data)['epistemic'], the variance between functions"
        )


def _both(prediction: Prediction | Tensor, reference: Prediction | Tensor) -> tuple[Tensor, Tensor]:
    """Both as probabilities ``[M, C]`` on one device."""
    p, q = (wide(_averaged(one)) for one in (prediction, reference))
    if p.shape != q.shape:
        raise ValueError(
            f"the prediction is for {p.shape[0]} labels with {p.shape[1]} classes and the reference for {q.shape[0]} "
            f"with {q.shape[1]}; expected the same inputs and classes for both"
        )
    return p, q.to(p.device)


def _averaged(prediction: Any) -> Tensor:
    if not isinstance(prediction, Tensor) and hasattr(prediction, "probs"):
        return class_probabilities(prediction.probs, prediction.likelihood).flatten(0, -2)
    require_probabilities(prediction)
    return prediction


def _same_class(p: Tensor, q: Tensor) -> Tensor:
    return wide(p.argmax(-1) == q.argmax(-1))


def _distance(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def _errors(prediction: Prediction, y: Tensor) -> Tensor:
    choice = member_probabilities(prediction).argmax(-1)
    if y.numel() != choice.shape[1]:
        raise ValueError(
            f"y has shape {tuple(y.shape)}; the posterior predicts {choice.shape[1]} labels for its inputs"
        )
    return wide(choice != y.to(choice.device).flatten())


def _computed(means: dict[str, Metric]) -> dict[str, float]:
    if not means:
        raise ValueError("data is empty: give at least one row with a label; look at the filter or split that made it")
    return {name: float(metric.compute()) for name, metric in means.items()}
