"""The objective of training as a module: its value, its parameters, loops around it, and two processes."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pyro_bnn as pb
from pyro_bnn.inference import Objective

N, NOISE = 12, 0.5


def linear(x: Tensor, y: Tensor | None = None) -> None:
    """``y ~ N(w x, NOISE)``, ``w ~ N(0, 2)``, with N rows in all."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(()), 2.0))
    with pyro.plate("data", N, subsample_size=len(x), subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(w * x, NOISE), obs=y)


def point(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.param("w.value", torch.tensor(0.7, dtype=torch.float64))
    pyro.sample("w", dist.Delta(w))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=generator, dtype=torch.float64)
    return x, 0.3 * x + NOISE * torch.randn(N, generator=generator, dtype=torch.float64)


def network() -> tuple[pb.models.Rank1, pb.models.Rank1Guide]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), 20)
    return model, pb.models.Rank1Guide(model, components=2)


def classes() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)


def log_terms(w: float, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Log likelihood of all rows, scaled up from these, and log prior."""
    likelihood = N / len(x) * float(dist.Normal(w * x, NOISE).log_prob(y).sum())
    return likelihood, float(dist.Normal(0.0, 2.0).log_prob(torch.tensor(w)))


def test_the_loss_is_the_negative_elbo_per_datum() -> None:
    """Proves the value by hand: N / B times the likelihood of the batch, beta times the prior, over N; in eval mode
    beta is 1 and the count of steps stays."""
    x, y = data()
    objective = Objective(linear, point, num_data=N, kl_annealing=4, example=(x, y))
    for step in range(6):
        rows = slice(0, 4) if step % 2 else slice(0, N)
        likelihood, prior = log_terms(0.7, x[rows], y[rows])
        assert objective.beta == min(1.0, (step + 1) / 4)
        assert float(objective(x[rows], y[rows]).detach()) == pytest.approx(
            -(likelihood + objective_beta(step) * prior) / N
        )
        held = objective.eval()(x, y).detach()
        assert float(held) == pytest.approx(-sum(log_terms(0.7, x, y)) / N) and objective.step == step + 1
        objective.train()


def objective_beta(step: int) -> float:
    return min(1.0, (step + 1) / 4)


def test_a_loop_of_ones_own_is_fit() -> None:
    """Proves that every loss of a hand-written loop has the bits of those of fit, and so have the parameters."""
    x, y = classes()
    model, guide = network()
    fitted = pb.inference.fit(
        model, guide, (x, y), epochs=3, batch_size=8, lr=0.01, kl_annealing=2, progress=False, seed=5
    )
    own_model, own_guide = network()
    torch.manual_seed(5)
    objective = Objective(own_model, own_guide, kl_annealing=2 * 3, example=(x[:8], y[:8]))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(3):
        for rows in torch.randperm(20).split(8):
            loss = objective(x[rows], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses == fitted.losses
    for one, other in zip(guide.parameters(), own_guide.parameters(), strict=True):
        assert torch.equal(one, other)
    probs = objective.posterior().predict(x, 4, seed=0).probs
    assert torch.equal(probs, fitted.predict(x, 4, seed=0).probs)


def test_parameters_of_functions_belong_to_the_objective() -> None:
    """Proves that they are all of parameters(), train, and leave the store of the process as it was."""
    x, y = data()
    pyro.clear_param_store()
    pyro.param("w.value", torch.tensor(9.0))
    objective = Objective(linear, point, num_data=N, example=(x, y))
    (parameter,) = objective.parameters()
    assert float(parameter.detach()) == pytest.approx(0.7) and parameter.requires_grad
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        objective(x, y).backward()
        optimizer.step()
    mode = float((x * y).sum() / NOISE**2 / ((x * x).sum() / NOISE**2 + 1 / 4))
    assert float(parameter.detach()) == pytest.approx(mode, abs=1e-6)
    assert list(pyro.get_param_store()) == ["w.value"] and float(pyro.param("w.value").detach()) == 9
    found = objective.posterior().draws(2)["w"]
    assert found.reshape(-1).tolist() == pytest.approx([mode] * 2)
    pyro.clear_param_store()


def test_guides_of_pyro_and_elbos_of_pyro() -> None:
    x, y = data()
    guide = AutoNormal(linear)
    objective = Objective(linear, guide, num_data=N, elbo=Trace_ELBO(num_particles=2), example=(x, y))
    assert {id(p) for p in objective.parameters()} == {id(p) for p in guide.parameters()} and len(
        objective.trained()
    ) == 2
    again = Objective(linear, guide, num_data=N)  # its parameters exist now
    again(x, y).backward()
    assert all(p.grad is not None for p in guide.parameters())


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_the_state_comes_back(way: str) -> None:
    """Proves that parameters of functions and the step are part of the state, and stay tied to the store."""
    x, y = data()
    objective = Objective(linear, point, num_data=N, kl_annealing=10, example=(x, y))
    objective(x, y)
    with torch.no_grad():
        next(objective.parameters()).fill_(0.2)
    if way == "state_dict":
        other = Objective(linear, point, num_data=N, kl_annealing=10, example=(x, y))
        other.load_state_dict(objective.state_dict())
    else:
        other = copy.deepcopy(objective) if way == "deepcopy" else pickle.loads(pickle.dumps(objective))
    assert other.step == 1 and float(other(x, y)) == float(objective(x, y))
    with torch.no_grad():
        next(other.parameters()).fill_(-0.5)
    likelihood, prior = log_terms(-0.5, x, y)
    assert float(other.eval()(x, y)) == pytest.approx(-(likelihood + prior) / N)
    assert float(next(objective.parameters())) == pytest.approx(0.2)


def test_a_state_holds_tensors_only_and_older_states_come_back() -> None:
    """Proves that safetensors can hold a state, and that the dict in which the step once was still sets it."""
    objective = Objective(*network(), kl_annealing=10)
    objective(*classes())
    state = objective.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    state["_extra_state"] = {"step": 7}  # type: ignore[assignment]
    objective.load_state_dict(state)
    assert objective.step == 7 and objective.beta == 0.8


def test_modes_stay_as_they_are() -> None:
    """Proves that the call that finds the parameters moves no statistics and leaves train and eval alone."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), 20)
    objective = Objective(model, pb.models.Rank1Guide(model), example=classes())
    norm = model.core().net[1]  # type: ignore[index]
    assert norm.training and int(norm.num_batches_tracked) == 0
    objective(*classes())
    assert int(norm.num_batches_tracked) == 1
    objective.eval()(*classes())
    assert int(norm.num_batches_tracked) == 1 and not norm.training


class LateModule(nn.Module):
    """Has a parameter of its own, and declares another when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("w", dist.Delta(self.scale * pyro.param("later", torch.ones((), dtype=torch.float64))))


def test_the_example_follows_the_model() -> None:
    """Proves that a posterior of a model that was converted after it had its example predicts, and can be saved."""
    x, y = classes()
    objective = Objective(*network(), example=(x, y)).double()
    objective(x, y).backward()  # single precision is converted, as in fit
    posterior = objective.posterior()
    assert posterior.predict(x, 2, seed=0).probs.dtype == torch.float64
    assert posterior.draw_source.example.dtype == torch.float64  # type: ignore[union-attr]


def test_what_is_refused() -> None:
    x, y = data()
    model, guide = network()
    features, labels = classes()
    for make, kind, said in (
        (
            lambda: Objective(linear, point, num_data=N),
            ValueError,
            r"parameters only after a first call: give a batch, example=",
        ),
        (lambda: Objective(linear, AutoNormal(linear), num_data=N), ValueError, "example="),
        (lambda: Objective(linear, point, example=(x, y)), ValueError, "num_data is missing"),
        (lambda: Objective(model, guide, num_data=21), ValueError, "built with num_data=20"),
        (lambda: Objective(guide, model), TypeError, "the model first"),
        (lambda: Objective(model, guide, elbo="mean"), TypeError, "expected pyro_bnn.inference.MixtureELBO"),
        (lambda: Objective(linear, AutoLaplaceApproximation(linear), num_data=N), TypeError, "no spread"),
        (lambda: Objective(model, guide, kl_annealing=-1.0), ValueError, "kl_annealing=-1.0"),
        (lambda: Objective(model, guide)(features), TypeError, r"not 1 arguments: objective\(\*batch\)"),
        (lambda: Objective(linear, point, num_data=N, example=x), TypeError, r"the tuple \(x, y\), got Tensor"),
        (lambda: Objective(model, guide)(features, labels + 2), ValueError, "label"),
        (lambda: Objective(model, guide)(features / 0, labels), ValueError, "NaN|finite|infinite"),
    ):
        with pytest.raises(kind, match=said):  # type: ignore[arg-type]
            make()  # type: ignore[no-untyped-call]
    module = LateModule()
    objective = Objective(nn_linear(), module, num_data=N)
    with pytest.raises(ValueError, match="'later' is declared only when the programs are called"):
        objective(x, y)


def nn_linear() -> nn.Module:
    class Linear(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> None:
            linear(x, y)

    return Linear()


# ------------------------------------------------------------------------------------------------- two processes


class Half(nn.Module):
    """A network with a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def without_noise(example: tuple[Tensor, Tensor]) -> Objective:
    """A network of point estimates, whose loss has no noise."""
    torch.manual_seed(0)
    model = pb.models.Dense(Half().double(), pb.likelihoods.Categorical(), 20, select=["used.weight", "used.bias"])
    return Objective(model, AutoDelta(model), example=example)


def steps(objective: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        objective(x, y).backward()
        optimizer.step()
    core = objective.module if isinstance(objective, DistributedDataParallel) else objective
    return {name: p.detach().clone() for name, p in core.named_parameters()}


def one_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, y = classes()
    x = x.double()
    objective = without_noise((x, y))
    assert objective.model.core().net.unused.weight.requires_grad
    with torch.no_grad():
        objective(x, y)  # as a loop does that validates before it trains
    parallel: Any = DistributedDataParallel(objective)
    own = slice(10 * rank, 10 * rank + 10)
    found = steps(parallel, [(x[own], y[own])] * 4)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """Proves that DistributedDataParallel around the objective, which finds its idle parameters by itself, takes the
    steps of one process on the whole batch."""
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        for process in ranks:
            _, said = process.communicate(timeout=200)
            assert process.returncode == 0, said
    finally:
        for process in ranks:
            process.kill()
    x, y = classes()
    x = x.double()
    expected = steps(without_noise((x, y)), [(x, y)] * 4)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    assert math.isfinite(float(sum(value.sum() for value in expected.values())))


if __name__ == "__main__":
    one_process(int(sys.argv[2]), sys.argv[1])
