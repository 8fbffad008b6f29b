"""The training loop: data in all forms, reproducibility, checkpoints, stops, schedules, and Pyro's parameter store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import FitState, cosine, fit, warmup_steps
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide

N = 30


def net(out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, out))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def pair(likelihood: Any = None, **options: Any) -> tuple[Rank1, Rank1Guide]:
    torch.manual_seed(2)
    model = Rank1(net(), Categorical() if likelihood is None else likelihood, N, **options)
    return model, Rank1Guide(model, components=2)


def state(*modules: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for m in modules for p in m.parameters()]


def quick(model: Any, guide: Any, data_: Any, **options: Any) -> pb.Posterior:
    return fit(model, guide, data_, **({"epochs": 3, "batch_size": 8, "progress": False, "seed": 0} | options))


def test_pair_dataset_and_loader_train_and_dicts_and_tuples_are_inputs() -> None:
    """Proves that each form of data gives one loss a step, and that the loss falls on learnable labels."""
    x, y = data()
    for form in ((x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)):
        posterior = quick(*pair(), form, epochs=40, lr=0.02)
        assert len(posterior.losses) == 40 * math.ceil(N / 8)
        assert sum(posterior.losses[-4:]) < sum(posterior.losses[:4])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, u: Tensor, v: Tensor) -> Tensor:
            return self.a(u) + self.b(v)

    for inputs in ({"u": x, "v": x[:, :2]}, (x, x[:, :2])):
        model = Rank1(Two(), Categorical(), N)
        assert quick(model, Rank1Guide(model), (inputs, y)).predict(inputs).probs.shape == (N, 3)


def test_a_seed_reproduces_the_run_and_leaves_the_global_random_state_alone() -> None:
    runs = []
    for seed in (0, 0, 1):
        model, guide = pair()
        torch.manual_seed(123)
        before = torch.get_rng_state()
        quick(model, guide, data(), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(torch.cat([p.flatten() for p in state(model, guide)]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    """Proves that parameters, optimiser, schedule, annealing, losses and random state go through the checkpoint."""
    options: dict[str, Any] = {"schedule": cosine(1), "kl_annealing": 4, "epochs": 6}
    model, guide = pair()
    whole = quick(model, guide, data(), **options)
    file = tmp_path / "run.pt"

    def stop(fit_state: FitState) -> bool:
        return fit_state.epoch == 2

    first = pair()
    quick(*first, data(), checkpoint=file, callbacks=[stop], **options)
    second = pair()
    resumed = quick(*second, data(), checkpoint=file, **options)
    assert resumed.losses == whole.losses
    for a, b in zip(state(*second), state(model, guide), strict=True):
        assert torch.equal(a, b)
    other = Dense(net(), Categorical(), N)
    with pytest.raises(ValueError, match="another model or guide"):
        quick(other, MeanFieldGuide(other), data(), checkpoint=file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        quick(*pair(), data(), checkpoint=file)


def test_callbacks_see_each_epoch_and_end_the_run() -> None:
    seen: list[tuple[int, int, float]] = []

    def callback(fit_state: FitState) -> bool:
        seen.append((fit_state.epoch, fit_state.step, fit_state.loss))
        return fit_state.epoch == 2

    posterior = quick(*pair(), data(), epochs=9, callbacks=[callback])
    assert [s[:2] for s in seen] == [(1, 4), (2, 8)]
    assert seen[1][2] == pytest.approx(sum(posterior.losses[4:]) / 4)


def test_a_loss_that_is_not_finite_stops_names_the_site_and_restores_the_last_good_epoch() -> None:
    """Proves the message, and that all parameters are those at the end of the epoch before."""
    model, guide = pair()
    good: list[Tensor] = []

    def poison(fit_state: FitState) -> None:
        if fit_state.epoch == 2:
            good.extend(state(model, guide))
        if fit_state.epoch == 2:
            for group in fit_state.optimizer.param_groups:
                group["lr"] = 1e30

    with pytest.raises(FloatingPointError, match=r"at step \d+ \(epoch 3\).*(site|parameter)") as error:
        quick(model, guide, data(), epochs=5, callbacks=[poison], optim="sgd")
    assert "end of epoch 2" in str(error.value)
    for now, before in zip(state(model, guide), good, strict=True):
        assert torch.equal(now, before)

    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * math.inf

    model = Rank1(Explodes(), Gaussian(1.0), N)
    with pytest.raises(FloatingPointError, match="site 'obs' of the model"):
        quick(model, Rank1Guide(model), (data()[0], torch.randn(N)))


def test_schedules() -> None:
    """Proves the two schedules against their formulas, step by step."""
    weight = nn.Parameter(torch.zeros(1))

    def rates(schedule: Any, steps: int, epochs: int) -> list[float]:
        optimizer = torch.optim.SGD([weight], lr=2.0)
        scheduler = schedule(optimizer, steps, epochs)
        out = []
        for _ in range(steps * epochs):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return out

    expected = [2 * (i + 1) / 5 for i in range(5)] + [1 + math.cos(math.pi * i / 15) for i in range(15)]
    assert rates(cosine(1), 5, 4) == pytest.approx(expected)
    expected = [0.5, 1, 1.5, 2] + [2.0] * 4 + [0.4] * 4 + [0.08] * 4
    assert rates(warmup_steps(1, (2, 3), 0.2), 4, 4) == pytest.approx(expected)


def test_weight_decay_applies_to_the_weights_alone_or_to_the_whole_network() -> None:
    groups: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str) -> Any:
        def callback(fit_state: FitState) -> None:
            groups[name] = fit_state.optimizer.param_groups

        return callback

    for decay in ("weights", "all"):
        model, guide = pair()
        quick(model, guide, data(), epochs=1, weight_decay=0.5, decay=decay, callbacks=[keep(decay)])
        decayed = {id(p) for g in groups[decay] if g["weight_decay"] == 0.5 for p in g["params"]}
        parameters = dict(model.network.net.named_parameters())
        chosen = [p for n, p in parameters.items() if n.endswith("weight") or decay == "all"]
        assert {id(p) for p in chosen} <= decayed
        assert not decayed & {id(guide.loc), id(guide.rho), id(guide.scale_loc), id(guide.scale_rho)}
        if decay == "weights":
            assert decayed == {id(p) for p in chosen}


def test_clip_norm_bounds_the_whole_gradient() -> None:
    """Proves the bound by the length of one plain SGD step: lr times the clipped norm."""
    model, guide = pair()
    before = torch.cat([p.flatten() for p in state(model, guide)])

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0)

    quick(model, guide, data(), epochs=1, batch_size=N, optim=sgd, clip_norm=0.01)
    moved = torch.cat([p.flatten() for p in state(model, guide)]) - before
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_statistics_of_normalisation_move_once_a_step() -> None:
    """Proves that running means after one step are those of one update with all rows of all members."""
    model = Dense(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), Categorical(), N)
    x, y = data()
    quick(model, MeanFieldGuide(model), (x, y), epochs=1, batch_size=N)
    norm = model.network.net[0]
    assert int(norm.num_batches_tracked) == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean(0))


# ------------------------------------------------------------------------------------------- the parameter store


def occupied_store(occupied: bool) -> dict[str, Tensor]:
    """A user's store, empty or with entries under the very names that the parameters of ``pair()`` have."""
    pyro.clear_param_store()
    if occupied:
        with pyro.get_param_store().scope() as scope:
            SVI(*pair(), pyro.optim.Adam({}), TraceMeanField_ELBO()).step(*data())
        assert "network.net.0.weight" in scope["params"]
        for name, p in scope["params"].items():
            pyro.param(name, torch.full_like(p, 7.0))
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("occupied", [False, True])
def test_fit_trains_every_parameter_and_leaves_the_users_store_as_it_was(occupied: bool) -> None:
    """Proves it for two models with the same parameter names, one after the other."""
    first, second = pair(), pair()
    before = occupied_store(occupied)
    for model, guide in (first, second):
        start = state(model, guide)
        quick(model, guide, data())
        assert stale(model, guide, start) == []
    after = dict(pyro.get_param_store().items())
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    pyro.clear_param_store()


def stale(model: nn.Module, guide: nn.Module, start: list[Tensor]) -> list[str]:
    """Names of trainable parameters that did not move. Biases of the network are replaced by those of the members."""
    names = [n for module in (model, guide) for n, _ in module.named_parameters()]
    now = [*model.parameters(), *guide.parameters()]
    return [
        n
        for n, p, old in zip(names, now, start, strict=True)
        if p.requires_grad and p.numel() and not n.endswith("bias") and torch.equal(p, old)
    ]


@pytest.mark.parametrize("occupied", [False, True])
def test_pyros_own_svi_trains_every_parameter_too(occupied: bool) -> None:
    """Proves that entries left in the store under the same names do not take the place of a model's own."""
    first, second = pair(), pair()
    occupied_store(occupied)
    for model, guide in (first, second):
        start = state(model, guide)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        losses = [svi.step(*data()) for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses)
        assert stale(model, guide, start) == []
        posterior = pb.Posterior(model, guide)
        assert posterior.predict(data()[0], 2).probs.shape == (N, 3)
    pyro.clear_param_store()


def test_two_networks_with_the_same_parameter_names_nested_in_one_model() -> None:
    """Proves that prefixes keep two equal networks apart in one program, under fit and under Pyro's SVI."""
    import pyro.distributions as dist

    def build() -> tuple[Any, Any, list[nn.Module]]:
        torch.manual_seed(0)
        a = Rank1(net(1), None, prefix="a")
        b = Rank1(net(1), None, prefix="b", members_dim=-3)
        guide_a, guide_b = Rank1Guide(a, 2), Rank1Guide(b, 3)

        def model(x: Tensor, y: Tensor | None = None) -> None:
            f = a(x).squeeze(-1) + b(x).squeeze(-1)
            with a.members(), b.members(), pyro.plate("data", N, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(f, 0.5), obs=y)

        def guide(x: Tensor, y: Tensor | None = None) -> None:
            guide_a(x)
            guide_b(x)

        return model, guide, [a, b, guide_a, guide_b]

    x, _ = data()
    y = x[:, 0]
    for way in ("fit", "svi"):
        model, guide, modules = build()
        start = [state(m) for m in modules]
        if way == "fit":
            quick(model, guide, (x, y))
        else:
            with pyro.get_param_store().scope():
                svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
                for _ in range(3):
                    svi.step(x, y)
        for module, old in zip(modules, start, strict=True):
            still = [
                n
                for (n, p), o in zip(module.named_parameters(), old, strict=True)
                if p.numel() and not n.endswith("bias") and torch.equal(p, o)
            ]
            assert still == [], way
    assert len(pyro.get_param_store()) == 0


# --------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_refused_with_the_remedy() -> None:
    x, y = data()
    with pytest.raises(TypeError, match=r"labels must be integers \(y\.long\(\)\)"):
        quick(*pair(), (x, y.float()))
    with pytest.raises(ValueError, match=r"label 3, but the network has 3 outputs; labels must lie in 0 \.\.\. 2"):
        quick(*pair(), (x, y + (y == 2)))
    with pytest.raises(ValueError, match="label -1"):
        quick(*pair(), (x, y - 1))
    with pytest.raises(ValueError, match=r"y has shape \(30, 1\)"):
        quick(*pair(), (x, y[:, None]))
    with pytest.raises(ValueError, match="data set is empty"):
        quick(*pair(), TensorDataset(x[:0], y[:0]))
    with pytest.raises(ValueError, match="gives no batch"):
        quick(*pair(), DataLoader(TensorDataset(x, y), batch_size=64, drop_last=True))
    with pytest.raises(ValueError, match="disagree on the number of samples"):
        quick(*pair(), (x[:9], y))
    with pytest.raises(ValueError, match="x holds 1 NaN"):
        quick(*pair(), (x.index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(math.nan)), y))
    with pytest.raises(ValueError, match="x holds 1 NaN"):
        bad = x.index_put((torch.tensor(29), torch.tensor(0)), torch.tensor(math.nan))
        quick(*pair(), DataLoader(TensorDataset(bad, y), batch_size=8))
    with pytest.raises(ValueError, match="num_data=30, but the data has 20 samples"):
        quick(*pair(), (x[:20], y[:20]))
    for n in (0, -1, 2.5):
        with pytest.raises(ValueError, match="expected the number of training samples"):
            Rank1(net(), Categorical(), n)  # type: ignore[arg-type]
    model = Rank1(net(), Categorical(), 8)
    with pytest.raises(ValueError, match="the batch has 30 samples, but num_data=8"):
        model(x, y)
    with pytest.raises(ValueError, match="epochs=0"):
        quick(*pair(), (x, y), epochs=0)
    with pytest.raises(ValueError, match="optim='adam'"):
        quick(*pair(), (x, y), optim="adam")
    with pytest.raises(TypeError, match="DataLoader, a Dataset or a pair"):
        quick(*pair(), [x, y])
