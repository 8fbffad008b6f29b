"""How predictions fare on corrupted data, by kind and severity of the corruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.data.corruptions import SEVERITIES, image_shift
from pyro_bnn.diagnostics.scoring.calibration import BINS, bin_confidence
from pyro_bnn.diagnostics.scoring.gathering import all_rows
from pyro_bnn.diagnostics.scoring.precision import running_mean, wide
from pyro_bnn.diagnostics.scoring.probabilities import class_probabilities
from pyro_bnn.distributed import processes
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.predicting import kept, labelled, predict_batch, row_density

if TYPE_CHECKING:
    import pandas as pd

    from pyro_bnn.posterior import Posterior
    from pyro_bnn.posterior.prediction import Prediction

#: what a user gives as ``shift=``
ShiftLike = str | Sequence[str] | Mapping[str, Callable[[Any, int], Any]]

#: the name of the mean of each metric over all kinds and severities
MEANS = {"accuracy": "cA", "rmse": "cRMSE", "nll": "cNLL", "ece": "cECE"}


@dataclass(frozen=True, repr=False)
class Shift(Mapping[str, Mapping[str, Sequence[float]]]):
    """Metrics on corrupted data: ``shift["noise"]["nll"][4]`` is the NLL under noise of severity 5.

    A mapping from the kind of corruption to the metric to its five values, for severities 1 to 5. The metrics are
    ``accuracy``, ``nll`` and ``ece`` of a classification, and ``rmse`` and ``nll`` of a regression or of counts, as
    ``evaluate`` defines them. Printed, it is a table of their means over the severities.

    :param by_kind: the values, by kind and metric.
    :param clean: the same metrics on the same data without corruption.
    :param rows: number N of rows.
    :param functions: number of functions, S draws of K members, that each prediction averages.
    """

    by_kind: Mapping[str, Mapping[str, Sequence[float]]]
    clean: Mapping[str, float]
    rows: int
    functions: int

    def __getitem__(self, kind: str) -> Mapping[str, Sequence[float]]:
        return self.by_kind[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_kind)

    def __len__(self) -> int:
        return len(self.by_kind)

    def means(self) -> dict[str, float]:
        """``cA``, ``cNLL`` and ``cECE`` (``cRMSE``): the mean of each metric over all kinds and severities."""
        return {MEANS[name]: sum(self.by_severity(name)) / len(SEVERITIES) for name in self.clean}

    def by_severity(self, metric: str) -> list[float]:
        """The mean over the kinds at each of the five severities."""
        values = [of[metric] for of in self.by_kind.values()]
        return [sum(at) / len(values) for at in zip(*values, strict=True)]

    def mean_of(self, kind: str, metric: str) -> float:
        """The mean over the severities of one kind."""
        values = self.by_kind[kind][metric]
        return sum(values) / len(values)

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each kind and severity: ``kind``, ``severity`` and the metrics."""
        import pandas as pd  # takes time to import

        rows = [
            {"kind": kind, "severity": severity, **{name: values[severity - 1] for name, values in of.items()}}
            for kind, of in self.by_kind.items()
            for severity in SEVERITIES
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers."""
        return {
            "rows": self.rows,
            "functions": self.functions,
            "clean": dict(self.clean),
            "kinds": {kind: {name: list(v) for name, v in of.items()} for kind, of in self.by_kind.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Shift:
        """The inverse of :meth:`to_json`.

        :raises TypeError, KeyError, ValueError: when the content is not that of a shift.
        """
        kinds = {
            str(kind): {str(name): [float(value) for value in values] for name, values in of.items()}
            for kind, of in content["kinds"].items()
        }
        clean = {str(name): float(value) for name, value in content["clean"].items()}
        for kind, of in kinds.items():
            if set(of) != set(clean) or not set(clean) <= set(MEANS) or {len(v) for v in of.values()} != {5}:
                raise ValueError(f"{kind!r} has not five values of each of {', '.join(clean)}")
        if not kinds:
            raise ValueError("there is no kind of corruption")
        return cls(kinds, clean, int(content["rows"]), int(content["functions"]))

    def __repr__(self) -> str:
        return f"{self._title()}\n\n{display.table(*self._table())}"

    def _repr_html_(self) -> str:
        return display.html_text(self._title(), {}, display.html_table(*self._table()))

    def _title(self) -> str:
        rows, functions = display.plural(self.rows, "row"), display.plural(self.functions, "function")
        return f"Shift: {rows}, {functions}, means over severities {SEVERITIES[0]} to {SEVERITIES[-1]}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        means = self.means()
        rows = [["clean", *(f"{value:.4f}" for value in self.clean.values())]]
        rows += [[kind, *(f"{self.mean_of(kind, name):.4f}" for name in self.clean)] for kind in self.by_kind]
        rows.append(["mean", *(f"{means[MEANS[name]]:.4f}" for name in self.clean)])
        return ["", *self.clean], rows


class ShiftedScores:
    """Scores of a posterior on corrupted data, computed batch by batch.

    Of each batch two numbers for each label, kind and severity stay in memory.

    :param shift: what the user gave as ``shift=``.
    :param settings: ``num_samples``, ``batch_size`` and ``seed`` of the predictions.
    :raises TypeError, ValueError: when ``shift`` is neither names of corruptions nor a mapping of functions.
    """

    def __init__(self, posterior: Posterior, shift: ShiftLike, settings: Mapping[str, Any]) -> None:
        self.posterior, self.settings = posterior, settings
        self.corruptions = _corruptions(shift)
        self.scores: dict[tuple[str, int], _Scores] = {}
        self.rows = self.functions = 0

    def update(self, x: Inputs, y: Tensor) -> None:
        """Adds one batch of clean inputs and their targets."""
        for kind, corruption in self.corruptions.items():
            for severity in SEVERITIES:
                corrupted = corruption(x, severity)
                if count_rows(corrupted) != len(y):
                    raise ValueError(
                        f"shift= {kind!r} made {count_rows(corrupted)} rows of {len(y)}: a corruption keeps every row"
                    )
                prediction = predict_batch(self.posterior, corrupted, **self.settings)
                if (kind, severity) not in self.scores:
                    self.scores[kind, severity] = _scores_of(prediction)
                self.scores[kind, severity].update(prediction, y)
        self.rows += len(y)
        self.functions = prediction.per_member.shape[:2].numel()

    def compute(self, clean: Mapping[str, float]) -> Shift:
        """The scores of all batches.

        :param clean: the metrics without corruption.
        """
        values = {at: scores.compute() for at, scores in self.scores.items()}
        names = next(iter(values.values())).keys()
        by_kind = {
            kind: {name: [values[kind, severity][name] for severity in SEVERITIES] for name in names}
            for kind in self.corruptions
        }
        rows = int(processes().total([self.rows])[0])
        return Shift(by_kind, {name: clean[name] for name in names}, rows, self.functions)


class _Scores:
    """The NLL, and what a subclass adds."""

    def __init__(self, device: torch.device) -> None:
        self.nll = running_mean(device)

    def update(self, prediction: Prediction, y: Tensor) -> None:
        self.nll.update(-row_density(prediction, y))

    def compute(self) -> dict[str, float]:
        return {"nll": float(self.nll.compute())}


class _Classified(_Scores):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.confidence: list[Tensor] = []
        self.correct: list[Tensor] = []

    def update(self, prediction: Prediction, y: Tensor) -> None:
        super().update(prediction, y)
        there = labelled(prediction, y)
        probs = kept(class_probabilities(prediction.probs, prediction.likelihood).flatten(0, -2), there)
        confidence, predicted = probs.max(-1)
        self.confidence.append(confidence)
        self.correct.append(predicted == kept(y.flatten().long(), there))

    def compute(self) -> dict[str, float]:
        confidence, correct = all_rows(self.confidence), all_rows(self.correct)
        error = bin_confidence(confidence, correct, BINS).error
        return {"accuracy": float(wide(correct).mean()), **super().compute(), "ece": error}


class _Regressed(_Scores):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.squares = running_mean(device)

    def update(self, prediction: Prediction, y: Tensor) -> None:
        super().update(prediction, y)
        mean = prediction.mean
        self.squares.update(wide(mean - y.reshape(mean.shape).to(mean.dtype)).square())

    def compute(self) -> dict[str, float]:
        return {"rmse": math.sqrt(float(self.squares.compute())), **super().compute()}


def _scores_of(prediction: Prediction) -> _Scores:
    classes = prediction.likelihood is not None and prediction.likelihood.kind == "classification"
    return (_Classified if classes else _Regressed)(prediction.per_member.device)


def _corruptions(shift: ShiftLike) -> Mapping[str, Callable[[Any, int], Any]]:
    if isinstance(shift, Mapping):
        if not shift:
            raise ValueError("shift={}: expected at least one corruption, {name: function of x and the severity}")
        for name, function in shift.items():
            checks.function(f"shift[{name!r}]", function)
        return shift
    if shift == "images":
        return image_shift()
    if isinstance(shift, bool) or not isinstance(shift, Sequence):
        raise TypeError(
            f"shift={shift!r}: expected 'images', names of their corruptions, or a mapping of functions, such as "
            "pb.data.corruptions.table_shift(x_train)"
        )
    if shift in ("table", "tables"):
        raise ValueError(
            f"shift={shift!r}: the corruptions of a table follow its training inputs; give "
            "shift=pb.data.corruptions.table_shift(x_train)"
        )
    return image_shift(shift)
