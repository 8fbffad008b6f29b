"""`fit`: what it minimises, what it is fed, where it stops, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from by_hand import chain, parts, scatter
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import FitState, MixtureELBO, cosine, fit, multistep
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide
from pyro_bnn.priors import HierarchicalCauchy

N = 20


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x, torch.sin(x[:, 0])


def pair(seed: int = 0, **options: Any) -> tuple[Rank1, Rank1Guide]:
    model = Rank1(chain(2, 4, 1, seed=seed), Gaussian(), N, **options)
    torch.manual_seed(seed)
    return model, Rank1Guide(model, 2)


def parameters(*programs: Any) -> dict[str, Tensor]:
    return {f"{i}.{n}": p.detach().clone() for i, m in enumerate(programs) for n, p in m.named_parameters()}


def state_of(model: nn.Module, guide: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters and statistics."""
    trained = {f"{i}.{n}": p for i, m in enumerate((model, guide)) for n, p in m.named_parameters() if p.requires_grad}
    return {n: v.detach().clone() for n, v in (trained | dict(model.named_buffers())).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Recording(MixtureELBO):
    """Keeps the draws of every step and the weight of its divergence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.draws: list[dict[str, Tensor]] = []
        self.batches: list[Any] = []
        self.betas: list[float] = []

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        self.batches.append(args)
        sites = {n: s for n, s in guide_trace.nodes.items() if s["type"] == "sample"}
        self.draws.append({n: s["value"].detach().clone() for n, s in sites.items()})  # points move with the step
        scale = sites["0.weight_tau"]["scale"]  # of a site inside the members plate alone
        self.betas.append(float(scale) * 2)
        return model_trace, guide_trace


# ------------------------------------------------------------------------------------------- the objective


def test_losses_are_the_negative_elbo_in_nats_per_datum() -> None:
    """The first step's loss is the ELBO written by hand, at that step's draws, batch and weight of the divergence."""
    x, y = data()
    model, guide = pair(prior=HierarchicalCauchy())
    scatter(guide)
    before, its_guide = copy.deepcopy(model), copy.deepcopy(guide)
    for kl_annealing, beta in ((0.0, 1.0), (2.0, 1 / 6)):
        elbo = Recording()
        model, guide = copy.deepcopy(before), copy.deepcopy(its_guide)
        posterior = fit(
            model, guide, (x, y), epochs=2, batch_size=8, kl_annealing=kl_annealing, elbo=elbo, progress=False, seed=0
        )
        assert len(posterior.losses) == 6
        assert [len(b) for _, b in elbo.batches] == [8, 8, 4] * 2
        p = parts(before, its_guide, elbo.draws[0], *elbo.batches[0], prior=HierarchicalCauchy())
        expected = -(p.likelihood + p.log_weights - beta * p.kl) / N
        assert posterior.losses[0] == pytest.approx(expected, rel=1e-6)


def test_annealing_grows_step_by_step() -> None:
    """beta = min(1, step / annealing), counted in steps of the whole run."""
    elbo = Recording()
    fit(*pair(), data(), epochs=4, batch_size=8, kl_annealing=2.5, elbo=elbo, progress=False)
    np.testing.assert_allclose(elbo.betas, np.minimum(1, np.arange(1, 13) / 7.5), rtol=1e-12)
    elbo = Recording()
    fit(*pair(), data(), epochs=1, batch_size=8, elbo=elbo, progress=False)
    assert elbo.betas == [1, 1, 1]


@pytest.mark.parametrize(
    "elbo", [None, MixtureELBO("sum"), MixtureELBO("mean", "mixture"), Trace_ELBO(), TraceMeanField_ELBO(2)]
)
def test_training_improves_the_objective(elbo: Any) -> None:
    torch.manual_seed(0)
    posterior = fit(*pair(), data(), epochs=40, lr=0.02, elbo=elbo, progress=False, seed=0)
    assert np.mean(posterior.losses[-8:]) < np.mean(posterior.losses[:8])


# ------------------------------------------------------------------------------------------------- the data


class Sides(nn.Module):
    """Takes keyword arguments, one of which has no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(3, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor, gain: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(left) + gain * self.b(right)))


class Items(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        left = torch.full((2,), i / N)
        return {"left": left, "right": torch.ones(3)}, torch.tensor(i % 3)


@pytest.mark.parametrize("form", ["pair", "dataset", "loader", "dict", "dict-dataset", "tuple"])
def test_forms_of_data(form: str) -> None:
    """Every sample is seen once in an epoch, whatever the data come as."""
    x, y = (t.float() for t in data())
    labels = torch.arange(N) % 3
    given: Any
    if form in ("dict", "dict-dataset", "tuple"):
        sides = {"left": x, "right": torch.randn(N, 3), "gain": torch.tensor(0.5)}
        net: nn.Module = Sides()
        given = {"dict": (sides, labels), "tuple": (tuple(sides.values()), labels), "dict-dataset": Items()}[form]
        if form == "dict-dataset":
            net = Fixed()
        likelihood: Any = Categorical()
        inputs = sides if form == "dict" else tuple(sides.values())
    else:
        net, likelihood, inputs = chain(2, 4, 1).float(), Gaussian(), x
        dataset = TensorDataset(x, y)
        given = {"pair": (x, y), "dataset": dataset, "loader": DataLoader(dataset, 6, shuffle=True)}[form]
    model = Rank1(net, likelihood, N)
    sizes = []

    class Counting(MixtureELBO):
        def differentiable_loss(self, model: Any, guide: Any, x: Any, y: Tensor) -> Any:  # type: ignore[override]
            sizes.append(len(y))
            return super().differentiable_loss(model, guide, x, y)

    posterior = fit(model, Rank1Guide(model), given, epochs=2, batch_size=6, elbo=Counting(), progress=False)
    assert sizes == [6, 6, 6, 2] * 2
    if form == "dict-dataset":
        inputs = {"left": x, "right": torch.ones(N, 3)}
    assert posterior.predict(inputs, 2).mean.shape[0] == N


class Fixed(Sides):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(left, right, torch.tensor(1.0))


class Lengths(Dataset[Any]):
    """Sequences, of another length in every batch."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Any:
        length = 3 + i // 4
        return torch.randn(length, 2), torch.arange(length) % 3


def test_sequences_of_different_lengths() -> None:
    model = Dense(chain(2, 4, 3).float(), Categorical(class_dim=-1), 8)  # one has as many labels as there are classes
    loader = DataLoader(Lengths(), batch_size=4)
    posterior = fit(model, MeanFieldGuide(model), loader, epochs=2, progress=False)
    assert np.isfinite(posterior.losses).all()


def nan_in_x() -> Any:
    x, y = data()
    x[3, 1] = math.nan
    return x, y


CLASSES = torch.arange(N) % 3
SHAPED = r"y has shape \(20, 1\); for a network output of shape \(20, 3\) it should have \(20,\)"
BAD_VALUES: list[tuple[Any, Any, type[Exception], str]] = [
    (Gaussian(), lambda x, y: (x, y.long()), TypeError, "a regression target must be floating point"),
    (Categorical(), lambda x, y: (x, y), TypeError, r"class labels must be integers \(y.long\(\)\)"),
    (Categorical(), lambda x, y: (x, CLASSES + 1), ValueError, "holds label 3, but the network has 3 outputs; labels"),
    (Categorical(), lambda x, y: (x, CLASSES - 1), ValueError, "y holds label -1"),
    (Categorical(), lambda x, y: (x, CLASSES[:, None]), ValueError, SHAPED),
    (Bernoulli(), lambda x, y: (x, torch.full((N, 3), 2.0)), ValueError, "values other than 0 and 1"),
    (Poisson(), lambda x, y: (x, torch.full((N, 3), -1.0)), ValueError, "not counts"),
    (Gaussian(), lambda x, y: (x, torch.full((N, 3), math.inf)), ValueError, "y holds NaN or infinite values"),
    (Gaussian(), lambda x, y: (x, y), ValueError, r"y has shape \(20,\); for a network output of shape \(20, 3\)"),
    (Categorical(), lambda x, y: (nan_in_x()[0], CLASSES), ValueError, "x holds 1 NaN or infinite values; drop or"),
    (Categorical(), lambda x, y: (x[:0], CLASSES[:0]), ValueError, "the data (set )?is empty"),
    (
        Categorical(),
        lambda x, y: (x[:9], CLASSES[:9]),
        ValueError,
        "built with num_data=20, but the data has 9 samples",
    ),
    (Categorical(), lambda x, y: (x.repeat(2, 1), CLASSES.repeat(2)), ValueError, "num_data=20, but the data has 40"),
]
BAD_PAIRS: list[tuple[Any, type[Exception], str]] = [
    (lambda x, y: (x, CLASSES[:-1]), ValueError, "disagree on the number of samples: y has 19, x has 20"),
    (lambda x, y: x, TypeError, r"must be a DataLoader, a Dataset or a pair \(x, y\), got Tensor"),
    (lambda x, y: [x, CLASSES], TypeError, r"must be a DataLoader, a Dataset or a pair \(x, y\), got list"),
    (lambda x, y: (x, CLASSES, y), TypeError, r"data in memory must be \(x, y\) or a dict with 'labels'"),
    (lambda x, y: (x, str(CLASSES.tolist())), TypeError, "y is str; expected tensors, NumPy arrays, pandas frames or"),
    (lambda x, y: ("text", CLASSES), TypeError, "x holds no tensor with a batch axis: got str"),
]


def refuse(likelihood: Any, given: Any, error: type[Exception], message: str, num_data: int = N) -> None:
    """Before the first step, and before anything has moved."""
    model = Rank1(chain(2, 4, 3), likelihood, num_data)
    guide = Rank1Guide(model)
    start = parameters(model, guide)
    with pytest.raises(error, match=message):
        fit(model, guide, given, epochs=1, progress=False)
    assert same(parameters(model, guide), start)


@pytest.mark.parametrize("form", ["pair", "dataset", "loader"])
@pytest.mark.parametrize(("likelihood", "make", "error", "message"), BAD_VALUES)
def test_bad_values(likelihood: Any, make: Any, error: type[Exception], message: str, form: str) -> None:
    """Refused with what is wrong and what was expected, whatever the data come as."""
    given: Any = make(*data())
    if form != "pair":
        given = TensorDataset(*given)
    if form == "loader" and len(given):
        given = DataLoader(given, batch_size=N)
    refuse(likelihood, given, error, message)


@pytest.mark.parametrize(("make", "error", "message"), BAD_PAIRS)
def test_bad_pairs(make: Any, error: type[Exception], message: str) -> None:
    refuse(Categorical(), make(*data()), error, message)


def test_batches_whose_x_and_y_disagree() -> None:
    x, _ = data()
    loader: Any = DataLoader([(x, CLASSES[:-1])], batch_size=None)  # type: ignore[arg-type]
    refuse(Categorical(), loader, ValueError, "disagree on the number of samples: y has 19, x has 20", num_data=1)
    loader = DataLoader([(x, CLASSES)], batch_size=None)  # type: ignore[arg-type]
    refuse(
        Categorical(), loader, ValueError, "the batch has 20 samples, but num_data=1: num_data is the size", num_data=1
    )


def test_bad_loaders() -> None:
    x, y = data()
    model, guide = pair()
    with pytest.raises(ValueError, match="the loader is empty: it gives no batch"):
        fit(model, guide, DataLoader(TensorDataset(x, y), batch_size=50, drop_last=True), epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"the loader must give pairs \(x, y\)"):
        fit(model, guide, TensorDataset(x, x, y), epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"the loader must give pairs \(x, y\)"):
        fit(model, guide, DataLoader(TensorDataset(x)), epochs=1, progress=False)

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(x, y, strict=True))

    with pytest.raises(TypeError, match="the loader has no length, by which annealing and schedules count"):
        fit(model, guide, DataLoader(Stream(), batch_size=4), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number, at least 1"),
        ({"epochs": 1, "batch_size": 0}, "batch_size=0: expected a whole number, at least 1"),
        ({"epochs": 1, "optim": "lion"}, "optim='lion': expected 'adamw', 'adam', 'sgd', a class of"),
        ({"epochs": 1, "decay": "biases"}, "decay='biases': expected 'weights' or 'all'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*pair(), data(), progress=False, **options)


def test_nothing_to_train() -> None:
    def program(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="neither model nor guide has parameters to train"):
        fit(program, program, data(), epochs=1, progress=False)


# --------------------------------------------------------------------------- reproducing, stopping, resuming


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    results = []
    for noise in (1, 2):
        model, guide = pair()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        posterior = fit(model, guide, data(), epochs=3, batch_size=8, progress=False, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        results.append((parameters(model, guide), posterior.losses))
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    model, guide = pair()
    fit(model, guide, data(), epochs=3, batch_size=8, progress=False, seed=6)
    assert not same(parameters(model, guide), results[0][0])


def normalised(seed: int) -> tuple[Rank1, Rank1Guide]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1)).double()
    model = Rank1(net, Gaussian(), N)
    return model, Rank1Guide(model, 2)


def auto(seed: int) -> tuple[Dense, AutoNormal]:
    model = Dense(chain(2, 4, 1, seed=seed), Gaussian(), N)
    return model, AutoNormal(model)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("make", [normalised, auto])
@pytest.mark.parametrize("shuffled", [False, True], ids=["pair", "loader"])
@pytest.mark.parametrize("seed", [None, 3])
def test_resumed_run_is_the_uninterrupted_one(make: Any, shuffled: bool, seed: int | None, tmp_path: Path) -> None:
    """Parameters, statistics and losses bit for bit, from a new process (here: new objects), at any point."""
    x, y = data()
    options = {
        **{"epochs": 5, "batch_size": 8, "optim": "sgd", "lr": 0.01, "schedule": cosine(1), "kl_annealing": 3},
        **{"progress": False, "seed": seed, "checkpoint": tmp_path / "run" / "checkpoint"},
    }

    def given() -> Any:
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True) if shuffled else (x, y)

    def run(model: Any, guide: Any, **more: Any) -> Any:
        torch.manual_seed(11)
        return fit(model, guide, given(), **{**options, **more})

    model, guide = make(0)
    whole = run(model, guide, checkpoint=None)
    expected = state_of(model, guide)

    def interrupt(state: FitState) -> None:
        if state.epoch in (2, 4):
            raise Interrupted

    for attempt in range(3):
        other, its_guide = make(0 if attempt == 0 else 100 + attempt)
        if attempt < 2:
            with pytest.raises(Interrupted):
                run(other, its_guide, callbacks=[interrupt])
        else:
            torch.manual_seed(99)
            resumed = fit(other, its_guide, given(), **options)
    assert same(state_of(other, its_guide), expected)
    assert resumed.losses == whole.losses
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["checkpoint"]


def test_bad_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    fit(*pair(), data(), epochs=1, checkpoint=path, progress=False)
    model = Rank1(chain(2, 5, 1), Gaussian(), N)
    with pytest.raises(ValueError, match="is the checkpoint of another model or guide"):
        fit(model, Rank1Guide(model, 2), data(), epochs=2, checkpoint=path, progress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a readable checkpoint .*remove it to start afresh"):
        fit(*pair(), data(), epochs=2, checkpoint=path, progress=False)
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="is not a pyro_bnn checkpoint"):
        fit(*pair(), data(), epochs=2, checkpoint=path, progress=False)
    torch.save({"format": "pyro_bnn checkpoint", "version": 99}, path)
    with pytest.raises(ValueError, match="written by a newer pyro_bnn"):
        fit(*pair(), data(), epochs=2, checkpoint=path, progress=False)


def test_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = fit(*pair(), data(), epochs=2, checkpoint=tmp_path / "c", progress=False, seed=0)
    again = fit(*pair(1), data(), epochs=2, checkpoint=tmp_path / "c", progress=False, seed=0)
    assert again.losses == first.losses
    x, _ = data()
    assert torch.equal(again.predict(x, 2, seed=0).outputs, first.predict(x, 2, seed=0).outputs)


def test_callbacks_see_the_epoch_and_stop_early() -> None:
    seen: list[FitState] = []

    def one(state: FitState) -> bool:
        seen.append(FitState(**{**vars(state), "losses": list(state.losses)}))
        return state.epoch == 3

    calls = []
    posterior = fit(
        *pair(), data(), epochs=10, batch_size=8, callbacks=[one, lambda s: calls.append(s.epoch)], progress=False
    )
    assert [s.epoch for s in seen] == [1, 2, 3] == calls and [s.step for s in seen] == [3, 6, 9]
    assert len(posterior.losses) == 9
    assert seen[1].loss == pytest.approx(np.mean(posterior.losses[3:6])) and seen[1].losses == posterior.losses[:6]
    assert isinstance(seen[0].optimizer, torch.optim.AdamW) and isinstance(seen[0].model, Rank1)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_nan_stops_with_the_step_and_the_site_and_the_last_good_state() -> None:
    """From a step that was too large: everything is as at the end of the epoch before."""
    model, guide = normalised(0)
    good: list[Any] = []

    def explode(state: FitState) -> None:
        good.append(state_of(model, guide))
        if state.epoch == 2:
            for group in state.optimizer.param_groups:
                group["lr"] = 1e300

    with pytest.raises(FloatingPointError) as caught:
        fit(model, guide, data(), epochs=9, batch_size=8, optim="sgd", lr=1e-3, callbacks=[explode], progress=False)
    message = str(caught.value)
    assert "at step 8 (epoch 3)" in message and "back at the end of epoch 2" in message
    assert "the site '" in message and "A smaller lr, clip_norm= or a longer kl_annealing usually helps" in message
    assert same(state_of(model, guide), good[-1])
    assert fit(model, guide, data(), epochs=1, lr=1e-3, progress=False).losses, "and can be trained on"


class Roots(nn.Module):
    """The square root of a number that may be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.layer(x) - 100).sqrt()


class Infinite(Roots):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * math.inf


@pytest.mark.parametrize("net", [Roots, Infinite])
def test_nan_in_the_first_step_names_the_likelihood(net: Any) -> None:
    model = Dense(net(), Gaussian(0.1), N)
    guide = MeanFieldGuide(model)
    start = parameters(model, guide)
    with pytest.raises(FloatingPointError, match="at step 1 .*where the site 'obs' of the model has log density"):
        fit(model, guide, data(), epochs=1, progress=False)
    assert same(parameters(model, guide), start)


SUPPORTS = {
    "positive": dist.LogNormal(0.0, 0.1),
    "half": dist.HalfCauchy(1.0),
    "gamma": dist.Gamma(2.0, 1.0),
    "share": dist.Beta(2.0, 2.0),
    "between": dist.Uniform(-1.0, 1.0),
}


@pytest.mark.parametrize("prior", SUPPORTS.values(), ids=SUPPORTS)
@pytest.mark.parametrize("start", [-1.0, 0.5])
def test_a_guide_beyond_the_support_of_a_prior_is_refused(prior: Any, start: float) -> None:
    """Site, prior and guide are named before the first step, wherever the means start: no learning rate is at fault."""
    model = Rank1(chain(2, 4, 1), Gaussian(), N, prior=prior)
    guide = Rank1Guide(model, init_means=lambda shape: torch.full(shape, start))
    said = rf"supports of the site '0.weight.s' differ: its prior, a {type(prior).__name__},.*a FactorisedNormal on"
    with pytest.raises(ValueError, match=said):
        fit(model, guide, data(), epochs=1, progress=False)


@pytest.mark.parametrize("prior", SUPPORTS.values(), ids=SUPPORTS)
def test_an_autoguide_follows_the_support_of_a_prior(prior: Any) -> None:
    """The same model trains with a guide that transforms its draws, and with points that lie inside."""
    model = Rank1(chain(2, 4, 1), Gaussian(), N, prior=prior, member_bias=False)
    assert len(fit(model, AutoNormal(model), data(), epochs=1, progress=False).losses) > 0


def test_other_errors_of_the_first_step_stay_what_they_are() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(z * x[:, 0], 1.0), obs=y)

    with pytest.raises(ValueError, match="Shape mismatch inside plate"):
        fit(model, AutoNormal(model), data(), epochs=1, progress=False)


# --------------------------------------------------------------------------------------------- the optimiser


def test_schedules_step_with_the_optimiser() -> None:
    rates: list[float] = []

    class Noting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def run(schedule: Any, epochs: int) -> list[float]:
        rates.clear()
        optim = lambda groups: Noting(groups, lr=1e-3)  # noqa: E731
        fit(*pair(), data(), epochs=epochs, batch_size=8, optim=optim, schedule=schedule, progress=False)
        return [r * 1e3 for r in rates]

    # 3 steps in an epoch
    expected = [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, *[1.0] * 3, *[0.2] * 3, *[0.04] * 3]
    assert run(multistep(2, (3, 4), 0.2), 5) == pytest.approx(expected)
    wave = [0.5 * (1 + math.cos(math.pi * k / 9)) for k in range(9)]
    assert run(cosine(1), 4) == pytest.approx([1 / 3, 2 / 3, 1.0, *wave])
    assert run(None, 2) == pytest.approx([1.0] * 6)


def groups_of(**options: Any) -> tuple[Any, list[Any], Rank1, Rank1Guide]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    model = Rank1(net, Gaussian(), N)
    guide = Rank1Guide(model, 2)
    captured: list[Any] = []

    def optim(groups: Any) -> Any:
        captured.extend({**g, "params": list(g["params"])} for g in groups)
        return torch.optim.SGD(groups, lr=1e-3)

    fit(model, guide, data(), epochs=1, optim=optim, progress=False, **options)
    return dict(model.core().net.named_parameters()), captured, model, guide


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_decay_is_for_weights_and_never_for_factors(decay: Any) -> None:
    """ "weights" is W alone; "all" adds normalisation and the members' biases. The rest is one group without decay."""
    net, groups, _, guide = groups_of(weight_decay=0.3, decay=decay)
    decayed, plain = ({id(p) for p in g["params"]} for g in groups)
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    chosen = {"0.weight", "2.weight"} if decay == "weights" else set(net)
    assert {n for n, p in net.items() if id(p) in decayed} == chosen
    assert (id(guide.point[0]) in decayed) == (decay == "all")
    for name in ("loc", "rho", "scale_loc", "scale_rho"):
        assert id(getattr(guide, name)[0]) in plain
    assert not decayed & plain


def test_decay_shrinks_weights_as_torch_does() -> None:
    """With a learning rate and no gradient to speak of, W goes to W (1 - lr * decay) in every step of AdamW."""
    runs = []
    for weight_decay in (0.0, 0.5):
        model, guide = pair()
        before = parameters(model, guide)
        fit(model, guide, data(), epochs=1, lr=1e-3, weight_decay=weight_decay, progress=False, seed=0)
        runs.append({n: p - before[n] for n, p in parameters(model, guide).items()})
    for name, p in before.items():
        extra = runs[1][name] - runs[0][name]
        weight = name.startswith("0.") and name.endswith("weight")
        torch.testing.assert_close(extra, -1e-3 * 0.5 * p if weight else torch.zeros_like(p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_clipped_as_one_vector(clip: float | None) -> None:
    model, guide = pair()
    before = parameters(model, guide)
    fit(
        model,
        guide,
        data(),
        epochs=1,
        optim=lambda g: torch.optim.SGD(g, lr=1.0),
        clip_norm=clip,
        progress=False,
        seed=0,
    )
    moved = math.sqrt(sum(float((p - before[n]).square().sum()) for n, p in parameters(model, guide).items()))
    assert moved == pytest.approx(0.01, rel=1e-3) if clip else moved > 0.1


def test_named_optimisers_and_ones_own() -> None:
    model, guide = pair()
    own = torch.optim.RMSprop(guide.parameters(), lr=0.01)
    seen: list[Any] = []
    for optim in (None, "adamw", "sgd", own):
        fit(model, guide, data(), epochs=1, optim=optim, callbacks=[lambda s: seen.append(s.optimizer)], progress=False)
    assert [type(o).__name__ for o in seen] == ["AdamW", "AdamW", "SGD", "RMSprop"] and seen[3] is own
    assert [o.param_groups[0]["lr"] for o in seen[:3]] == [1e-3, 1e-3, 0.1]
    assert all(g["weight_decay"] == 0 for o in seen[:3] for g in o.param_groups)
    assert seen[2].param_groups[0]["nesterov"] and seen[2].param_groups[0]["momentum"] == 0.9


def test_progress_reports_the_elbo(capsys: pytest.CaptureFixture[str]) -> None:
    posterior = fit(*pair(), data(), epochs=2, seed=0)
    assert f"ELBO {-np.mean(posterior.losses[-1:]):.4f} nats/datum" in capsys.readouterr().out.replace("\n", " ")


# ----------------------------------------------------------------------------------------- the parameter store


NAMES = ["network.net.0.weight", "network.net.2.weight", "guide.loc.0", "guide.rho.0", "guide.point.0", "mine"]


def fill_store() -> dict[str, Tensor]:
    store = pyro.get_param_store()
    store.clear()
    for name in NAMES:
        pyro.param(name, torch.full((3,), 7.0), constraint=dist.constraints.positive)
    return {n: store._params[n] for n in NAMES}


def trained(model: Any, guide: Any, run: Any) -> list[str]:
    """The parameters that have moved, of those that can: a bias that every member has of its own is not used."""
    before = parameters(model, guide)
    run()
    after = parameters(model, guide)
    return [n for n in before if not torch.equal(before[n], after[n])]


EVERY = [
    "0.network.net.0.weight",
    "0.network.net.2.weight",
    *(f"1.{n}.0" for n in ("loc", "rho", "scale_loc", "scale_rho", "point")),
]


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_fit_leaves_the_users_store_alone(filled: bool) -> None:
    """Also when it holds entries of the same names, of other shapes and constraints; for one model after another."""
    before = fill_store() if filled else {}
    for seed in (0, 1):
        model, guide = pair(seed)
        names = trained(model, guide, lambda m=model, g=guide: fit(m, g, data(), epochs=2, progress=False))
        assert set(names) == set(EVERY)
        store = pyro.get_param_store()
        assert list(store.keys()) == list(before)
        for name, value in before.items():
            assert store._params[name] is value
            torch.testing.assert_close(store[name].detach(), torch.full((3,), 7.0))


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_users_own_svi_trains_every_parameter(filled: bool) -> None:
    """Entries that an earlier model left under the same names are not trained in place of this model's own."""
    if filled:
        fill_store()
    x, y = data()
    for seed in (0, 1):
        model, guide = pair(seed)
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        names = trained(model, guide, lambda e=engine: [e.step(x, y) for _ in range(2)])
        assert set(names) == set(EVERY)
        assert pyro.get_param_store()._params["guide.loc.0"] is guide.loc[0]


class Both(PyroModule):
    """Two networks in one model, with a latent of its own."""

    def __init__(self, first: Rank1, second: Rank1) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        offset = pyro.sample("offset", dist.Normal(x.new_zeros(()), 1.0))
        f, h = self.first(x).squeeze(-1), self.second(x).squeeze(-1)
        with (
            self.first.members_plate(),
            self.second.members_plate(),
            pyro.plate("data", N, subsample_size=len(x), dim=-1),
        ):
            pyro.sample("obs", dist.Normal(f + h + offset, 0.3), obs=y)


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("engine", ["fit", "svi"])
@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_two_networks_in_one_model(engine: str, module: bool, filled: bool) -> None:
    """With prefix= every parameter of both trains, and each site, plate and parameter has a name of its own."""
    before = fill_store() if filled else {}
    x, y = data()
    first = Rank1(chain(2, 4, 1), None, prefix="first")
    second = Rank1(chain(2, 4, 1, seed=1), None, prefix="second", members_dim=-3)
    guides = Rank1Guide(first, 2), Rank1Guide(second, 3)
    both = Both(first, second)
    own = AutoNormal(poutine.block(both, expose=["offset"]))

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        for one in (own, *guides):
            one(x, y)

    model: Any = both if module else lambda x, y=None: both(x, y)

    def run() -> None:
        if engine == "fit":
            fit(model, guide, (x, y), epochs=3, lr=0.01, progress=False)
        else:
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
            for _ in range(3):
                svi.step(x, y)

    programs = nn.ModuleList([first, guides[0], second, guides[1]])
    start = {n: p.detach().clone() for n, p in programs.named_parameters()}
    run()
    still = [n for n, p in programs.named_parameters() if torch.equal(p, start[n]) and p.numel()]
    unused = [f"{i}.network.net.{layer}.bias" for i in (0, 2) for layer in (0, 2)]
    assert still == unused
    offset = own.locs.offset.detach() if hasattr(own, "locs") else torch.zeros(())
    assert float(offset) != 0
    if engine == "fit":
        assert list(pyro.get_param_store().keys()) == list(before)
    trace = poutine.trace(guide).get_trace(x, y)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x, y)
    assert replayed.nodes["obs"]["fn"].batch_shape == (3, 2, N)
    assert float(replayed.nodes["obs"]["scale"]) == pytest.approx(1 / 6)


def test_users_parameters_in_functions_are_trained_and_kept() -> None:
    """Those of pyro.param in a function live on in the posterior, and nowhere else."""
    x, y = data()
    model = Dense(chain(2, 1), Gaussian(0.5), N)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("members", 1, dim=-2):
            for site in model.sites():
                loc = pyro.param(f"{site.name}_loc", torch.zeros(site.shape, dtype=torch.float64))
                pyro.sample(site.name, dist.Normal(loc, 0.01).to_event(len(site.shape)))

    posterior = fit(model, guide, (x, y), epochs=150, lr=0.03, progress=False, seed=0)
    assert not len(pyro.get_param_store())
    features = torch.cat([x, torch.ones(N, 1)], 1)
    exact = torch.linalg.solve(features.T @ features / 0.25 + torch.eye(3), features.T @ y / 0.25)
    draws = posterior.draws(50, seed=0)
    mean = torch.cat([draws["0.weight"].mean((0, 1)).flatten(), draws["0.bias"].mean((0, 1))])
    assert (mean - exact).abs().max() < 0.05
    assert isinstance(posterior, pb.Posterior)
