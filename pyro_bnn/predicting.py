"""A posterior's predictions on data of any accepted form, one batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from pyro_bnn.distributed import ALONE, Processes
from pyro_bnn.entry import checks
from pyro_bnn.given.next_tokens import require_next_tokens
from pyro_bnn.inputs import (
    LABELS,
    Data,
    Inputs,
    inputs,
    is_array,
    is_numbers,
    labels,
    split,
    targets,
    tensors,
    without_labels,
)
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.perturb.samples import batched
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.model import BayesianNetwork, like_of

if TYPE_CHECKING:
    from pyro_bnn.posterior.prediction import Prediction

#: rows in one batch, if neither the caller nor a loader sets it
ROWS = 256


def predict_batches(
    posterior: Posterior,
    data: Data,
    *,
    num_samples: int | None,
    batch_size: int | None,
    seed: int,
    together: Processes = ALONE,
) -> Iterator[tuple[Inputs, Prediction, Tensor]]:
    """Yields ``(x, prediction, y)`` for every batch, as tensors on the device of the model.

    Every batch is predicted with the same seed, so the draws, and with them the functions, are the same in all batches.

    :param data: a ``DataLoader`` or another iterable of pairs ``(x, y)`` or of dicts with ``labels``, a ``Dataset`` of
        such, or one pair or dict itself. :mod:`pyro_bnn.inputs` says what x and y may be.
    :param together: processes that divide the rows of every batch; this one gets its own.
    :raises TypeError: when data is none of these, or ``posterior`` is not a posterior.
    :raises ValueError: when x and y differ in length, a prediction holds NaN, or batch_size is below 1.
    """
    require_posterior(posterior)
    posterior = with_draws(posterior, num_samples, seed)
    for x, y in pair_batches(data, getattr(posterior, "model", None), batch_size):
        if together.are_several:
            x, y = _part((x, y), len(y), together)  # type: ignore[misc]
            if not len(y):
                continue
        prediction = predict_batch(posterior, x, num_samples, batch_size, seed)
        yield x, prediction, y.to(prediction.per_member.device)


def pair_batches(data: Data, model: object, batch_size: int | None = None) -> Iterator[tuple[Inputs, Tensor]]:
    """Yields ``(x, y)`` for every batch, as tensors on the device of the model.

    :param data, batch_size: see :func:`predict_batches`, also for the errors.
    """
    like = like_of(model)
    for batch in _pairs(data, _rows(batch_size)):
        pair = _pair(batch)
        if pair is None:
            raise TypeError(_no_pair(batch))
        x, y = inputs(pair[0], like), targets(pair[1], like)
        count_rows(x, y)
        if isinstance(model, BayesianNetwork) and model.likelihood is not None:
            require_next_tokens(model.core().net, x, y, model.likelihood.labelled(y))
        yield x, y


def predict_inputs(
    posterior: Posterior,
    data: Data,
    *,
    like: object,
    num_samples: int | None,
    batch_size: int | None,
    seed: int,
    together: Processes = ALONE,
) -> Iterator[tuple[Prediction, Tensor | None]]:
    """Yields the prediction for every batch of inputs, and where its labels, if there are any, are not masked.

    The classes of out-of-distribution data mean nothing to a posterior, but ``ignore_index`` among them does: there
    is padding. The second is what :func:`labelled` says of them, ``None`` where all count.

    :param data: a ``DataLoader`` or another iterable of batches, a ``Dataset``, or x itself.
    :param like: an input of the same network, to tell a pair ``(x, y)`` from a tuple of inputs.
    :raises TypeError: when data is none of these, or ``posterior`` is not a posterior.
    :raises ValueError: when a prediction holds NaN, or batch_size is below 1.
    """
    posterior = with_draws(posterior, num_samples, seed)
    likelihood = getattr(getattr(posterior, "model", None), "likelihood", None)
    masks = likelihood is not None and likelihood.labelled(torch.zeros(0)) is not None
    for x, y in _inputs(data, like, _rows(batch_size), with_labels=masks):
        if together.are_several:
            x, y = _part((x, y), count_rows(x), together)  # type: ignore[misc]
            if not count_rows(x):
                continue
        prediction = predict_batch(posterior, x, num_samples, batch_size, seed)
        yield prediction, None if y is None else labelled(prediction, y.to(prediction.outputs.device))


def input_batches(data: Data, batch_size: int | None) -> Iterator[tuple[object, Tensor | None]]:
    """Yields ``(x, y)`` for every batch of data with or without labels; y is None without labels.

    :param data: a ``DataLoader`` or another iterable of batches, a ``Dataset``, one pair ``(x, y)``, or x itself as a
        tensor, array, frame or dict. A pair whose second element is an array is taken to be ``(x, y)``, and the key
        ``labels`` of a dict to be y.
    :raises TypeError: when data is none of these.
    :raises ValueError: when x and y differ in length, or batch_size is below 1.
    """
    rows = _rows(batch_size)
    alone = _is_inputs(data) and _pair(data) is None
    for batch in _cut(tensors(data), rows) if alone else _pairs(data, rows):
        pair = _pair(batch)
        if pair is not None:
            x, y = tensors(pair[0]), labels(pair[1])
            count_rows(x, y)
            yield x, y
        else:
            yield tensors(_without_label(batch, None)), None


def predict_batch(
    posterior: Posterior, x: Inputs, num_samples: int | None, batch_size: int | None, seed: int
) -> Prediction:
    """The prediction for one batch.

    :raises TypeError: when ``posterior`` is not a posterior.
    :raises ValueError: when the prediction holds NaN.
    """
    require_posterior(posterior)
    prediction = posterior.predict(x, num_samples=num_samples, batch_size=batch_size, seed=seed)
    if prediction.outputs.isnan().any():
        raise ValueError(
            "the posterior predicts NaN: check for parameters that diverged in training (posterior.losses shows when)"
        )
    return prediction


def with_draws(posterior: Posterior, num_samples: int | None, seed: int) -> Posterior:
    """The posterior with the draws stored that every batch would make again, where they fit into memory at once."""
    if type(posterior) is not Posterior:
        return posterior
    source = posterior.draw_source
    count = source.count(num_samples)
    return posterior.as_draws(count, seed) if source.makes_all_at_once(count) else posterior


def require_posterior(posterior: object) -> None:
    """Checks that an object is a posterior, and not a model, a guide or a network.

    :raises TypeError: for an object that has no method ``predict``.
    """
    if not callable(getattr(posterior, "predict", None)):
        raise TypeError(
            f"expected a posterior, got {type(posterior).__name__}: give what pyro_bnn.inference.fit, "
            "pyro_bnn.inference.sample or pyro_bnn.load returns"
        )


def require_repeatable(data: Data, name: str) -> None:
    """Refuses data that can be read only once, if they are needed more than once.

    :param name: name of the argument, for the message.
    :raises TypeError: when data is an iterator, such as a generator or a ``map``.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name} is read more than once, and a {type(data).__name__} is empty after the first pass: give a "
            f"DataLoader, a Dataset, a pair (x, y) of tensors or a list of batches, such as list({name})"
        )


def _part(tree: object, size: int, together: Processes) -> object:
    """The rows of this process."""
    rows = slice(together.rank, None, together.size)
    return pytree.tree_map(lambda t: t[rows] if batched(t, size) else t, tree)


def first_rows(x: Inputs, rows: int) -> object:
    """The first rows of inputs, which may be nested."""
    size = count_rows(x)
    return pytree.tree_map(lambda t: t[:rows] if batched(t, size) else t, x)


def log_density(prediction: Prediction, y: Tensor) -> Tensor:
    """log p(y_n) under each draw of each member: ``[draws, members, N]``, in nats.

    :raises TypeError: when y has the wrong dtype.
    :raises ValueError: when y does not fit the likelihood, or a density is NaN.
    """
    if prediction.likelihood is not None:
        prediction.likelihood.check(y, prediction.outputs[0, 0])
    log_prob = prediction.log_prob(y)
    if log_prob.isnan().any():
        raise ValueError("the log-density of y under the posterior is NaN: check for infinite outputs of the network")
    return log_prob


def log_predictive_density(prediction: Prediction, y: Tensor) -> Tensor:
    """The log predictive density log p(y_n), averaged over all draws and members: ``[N]``, in nats.

    log (1 / (S K)) sum_sk p_sk(y_n) = logsumexp_sk log p_sk(y_n) - log (S K)
    """
    log_prob = log_density(prediction, y)
    draws, members, _ = log_prob.shape
    return log_prob.logsumexp((0, 1)) - math.log(draws * members)


def labelled(prediction: Prediction, y: Tensor) -> Tensor | None:
    """Where y holds a label, booleans ``[M]`` over the labels of all rows; ``None`` when it does so everywhere."""
    there = None if prediction.likelihood is None else prediction.likelihood.labelled(y)
    return None if there is None else there.flatten()


def kept(values: Tensor, there: Tensor | None, axis: int = 0) -> Tensor:
    """The values of those labels that are there.

    :param values: ``[M, ...]``, or with another axis of the labels of all rows.
    :param there: what :func:`labelled` says.
    """
    return values if there is None else values[(slice(None),) * axis + (there,)]


def row_density(prediction: Prediction, y: Tensor) -> Tensor:
    """:func:`log_predictive_density` of the rows that hold any label, in nats."""
    density = log_predictive_density(prediction, y)
    rows = rows_with_labels(prediction, y)
    return density if rows is None else density[rows]


def rows_with_labels(holder: object, y: Tensor) -> Tensor | None:
    """Which rows have a label, booleans ``[N]`` on the device of y; ``None`` when all have.

    :param holder: a prediction or a model, whose ``likelihood`` tells.
    """
    likelihood = getattr(holder, "likelihood", None)
    there = likelihood.labelled(y) if isinstance(likelihood, Likelihood) else None
    return None if there is None else there.reshape(len(y), -1).any(1)


def _pairs(data: Data, rows: int) -> Iterable[object]:
    pair = _pair(data)
    if pair is None:
        return _loader(data, rows)
    x, y = tensors(pair[0]), labels(pair[1])
    return _slices((x, y), count_rows(x, y), rows)


def _inputs(data: Data, like: object, rows: int, with_labels: bool) -> Iterable[tuple[Inputs, Tensor | None]]:
    """Batches of x, and their labels where there are any and they are asked for."""

    def parts(batch: object) -> tuple[object, Tensor | None]:
        x = _without_label(batch, like)
        pair = split(batch) if with_labels and x is not batch else None
        return x, None if pair is None else labels(pair[1])

    if _is_inputs(data) or isinstance(data, tuple):
        x, y = parts(data)
        x = tensors(x)
        return _slices((x, y), count_rows(x, y), rows)
    return (parts(batch) for batch in _loader(data, rows))


def _loader(data: Data, rows: int) -> Iterable[object]:
    if isinstance(data, Dataset):
        # Without a generator a loader would draw a seed for its workers from torch's global generator.
        return DataLoader(data, batch_size=rows, generator=torch.Generator())
    if isinstance(data, Iterable) and not _is_inputs(data) and not isinstance(data, (tuple, str)):
        return data
    raise TypeError(
        f"data must be a DataLoader, a Dataset or a pair (x, y), got {_describe(data)}. Labels go with their inputs: "
        f"give (x, y), or a dict with {LABELS!r}"
    )


def _is_inputs(data: Data) -> bool:
    """Whether data are inputs of a network, and not an iterable of batches."""
    return is_array(data) or isinstance(data, Mapping) or is_numbers(data)


def _rows(batch_size: int | None) -> int:
    checks.optional(checks.count, "batch_size", batch_size)
    return batch_size or ROWS


def _cut(x: Inputs, rows: int) -> Iterator[object]:
    return _slices(x, count_rows(x), rows)


def _slices(tree: object, size: int, rows: int) -> Iterator[Any]:
    def cut(start: int) -> Any:
        return pytree.tree_map(lambda t: t[start : start + rows] if batched(t, size) else t, tree)

    return (cut(start) for start in range(0, size, rows))


def _pair(batch: object) -> tuple[Any, Any] | None:
    """``(x, y)``; ``None`` if y is neither an array with an axis of rows nor a list of numbers in a tuple."""
    pair = split(batch)
    if pair is None or isinstance(batch, Mapping):
        return pair
    y = pair[1]
    return pair if is_array(y) and len(y.shape) > 0 or isinstance(batch, tuple) and is_numbers(y) else None


def _no_pair(batch: object) -> str:
    got = f"expected pairs (x, y) in which y has an axis of rows, or dicts with {LABELS!r}, got {_describe(batch)}"
    one_row = isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (Tensor, int, float))
    if one_row:
        return f"{got}, which is one row: give a Dataset, or DataLoader(data, batch_size={ROWS}), which makes batches"
    return f"{got}. The dataset should return (x, y), with all inputs of the network in x"


def _without_label(batch: object, like: object) -> object:
    """A batch without its labels.

    :param like: an input of the network; it may be a tuple, or a dict with ``labels`` among its inputs.
    """
    if isinstance(batch, Mapping):
        return batch if isinstance(like, Mapping) and LABELS in like else without_labels(batch)
    if isinstance(batch, (tuple, list)) and isinstance(like, (tuple, list)) and not isinstance(batch[0], (tuple, list)):
        return batch
    return without_labels(batch)


def _describe(data: Data) -> str:
    if isinstance(data, (tuple, list)):
        return f"a {type(data).__name__} of {len(data)} ({', '.join(type(item).__name__ for item in data[:4])})"
    return type(data).__name__
