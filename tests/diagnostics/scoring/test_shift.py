"""Scores on corrupted data are those of evaluating the corrupted data by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diagnostics.fake import FakePosterior, rows
from pretend_device import DEVICE, PretendDevice
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.data.corruptions import IMAGE_KINDS, SEVERITIES, corrupt, corrupt_table, image_shift, table_shift
from pyro_bnn.diagnostics import Shift, evaluate

OF_CLASSES, OF_NUMBERS = ("accuracy", "nll", "ece"), ("rmse", "nll")
DRAWN: dict[str, Any] = {"num_samples": 3, "seed": 5}


def classifier(likelihood: pb.likelihoods.Likelihood | None = None, outputs: int = 4) -> pb.Posterior:
    """Of two components, never trained."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, outputs))
    model = pb.models.Rank1(net, likelihood or pb.likelihoods.Categorical(), 30)
    return pb.Posterior(model, pb.models.Rank1Guide(model, components=2))


def labelled(n: int = 30, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 8, 8, generator=generator), torch.randint(classes, (n,), generator=generator)


def regression() -> pb.Posterior:
    torch.manual_seed(0)
    model = pb.models.Dense(nn.Linear(3, 1), pb.likelihoods.Gaussian(scale=0.5), 30)
    return pb.Posterior(model, pb.models.MeanFieldGuide(model))


def test_a_shift_equals_evaluating_corrupted_data_by_hand() -> None:
    """Proves every number, that those without shift stay what they are, and that the means are over all of them."""
    posterior, (x, y) = classifier(), labelled()
    plain, found = evaluate(posterior, (x, y), **DRAWN), evaluate(posterior, (x, y), shift="images", **DRAWN)
    shift = found["shift"]
    assert isinstance(shift, Shift) and list(shift) == list(IMAGE_KINDS)
    assert {name: found[name] for name in plain} == plain
    assert set(found) == {*plain, "cA", "cNLL", "cECE", "shift"}
    every: dict[str, list[float]] = {name: [] for name in OF_CLASSES}
    for kind in IMAGE_KINDS:
        assert list(shift[kind]) == list(OF_CLASSES)
        for severity in SEVERITIES:
            by_hand = evaluate(posterior, (corrupt(x, kind, severity), y), **DRAWN)
            for name in OF_CLASSES:
                assert shift[kind][name][severity - 1] == pytest.approx(by_hand[name], abs=1e-6)
                every[name].append(by_hand[name])
    for name, mean in zip(OF_CLASSES, ("cA", "cNLL", "cECE"), strict=True):
        assert found[mean] == pytest.approx(sum(every[name]) / 40, abs=1e-6)
    assert dict(shift.clean) == {name: plain[name] for name in OF_CLASSES}
    assert (shift.rows, shift.functions) == (30, 6)


@pytest.mark.parametrize(
    "data",
    [
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=7),
        lambda x, y: TensorDataset(x, y),
        lambda x, y: iter([(x[:11], y[:11]), (x[11:], y[11:])]),
        lambda x, y: (x.numpy(), y.tolist()),
    ],
    ids=["loader", "dataset", "iterator", "arrays"],
)
def test_batches_have_no_part_in_a_shift(data: Any) -> None:
    """Proves that data of all forms are corrupted alike, those included that can be read once only."""
    posterior, (x, y) = classifier(), labelled()
    expected = evaluate(posterior, (x, y), shift=["noise", "rotation"], **DRAWN)
    found = evaluate(posterior, data(x, y), shift=["noise", "rotation"], **DRAWN)
    for name in ("cA", "cNLL", "cECE"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
    for kind, values in expected["shift"].items():
        for name in OF_CLASSES:
            assert found["shift"][kind][name] == pytest.approx(values[name], abs=1e-5)


def test_a_regression_has_rmse_and_nll() -> None:
    """Proves the numbers of a table with the means and scales of its training rows, for data in batches."""
    posterior, x_train, x = regression(), 2 + torch.randn(50, 3), 2 + torch.randn(30, 3)
    y = x.sum(1, keepdim=True)
    found = evaluate(posterior, DataLoader(TensorDataset(x, y), 8), shift=table_shift(x_train), **DRAWN)
    std, mean = torch.std_mean(x_train, 0, correction=0)
    every = []
    for kind in ("noise", "missing"):
        assert list(found["shift"][kind]) == list(OF_NUMBERS)
        for severity in SEVERITIES:
            corrupted = corrupt_table(x, kind, severity, mean=mean, std=std)
            by_hand = evaluate(posterior, (corrupted, y), **DRAWN)
            for name in OF_NUMBERS:
                assert found["shift"][kind][name][severity - 1] == pytest.approx(by_hand[name], rel=1e-5)
            every.append(by_hand["rmse"])
    assert found["cRMSE"] == pytest.approx(sum(every) / 10, rel=1e-5)
    assert "cA" not in found and "cECE" not in found and found["cNLL"] > 0


def test_functions_of_ones_own_and_every_kind_of_target() -> None:
    """Proves that a mapping is taken as it is, for inputs of any form, and that a Bernoulli has classes."""
    table = torch.linspace(0.05, 0.95, 40, dtype=torch.float64).expand(2, 3, 40)
    posterior = FakePosterior(table, pb.likelihoods.Bernoulli())
    y = torch.arange(40) % 2.0

    def later(x: dict[str, Tensor], severity: int) -> dict[str, Tensor]:
        return {"rows": (x["rows"] + severity) % 40}

    found: dict[str, Any] = evaluate(posterior, {"rows": rows(40), "labels": y}, shift={"later": later}, num_samples=2)
    for severity in SEVERITIES:
        moved = (torch.arange(40) + severity) % 40
        by_hand = evaluate(posterior, (rows(40)[moved], y), num_samples=2)
        for name in OF_CLASSES:
            assert found["shift"]["later"][name][severity - 1] == pytest.approx(by_hand[name], abs=1e-9)
    counts = FakePosterior(1 + torch.rand(2, 1, 40, dtype=torch.float64), pb.likelihoods.Poisson())
    scores = evaluate(counts, (rows(40), y), shift={"none": lambda x, severity: x}, num_samples=2)
    assert scores["cRMSE"] == pytest.approx(scores["rmse"]) and scores["cNLL"] == pytest.approx(scores["nll"])


def test_a_shift_is_a_table_and_goes_through_json() -> None:
    posterior, data = classifier(), labelled()
    shift = evaluate(posterior, data, shift=["noise", "jpeg"], **DRAWN)["shift"]
    text = repr(shift)
    assert text.startswith("Shift: 30 rows, 6 functions, means over severities 1 to 5")
    lines = text.splitlines()[2:]
    assert lines[0].split() == list(OF_CLASSES)
    assert [line.split()[0] for line in lines[1:]] == ["clean", "noise", "jpeg", "mean"]
    assert lines[2].split()[2] == f"{sum(shift['noise']['nll']) / 5:.4f}" == f"{shift.mean_of('noise', 'nll'):.4f}"
    assert lines[4].split()[1] == f"{shift.means()['cA']:.4f}" and "<table>" in shift._repr_html_()
    frame = shift.to_dataframe()
    assert list(frame.columns) == ["kind", "severity", *OF_CLASSES] and len(frame) == 10
    assert frame["accuracy"].mean() == pytest.approx(shift.means()["cA"])
    assert frame["ece"][7] == shift["jpeg"]["ece"][2] and frame["severity"][7] == 3
    assert shift.by_severity("nll")[1] == pytest.approx((shift["noise"]["nll"][1] + shift["jpeg"]["nll"][1]) / 2)
    again = Shift.from_json(json.loads(json.dumps(shift.to_json())))
    assert again == shift and again.to_json() == shift.to_json()


@pytest.mark.parametrize("damage", ["kinds", "clean", "values", "words", "name"])
def test_what_is_not_the_json_of_a_shift_is_refused(damage: str) -> None:
    content: dict[str, Any] = {
        "rows": 3,
        "functions": 2,
        "clean": {"rmse": 1.0, "nll": 2.0},
        "kinds": {"noise": {"rmse": [1.0] * 5, "nll": [2.0] * 5}},
    }
    assert Shift.from_json(content).means() == {"cRMSE": 1.0, "cNLL": 2.0}
    match damage:
        case "kinds":
            content["kinds"] = {}
        case "clean":
            del content["clean"]
        case "values":
            content["kinds"]["noise"]["nll"].pop()
        case "words":
            content["kinds"]["noise"]["nll"][2] = "small"
        case "name":
            content["kinds"]["noise"]["loss"] = content["kinds"]["noise"].pop("nll")
    with pytest.raises((TypeError, KeyError, ValueError)):
        Shift.from_json(content)


@pytest.mark.parametrize(
    ("shift", "error", "message"),
    [
        (True, TypeError, "shift=True: expected 'images'"),
        (3, TypeError, "table_shift"),
        ("table", ValueError, r"give shift=pb.data.corruptions.table_shift\(x_train\)"),
        ("nois", ValueError, "the nearest is 'noise'"),
        (["noise", "blurr"], ValueError, "the nearest is 'blur'"),
        ([], ValueError, "at least one"),
        ({}, ValueError, "at least one corruption"),
        ({"noise": 3}, TypeError, r"shift\['noise'\]=3: expected a function"),
        ({"fewer": lambda x, severity: x[1:]}, ValueError, "'fewer' made 29 rows of 30"),
    ],
)
def test_other_shifts_are_refused(shift: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(classifier(), labelled(), shift=shift, **DRAWN)


def test_inputs_that_are_no_pixels_are_refused() -> None:
    """Proves for images out of range and for a table that nothing is computed, and that the range can be given."""
    posterior, (x, y) = classifier(), labelled()
    with pytest.raises(ValueError, match=r"lie in \[-0.99.*expected \[0, 1\]"):
        evaluate(posterior, (x.mul(2).sub(1).clamp(-1, 1), y), shift="images", **DRAWN)
    found = evaluate(posterior, (2 * x - 1, y), shift=image_shift("contrast", mean=0.5, std=0.5), **DRAWN)
    by_hand = evaluate(posterior, (2 * corrupt(x, "contrast", 5) - 1, y), **DRAWN)
    assert found["shift"]["contrast"]["nll"][4] == pytest.approx(by_hand["nll"], abs=1e-5)
    with pytest.raises(ValueError, match=r"expected images \[N, C, H, W\]"):
        evaluate(regression(), (torch.rand(30, 3), torch.rand(30, 1)), shift="images", **DRAWN)


def test_a_shift_on_another_device_has_the_same_numbers() -> None:
    """Proves that corrupted inputs and scores stay on the device of the network."""
    x, y = labelled()
    expected = evaluate(classifier(), (x, y), shift="images", **DRAWN)
    posterior = classifier()
    with PretendDevice():
        posterior.model.to(DEVICE)
        posterior.guide.to(DEVICE)  # type: ignore[attr-defined]
        found = evaluate(posterior, (x, y), shift="images", **DRAWN)
    for name in ("cA", "cNLL", "cECE"):
        assert found[name] == pytest.approx(expected[name], abs=1e-5)
