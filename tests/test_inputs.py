"""Data at the boundary: every accepted form trains, predicts and scores as its tensors do, and the rest is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import transformers
from arviz_names import elpd
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_bnn as pb
from pyro_bnn.diagnostics import (
    ConformalSets,
    check,
    check_prior,
    convergence,
    diversity,
    evaluate,
    loo,
    scale_temperature,
    to_arviz,
)
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inputs import inputs, targets, tensors
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from pyro_bnn.models import Dense, MeanFieldGuide
from pyro_bnn.network import Network

N = 24
LIKE = torch.zeros(1)


def arrays(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 and int64, with values that float16 holds exactly."""
    generator = np.random.default_rng(0)
    x = generator.integers(-8, 9, (N, 3)) / 4
    if kind == "regression":
        return x, x[:, :1] * 2 + generator.integers(-2, 3, (N, 1)) / 4
    return x, (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)


class Rows(Dataset[Any]):
    """Rows as a data set of one's own often gives them: NumPy arrays, and y as Python's own numbers."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i] if self.y.ndim > 1 else self.y[i].item()


class Named(Rows):
    def __getitem__(self, i: int) -> Any:
        return {"input": self.x[i], "labels": self.y[i]}


def frame(x: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(x, columns=["a", "b", "c"], index=range(100, 100 + N))


def series(y: np.ndarray) -> Any:
    return pd.Series(y, name="y") if y.ndim == 1 else pd.DataFrame(y, columns=["y"])


def half(y: np.ndarray) -> Tensor:
    return torch.tensor(y).half() if y.dtype == np.float64 else torch.tensor(y)


#: by name: x and y alone, or as data; data of float64 and int64 are made into the form
PAIRS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]] = {
    "array of float64": lambda x, y: (x, y),
    "array of float32": lambda x, y: (x.astype(np.float32), y.astype(np.float32) if y.ndim > 1 else y.astype(np.int32)),
    "array of float16, small integers": lambda x, y: (x.astype(np.float16), y if y.ndim > 1 else y.astype(np.uint8)),
    "array in reverse order and of another byte order": lambda x, y: (x[::-1].copy()[::-1].astype(">f8"), y),
    "list": lambda x, y: (x.tolist(), y.tolist()),
    "frame": lambda x, y: (frame(x), series(y)),
    "frame with nullable columns": lambda x, y: (frame(x).convert_dtypes(), series(y).convert_dtypes()),
    "tensor of float64": lambda x, y: (torch.tensor(x), torch.tensor(y)),
    "tensor of float16": lambda x, y: (torch.tensor(x).half(), half(y)),
}
DATA: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "dict with labels": lambda x, y: {"input": x, "labels": y},
    "BatchEncoding": lambda x, y: transformers.BatchEncoding({"input": x.tolist(), "labels": y.tolist()}),
    "data set of NumPy": lambda x, y: DataLoader(Rows(x, y), batch_size=N),
    "data set of dicts": lambda x, y: DataLoader(Named(x, y), batch_size=N),
    "loader of BatchEncoding": lambda x, y: DataLoader(
        Named(x, y), batch_size=N, collate_fn=lambda items: transformers.BatchEncoding(collated(items))
    ),
}


def collated(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in items[0]}


class Mlp(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, outputs)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.out(self.hidden(input).tanh())
        return y


def network_model(kind: str) -> Dense:
    torch.manual_seed(0)
    likelihood = Gaussian(scale=0.5) if kind == "regression" else Categorical()
    return Dense(Mlp(1 if kind == "regression" else 3), likelihood, N)


def fitted(kind: str, data: Any) -> pb.Posterior:
    """After a few steps, with all rows in each."""
    model = network_model(kind)
    guide = MeanFieldGuide(model)
    return pb.inference.fit(model, guide, data, epochs=3, batch_size=N, lr=0.05, progress=False, seed=1)


def as_tensors(kind: str) -> tuple[Tensor, Tensor]:
    x, y = arrays(kind)
    return torch.tensor(x).float(), torch.tensor(y).float() if kind == "regression" else torch.tensor(y)


def parameters(posterior: pb.Posterior) -> list[Tensor]:
    guide: Any = posterior.guide
    return [p.detach() for p in guide.parameters()]


KINDS = ["regression", "classification"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_of_any_form_trains_predicts_and_scores_as_its_tensors_do(form: str, kind: str) -> None:
    x, y = PAIRS[form](*arrays(kind))
    expected, (tx, ty) = fitted(kind, as_tensors(kind)), as_tensors(kind)
    posterior = fitted(kind, (x, y))
    assert posterior.losses == expected.losses
    assert all(map(torch.equal, parameters(posterior), parameters(expected)))
    found = posterior.predict(x, 4, seed=0)
    assert found.outputs.dtype == torch.float32
    assert torch.equal(found.outputs, expected.predict(tx, 4, seed=0).outputs)
    assert torch.equal(posterior.log_likelihood(x, y, 4, seed=0), expected.log_likelihood(tx, ty, 4, seed=0))
    assert evaluate(posterior, (x, y), seed=0) == evaluate(expected, (tx, ty), seed=0)
    training: dict[str, Any] = {"x_train": x, "y_train": y, "num_samples": 50, "seed": 0}
    assert check(posterior, (x, y), **training) == check(
        expected, (tx, ty), **training | {"x_train": tx, "y_train": ty}
    )
    runs = [posterior, fitted(kind, (x, y))]
    assert convergence(runs, x, num_samples=8, seed=0).equals(convergence(runs, tx, num_samples=8, seed=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", DATA)
def test_data_of_any_form_train_and_score_as_their_tensors_do(form: str, kind: str) -> None:
    data, (tx, ty) = DATA[form](*arrays(kind)), as_tensors(kind)
    loaded = DataLoader(TensorDataset(tx, ty), batch_size=N)
    expected = fitted(kind, loaded if isinstance(data, DataLoader) else (tx, ty))
    posterior = fitted(kind, data)
    assert posterior.losses == expected.losses
    assert all(map(torch.equal, parameters(posterior), parameters(expected)))
    assert evaluate(expected, data, seed=0) == evaluate(expected, (tx, ty), seed=0)
    assert check(expected, data, seed=0) == check(expected, (tx, ty), seed=0)


@pytest.mark.parametrize("form", ["array of float64", "list", "frame with nullable columns", "tensor of float16"])
def test_other_doors_take_what_fit_takes(form: str) -> None:
    """Proves ArviZ, leave-one-out, prior checks, recalibration, diversity and inputs from elsewhere alike."""
    x, y = PAIRS[form](*arrays("classification"))
    tx, ty = as_tensors("classification")
    posterior = fitted("classification", (tx, ty))
    some: dict[str, Any] = {"num_samples": 100, "seed": 0}
    ours, theirs = (to_arviz(posterior, *data, **some) for data in ((x, y), (tx, ty)))
    for group in ("log_likelihood", "observed_data", "constant_data", "sample_stats"):
        assert [v.dims for v in ours[group].data_vars.values()] == [v.dims for v in theirs[group].data_vars.values()]
        for name, value in theirs[group].data_vars.items():
            np.testing.assert_allclose(ours[group][name].values, value.values, rtol=1e-6)
    with pytest.warns(UserWarning):
        found, right = (loo(posterior, *data, num_samples=200, seed=0) for data in ((x, y), (tx, ty)))
    assert elpd(found) == elpd(right)
    assert check_prior(posterior.model, x, y, seed=0) == check_prior(posterior.model, tx, ty, seed=0)  # type: ignore[arg-type]
    scaled, expected = scale_temperature(posterior, (x, y), seed=0), scale_temperature(posterior, (tx, ty), seed=0)
    assert scaled.temperature == expected.temperature
    sets = ConformalSets(posterior, (x, y), 0.8, seed=0)
    assert torch.equal(sets.predict(x), ConformalSets(posterior, (tx, ty), 0.8, seed=0).predict(tx))
    assert diversity(posterior, x, seed=0) == diversity(posterior, tx, seed=0)
    assert diversity(posterior, (x, y), seed=0) == diversity(posterior, (tx, ty), seed=0)
    assert evaluate(posterior, (x, y), ood=x, seed=0) == evaluate(posterior, (tx, ty), ood=tx, seed=0)


def test_every_engine_takes_arrays() -> None:
    x, y = arrays("classification")
    tx, ty = as_tensors("classification")
    model = network_model("classification")

    def sghmc(data: Any) -> pb.Posterior:
        kernel = pb.inference.SGHMC(model, data, step_size=0.01, friction=0.5, batch_size=8)
        return pb.inference.sample(kernel, 4, progress=False, seed=0)

    def svgd(data: Any) -> pb.Posterior:
        own = network_model("classification")
        particles = pb.inference.AutoParticles(own, 3)
        return pb.inference.SVGD(own, particles, lr=0.1).fit(data, epochs=2, progress=False, seed=0)

    def swag(data: Any) -> pb.Posterior:
        return pb.inference.SWAG(Mlp(3), Categorical(), N).fit(data, epochs=3, num_samples=2, progress=False, seed=0)

    def laplace(data: Any) -> pb.Posterior:
        torch.manual_seed(0)
        return pb.inference.LastLayerLaplace(Mlp(3), Categorical(), N).fit(data, epochs=2, progress=False, seed=0)

    def ensemble(data: Any) -> pb.Posterior:
        one = pb.inference.DeepEnsemble(Mlp(3), Categorical(), N, num_networks=2)
        return one.fit(data, epochs=2, progress=False, seed=0)

    def dropout(data: Any) -> pb.Posterior:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 3))
        return pb.inference.MCDropout(net, Categorical(), N).fit(data, epochs=2, progress=False, seed=0)

    for engine in (sghmc, svgd, laplace, ensemble, dropout, swag):
        torch.manual_seed(0)
        found = engine((x, y)).predict(x, seed=0)
        torch.manual_seed(0)
        assert torch.equal(found.outputs, engine((tx, ty)).predict(tx, seed=0).outputs), engine.__name__


def test_statistics_are_gathered_over_batches_of_any_form() -> None:
    x, y = arrays("regression")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = Dense(net, Gaussian(scale=0.5), N)
    posterior = pb.Posterior(model, MeanFieldGuide(model))
    predicted = []
    forms: list[Any] = [[torch.tensor(x).float()], [(x, y)], [frame(x)], [x.tolist()], DataLoader(Rows(x, y), N)]
    for loader in forms:
        posterior.recompute_statistics(loader)
        predicted.append(posterior.predict(x, 2, seed=0).outputs)
    assert all(torch.equal(one, predicted[0]) for one in predicted)
    posterior.recompute_statistics(None)
    assert not torch.equal(posterior.predict(x, 2, seed=0).outputs, predicted[0])


# ---------------------------------------------------------------------------------------------------- transformers


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config)


class Sentences(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 17, (N, 5), generator=generator)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "input_ids": self.tokens[i],
            "attention_mask": torch.ones(5, dtype=torch.long),
            "labels": int(self.tokens[i, 0] % 3),
        }


def test_a_classifier_of_transformers_trains_from_a_loader_of_dicts_without_being_told_its_output() -> None:
    loader = DataLoader(Sentences(), batch_size=8)
    model = pb.models.Rank1(bert(), Categorical(), N)
    guide = pb.models.Rank1Guide(model)
    posterior = pb.inference.fit(model, guide, loader, epochs=2, progress=False, seed=0)
    assert len(posterior.losses) == 6 and all(map(math.isfinite, posterior.losses))
    tokens = Sentences().tokens
    labels = tokens[:, 0] % 3
    pair = ({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels)
    assert evaluate(posterior, loader, batch_size=8)["nll"] == pytest.approx(evaluate(posterior, pair)["nll"], rel=1e-5)
    encoded = transformers.BatchEncoding(
        {"input_ids": tokens.tolist(), "attention_mask": pair[0]["attention_mask"].tolist()}
    )
    assert posterior.predict(encoded, 2).probs.shape == (N, 3)
    assert torch.equal(posterior.predict(encoded, 2, seed=0).probs, posterior.predict(pair[0], 2, seed=0).probs)


def test_logits_are_the_output_unless_output_says_otherwise() -> None:
    class Several(nn.Module):
        def __init__(self, kind: Callable[..., Any]) -> None:
            super().__init__()
            self.layer, self.kind = nn.Linear(3, 2), kind

        def forward(self, x: Tensor) -> Any:
            return self.kind(logits=self.layer(x), hidden_states=x)

    x = torch.randn(4, 3)
    for kind in (transformers.modeling_outputs.SequenceClassifierOutput, dict, SimpleNamespace):
        net = Several(kind)
        assert torch.equal(Network(net)(x), net.layer(x))
        assert torch.equal(Network(net, "hidden_states")(x), x)
    with pytest.raises(TypeError, match="returns BaseModelOutput, not a tensor"):
        Network(Several(lambda logits, hidden_states: transformers.modeling_outputs.BaseModelOutput(logits)))(x)


# ---------------------------------------------------------------------------------------- what happens to a value


def test_a_tensor_that_fits_is_passed_on_as_it_is() -> None:
    x, y = torch.randn(4, 3), torch.arange(4)
    assert inputs(x, LIKE) is x and targets(y, LIKE) is y and tensors(x) is x
    both = inputs({"a": x, "b": (y, 3)}, LIKE)
    assert both["a"] is x and both["b"][0] is y and both["b"][1] == 3


def test_an_array_of_the_dtype_of_the_network_is_not_copied() -> None:
    array = np.zeros((4, 3), dtype=np.float32)
    found = inputs(array, LIKE)
    array[0, 0] = 7
    assert found[0, 0] == 7


def test_floats_get_the_dtype_of_the_network_and_integers_and_bools_stay() -> None:
    for like in (torch.zeros(1), torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16)):
        for given in (np.float16, np.float32, np.float64, np.longdouble):
            assert inputs(np.ones(3, dtype=given), like).dtype == like.dtype
        assert targets([1.0, 2.0], like).dtype == like.dtype
    assert inputs(np.ones(3, dtype=np.int32), LIKE).dtype == torch.int32
    assert inputs(np.ones(3, dtype=np.uint16), LIKE).dtype == torch.int64
    assert inputs([[True, False]], LIKE).dtype == torch.bool
    assert targets(np.ones(3, dtype=np.int32), LIKE).dtype == torch.int64
    assert targets(torch.ones(3, dtype=torch.uint8), LIKE).dtype == torch.int64
    assert inputs([0.1], torch.zeros(1, dtype=torch.float64)).item() == 0.1


def test_a_frame_is_a_matrix_of_floats_in_the_order_of_its_columns() -> None:
    given = pd.DataFrame({"b": [1, 2], "a": [True, False], "c": pd.array([3, 4], dtype="Int64")}, index=[9, 5])
    assert torch.equal(inputs(given, LIKE), torch.tensor([[1.0, 1.0, 3.0], [2.0, 0.0, 4.0]]))
    assert torch.equal(targets(pd.DataFrame({"p": [1, 2], "q": [3, 4]}), LIKE), torch.tensor([[1, 3], [2, 4]]))
    assert targets(pd.Series([True, False]), LIKE).dtype == torch.bool
    assert torch.equal(inputs(pd.Index([4, 5]), LIKE), torch.tensor([4, 5]))


def test_lists_beside_tensors_are_settings_of_the_network() -> None:
    x = torch.randn(4, 3)
    found = inputs({"x": x, "sizes": [2, 3], "mode": "fast"}, LIKE)
    assert found["sizes"] == [2, 3] and found["mode"] == "fast"
    several = inputs([x, np.ones((4, 2))], LIKE)
    assert several[0] is x and several[1].dtype == torch.float32
    assert torch.equal(inputs({"ids": [[1, 2]]}, LIKE)["ids"], torch.tensor([[1, 2]]))


def test_labels_beside_y_belong_to_the_network() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(3, 3), nn.Embedding(3, 3)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            y: Tensor = self.layer(x) + self.table(labels)
            return y

    x, y = arrays("classification")
    model = Dense(Conditional(), Categorical(), N)
    posterior = pb.inference.fit(model, MeanFieldGuide(model), ({"x": x, "labels": y}, y), epochs=1, progress=False)
    given = {"x": x, "labels": y}
    assert posterior.predict(given).probs.shape == (N, 3)
    assert evaluate(posterior, (given, y), ood=given)["ood_auroc"] == 0.5


def test_a_pyro_model_of_ones_own_gets_tensors_of_arrays() -> None:
    x, y = arrays("regression")

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", N, subsample_size=len(x)):
            return pyro.sample("obs", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoNormal(model)
    posterior = pb.inference.fit(model, guide, (x, y[:, 0]), epochs=2, progress=False, seed=0)
    assert posterior.predict(x, 3, return_site="obs").outputs.dtype == torch.float32
    assert posterior.log_likelihood(x, y[:, 0], 3).shape == (3, 1, N)
    wide = torch.tensor(x)
    assert minibatches(model, (wide, torch.tensor(y)), N).first[0].dtype == torch.float64
    several = DataLoader([(x[i], {"price": y[i], "sold": i}) for i in range(N)], batch_size=N)  # type: ignore[arg-type]
    assert set(minibatches(model, several, N).first[1]) == {"price", "sold"}


# ------------------------------------------------------------------------------------------------------- refusals

X, Y = np.zeros((4, 2)), np.zeros(4, dtype=np.int64)
MIXED = pd.DataFrame({"age": [1.0, 2.0, 3.0, 4.0], "city": list("abcd")})
GAPS = pd.DataFrame({"age": [1.0, math.nan, 3.0, math.inf], "size": pd.array([1, 2, None, 4], dtype="Int64"), "z": 0})
REFUSED: list[tuple[Any, Any, type[Exception], str]] = [
    (np.array([[1, None]] * 4, dtype=object), Y, TypeError, "x is ndarray that holds objects, such as NoneType"),
    (np.array([["a", "b"]] * 4), Y, TypeError, "x is ndarray that holds strings; expected tensors, NumPy arrays"),
    (np.array([["2020-01-01"]] * 4, dtype="M8[D]"), Y, TypeError, "holds dates"),
    (
        ["a", "b", "c", "d"],
        Y,
        TypeError,
        "x holds no tensor with a batch axis: got list of str; expected tensors, NumPy",
    ),
    ([[1.0, 2.0], [3.0], [4.0, 5.0], [6.0]], Y, ValueError, "x is a ragged list: its rows have lengths from 1 to 2"),
    (
        [[[1.0], [2.0, 3.0]]] * 4,
        Y,
        ValueError,
        "x is a ragged list; expected as many numbers in every row at every depth",
    ),
    ({"a": X, "b": np.array(["a"] * 4)}, Y, TypeError, r"x\['b'\] is ndarray that holds strings"),
    (MIXED, Y, TypeError, r"x has columns that do not hold numbers: 'city' \(str|object\). Encode them"),
    (GAPS, Y, ValueError, r"infinite values in the columns 'age' \(2\), 'size' \(1\); drop or impute"),
    (np.array([[math.nan, 1.0]] * 4), Y, ValueError, "x holds 4 NaN or infinite values; drop or impute"),
    (np.ma.masked_invalid([[math.nan, 1.0]] * 4), Y, ValueError, "x holds 4 masked values"),
    (X[:3], Y, ValueError, "x and y disagree on the number of samples: y has 4, x has 3"),
    (X.tolist(), Y.tolist()[:3], ValueError, "x and y disagree on the number of samples: y has 3, x has 4"),
    (
        X,
        pd.Series(list("abcd"), name="kind"),
        TypeError,
        r"y \(column 'kind'\) holds .*not numbers: labels are integers",
    ),
    (
        X,
        pd.Series(list("abcd"), name="kind", dtype="category"),
        TypeError,
        r"y \(column 'kind'\) is categorical: give its",
    ),
    (X, pd.Categorical(list("abcd")), TypeError, "y is categorical: give its codes, y.cat.codes"),
    (X, pd.Series([0, 1, None, 1], name="n", dtype="Int64"), ValueError, r"y \(column 'n'\) holds 1 missing values"),
    (X, pd.Series([True, False] * 2), TypeError, "y has dtype torch.bool; class labels must be integers"),
    (X, [0, 1, [1], 0], ValueError, "y is a ragged list"),
    (X, "abcd", TypeError, "y is str; expected tensors, NumPy arrays, pandas frames or nested lists of numbers"),
    (X, ["a", "b", "c", "d"], TypeError, "y is list of str that holds strings"),
    (X, 3, TypeError, "y is int; expected tensors"),
    (X, np.int64(3), TypeError, "y is int64; expected"),
    (X, torch.tensor(1), ValueError, "y is a single number; axis 0 must run over the samples"),
]


@pytest.mark.parametrize(("x", "y", "error", "message"), REFUSED)
def test_what_is_no_data_is_refused_with_what_was_expected(x: Any, y: Any, error: Any, message: str) -> None:
    model = Dense(nn.Linear(2, 3), Categorical(), 4)
    guide = MeanFieldGuide(model)
    with pytest.raises(error, match=message):
        pb.inference.fit(model, guide, (x, y), epochs=1, progress=False)
    with pytest.raises(error, match=message):
        pb.Posterior(model, guide).log_likelihood(x, y, 2)


def test_wrong_columns_are_named_by_predict_too() -> None:
    model = Dense(nn.Linear(2, 3), Categorical(), 4)
    posterior = pb.Posterior(model, MeanFieldGuide(model))
    with pytest.raises(TypeError, match="'city'"):
        posterior.predict(MIXED)
    with pytest.raises(ValueError, match="'age'"):
        evaluate(posterior, (GAPS, Y))


def test_integers_for_a_network_of_numbers_are_refused_with_the_remedy() -> None:
    model = Dense(nn.Linear(2, 3), Categorical(), 4)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        pb.inference.fit(model, MeanFieldGuide(model), (X.astype(np.int64), Y), epochs=1, progress=False)
    assert any("x holds integers (torch.int64), which stay integers" in note for note in caught.value.__notes__)


def test_data_in_memory_are_a_pair_or_a_dict_with_labels() -> None:
    model = Dense(nn.Linear(2, 3), Categorical(), 4)
    for data in ({"input": X}, (X,), (X, X, Y)):
        with pytest.raises(TypeError, match=r"data in memory must be \(x, y\) or a dict with 'labels', got"):
            minibatches(model, data, 2)
    with pytest.raises(TypeError, match=r"the loader must give pairs \(x, y\) or dicts with 'labels', got dict"):
        minibatches(model, DataLoader([{"input": X[0]}] * 4, batch_size=2), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Gaussian(), [1, 2, 3, 4], "a regression target must be floating point"),
        (Bernoulli(), [0, 1, 0, 1], "give 0 and 1 as floating point"),
        (Categorical(), [0.0, 1.0, 0.0, 1.0], "class labels must be integers"),
    ],
)
def test_y_keeps_its_kind_of_number(likelihood: Any, y: list[Any], message: str) -> None:
    model = Dense(nn.Linear(2, 1), likelihood, 4)
    with pytest.raises(TypeError, match=message):
        minibatches(model, (X, y), 2)


def test_what_a_network_raises_is_told_with_the_shape_of_x() -> None:
    """torch names the shapes of two matrices alone, and after a split into rows not those that the user gave."""
    x, wrong = torch.randn(6, 4), torch.randn(6, 5)
    model = pb.models.Dense(nn.Linear(4, 3), Categorical(), 6)
    guide = pb.models.MeanFieldGuide(model)
    labels = torch.arange(6) % 3
    with pytest.raises(RuntimeError, match="cannot be multiplied") as in_fit:
        pb.inference.fit(model, guide, (wrong, labels), epochs=1, progress=False)
    posterior = pb.inference.fit(model, guide, (x, labels), epochs=1, progress=False)
    with pytest.raises(RuntimeError, match="cannot be multiplied") as in_predict:
        posterior.predict(wrong)
    for caught in (in_fit, in_predict):
        assert any(r"x is [6, 5] of float32" in note for note in caught.value.__notes__)


def test_counts_may_be_integers_of_any_size() -> None:
    model = Dense(nn.Linear(2, 1), Poisson(), 4)
    first = minibatches(model, (X, np.array([3, 0, 2, 1], dtype=np.uint8)), 4).first
    assert first[1].dtype == torch.int64 and first[1].tolist() == [3, 0, 2, 1]
