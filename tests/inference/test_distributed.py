"""Two processes, as torchrun starts them, find what one finds."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import together
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

import pyro_bnn as pb
from pyro_bnn.distributed import ALONE, Processes, alone, processes
from pyro_bnn.inference import SGHMC, SVGD, SWAG, AutoParticles, Checkpoint, DeepEnsemble, fit, sample
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Bella, Dense, MeanFieldGuide, ParticleGuide, PointGuide, Rank1, Rank1Guide
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.randomness import derive_seeds

N = 23  # in batches of 8: parts of 4 and 4, and of 4 and 3


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0)).double()
    return x, x[:, :1].sin()


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = [nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.LayerNorm(5), nn.Tanh()]
    return nn.Sequential(*middle, nn.Linear(5, 1)).double()


def values(*programs: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for program in programs for value in [*program.parameters(), *program.buffers()]]


def close(one: list[Tensor], other: list[Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(one, other, strict=True))


OPTIONS: dict[str, Any] = {"batch_size": 8, "seed": 0, "progress": False}


# ------------------------------------------------------------------------------------------------------------ svi


class Recorded(pb.inference.MixtureELBO):
    """Keeps the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[Tensor, Tensor]] = []

    def differentiable_loss(self, model: Any, guide: Any, *batch: Any) -> Any:
        self.batches.append(batch)  # type: ignore[arg-type]
        return super().differentiable_loss(model, guide, *batch)


def by_svi(given: str) -> tuple[list[Tensor], list[float], list[tuple[Tensor, Tensor]]]:
    model = Dense(net(), Gaussian(0.3), N)
    guide = PointGuide(model)
    pair: Any = data()
    if given != "pair":
        sampler = WeightedRandomSampler(torch.ones(N), N) if given == "weighted" else None
        pair = DataLoader(TensorDataset(*pair), batch_size=8, shuffle=sampler is None, sampler=sampler)
    elbo = Recorded()
    losses = fit(model, guide, pair, epochs=3, optim="sgd", lr=0.01, elbo=elbo, **OPTIONS).losses
    return values(guide), losses, elbo.batches


@pytest.mark.parametrize("given", ["pair", "loader", "weighted"])
def test_svi_takes_the_steps_of_one_process(given: str, tmp_path: Path) -> None:
    """Proves it without noise, to 1e-6 after nine steps whose batches divide unevenly: parameters are those of a loop
    by hand over the batches that both processes had together, and losses too; an epoch has every row once."""
    one, other = together(by_svi, tmp_path, given)
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1] == other[1]
    batches = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(one[2], other[2], strict=True)]
    assert [len(x) for x, _ in batches] == [8, 8, 7] * 3
    if given != "weighted":
        seen = torch.cat([x for x, _ in batches[:3]])
        assert torch.equal(seen[seen[:, 0].argsort()], data()[0][data()[0][:, 0].argsort()])
        assert not torch.equal(batches[0][0], batches[3][0])
    model = Dense(net(), Gaussian(0.3), N)
    guide = PointGuide(model)
    objective, losses = pb.inference.Objective(model, guide), []
    optimizer = torch.optim.SGD(objective.trained(), lr=0.01, momentum=0.9, nesterov=True)
    for x, y in batches:
        optimizer.zero_grad()
        loss = objective(x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert close(one[0], values(guide), 1e-6) and one[1] == pytest.approx(losses, rel=1e-6)


def with_noise() -> tuple[list[Tensor], list[float], list[Tensor]]:
    model = Rank1(net(), Gaussian(0.3), N)
    guide = Rank1Guide(model, components=2)
    drawn: list[Tensor] = []

    class Note(pb.inference.MixtureELBO):
        def differentiable_loss(self, *args: Any, **options: Any) -> Any:
            drawn.append(torch.rand(()))
            return super().differentiable_loss(*args, **options)

    found = fit(model, guide, data(), epochs=20, elbo=Note(), lr=0.02, **OPTIONS)
    return values(model, guide), found.losses, drawn


def test_every_process_has_draws_of_its_own_and_the_same_posterior(tmp_path: Path) -> None:
    (one, losses, drawn), (other, others, drawn_there) = together(with_noise, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and losses == others
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn_there, strict=True))
    assert losses[-1] < losses[0]


def test_accumulation_and_clipping_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    options = {"accumulate": 3, "clip_norm": 0.05, "batch_size": 8}
    found = together(by_options, tmp_path, options)
    whole = by_options({"batch_size": N, "clip_norm": 0.05})  # one step of all rows, in any order
    assert close(found[0], whole, 1e-6)


def by_options(options: dict[str, Any]) -> list[Tensor]:
    model = Dense(net(), Gaussian(0.3), N)
    guide = PointGuide(model)
    fit(model, guide, data(), epochs=3, optim="sgd", lr=0.01, **OPTIONS | options)
    return values(guide)


def normalised() -> tuple[list[Tensor], list[Tensor]]:
    model = Dense(net(norm=True), Gaussian(0.3), N)
    guide = PointGuide(model)
    fit(model, guide, data(), epochs=2, lr=0.01, **OPTIONS)
    return values(guide), [b.clone() for b in model.buffers()]


def first_statistics() -> Tensor:
    """The running mean of a normalisation of the inputs themselves, after one step of ten rows in each process."""
    x, y = (part[:20] for part in data())
    torch.manual_seed(3)
    model = Dense(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double(), Gaussian(0.3), 20)
    fit(model, PointGuide(model), (x, y), epochs=1, **OPTIONS | {"batch_size": 20})
    return next(b for b in model.buffers() if b.shape == (3,)).clone()


def test_statistics_of_processes_are_averaged(tmp_path: Path) -> None:
    """Parts of one size have the mean of the whole batch, of which a running mean takes a tenth."""
    one, other = together(first_statistics, tmp_path)
    torch.testing.assert_close(one, data()[0][:20].mean(0) / 10)
    assert torch.equal(one, other)


def test_statistics_of_normalisation_are_the_same_in_all_processes(tmp_path: Path) -> None:
    one, other = together(normalised, tmp_path)
    assert all(
        torch.equal(a, b) for one_part, two in zip(one, other, strict=True) for a, b in zip(one_part, two, strict=True)
    )
    assert any(b.numel() == 5 and not torch.equal(b, torch.zeros_like(b)) for b in one[1])


def sampled(epochs: int) -> list[float]:
    """A loader with a DistributedSampler, whose batches are each process's own."""
    torch.distributed.init_process_group("gloo")
    pair = TensorDataset(*(part[:20] for part in data()))
    loader = DataLoader(pair, batch_size=5, sampler=DistributedSampler(pair, shuffle=True))
    model = Dense(net(), Gaussian(0.3), 20)
    return fit(model, PointGuide(model), loader, epochs=epochs, lr=0.01, seed=0, progress=False).losses


def test_a_distributed_sampler_keeps_its_batches(tmp_path: Path) -> None:
    one, other = together(sampled, tmp_path, 3)
    assert one == other and len(one) == 6


def validated(path: str | None, epochs: int) -> tuple[list[Tensor], list[float]]:
    model = Rank1(net(), Gaussian(0.3), N)
    guide = Rank1Guide(model, components=2)
    seen: list[float] = []
    checkpoint = None if path is None else Checkpoint(path, steps=2)
    options: dict[str, Any] = {"validation": data(), "checkpoint": checkpoint, "lr": 0.05}
    fit(
        model,
        guide,
        data(),
        epochs=epochs,
        callbacks=[lambda s: seen.append(s.validation or math.nan)],
        **OPTIONS | options,
    )
    return values(model, guide), seen


def test_validation_is_divided_and_a_run_resumes(tmp_path: Path) -> None:
    """Proves that both processes see one NLL, and that a run that went on from a file is the run that was whole."""
    whole = together(validated, tmp_path, None, 6)
    together(validated, tmp_path, str(tmp_path / "run.pt"), 3)
    again = together(validated, tmp_path, str(tmp_path / "run.pt"), 6)
    assert whole[0][1] == whole[1][1] and len(whole[0][1]) == 6
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert again[0][1] == whole[0][1][3:]
    with pytest.raises(ValueError, match="other settings|processes"):
        validated(str(tmp_path / "run.pt"), 6)


def diverging() -> str:
    model = Dense(net(), Gaussian(0.3), N)
    try:
        fit(model, PointGuide(model), data(), epochs=3, optim="sgd", lr=1e200, **OPTIONS)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def test_all_processes_stop_at_a_divergence(tmp_path: Path) -> None:
    assert all("the loss became" in said or "became NaN" in said for said in together(diverging, tmp_path))


def too_small() -> str:
    model = Dense(net(), Gaussian(0.3), 21)
    try:
        fit(model, PointGuide(model), tuple(part[:21] for part in data()), epochs=1, batch_size=4, progress=False)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_a_batch_with_fewer_rows_than_processes_is_refused(tmp_path: Path) -> None:
    assert all("a batch has 1 rows, and 2 processes divide it" in said for said in together(too_small, tmp_path))


# ----------------------------------------------------------------------------------------------------------- svgd


def by_svgd(method: str, epochs: int = 20) -> tuple[list[Tensor], list[float]]:
    """As many steps as epochs."""
    if method == "bella":
        model: Any = Bella(net(), Gaussian(0.3), N, rank=1)
        torch.manual_seed(1)
        guide: Any = ParticleGuide(model, 3)
    elif method == "shared":
        model = Rank1(net(), Gaussian(0.3), N)
        guide = MixtureGuide(model, 3, family="point")
    elif method == "particles":
        model = Dense(net(), Gaussian(0.3), N)
        torch.manual_seed(1)
        guide = AutoParticles(model, 3)
    else:
        model = Dense(net(), Gaussian(0.3), N)
        guide = MixtureGuide(model, 3, family="point")
    ways: dict[str, Any] = {"wgd": {"method": "wgd"}, "function": {"method": "wgd", "space": "function"}}
    engine = SVGD(model, guide, lr=0.01, **ways.get(method, {}))
    losses = engine.fit(data(), epochs, **OPTIONS | {"batch_size": N}).losses
    return values(model, guide), losses


@pytest.mark.parametrize("method", ["svgd", "wgd", "function", "bella", "shared", "particles"])
def test_particles_in_two_processes_take_the_steps_of_one(method: str, tmp_path: Path) -> None:
    """Three particles, so that they divide unevenly; batches are whole, so that their order does not matter."""
    one, other = together(by_svgd, tmp_path, method)
    whole = by_svgd(method)
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1] == other[1]
    assert close(one[0], whole[0], 1e-5) and one[1] == pytest.approx(whole[1], rel=1e-5)


# ----------------------------------------------------------------------------------------------- ensembles, chains


def by_ensemble(folder: str | None = None) -> tuple[dict[str, Tensor], list[float], Tensor]:
    engine = DeepEnsemble(net(norm=True), Gaussian(0.3), N, num_networks=3)
    path = None if folder is None else f"{folder}/run.pt"
    posterior = engine.fit(data(), epochs=2, checkpoint=path, **OPTIONS)
    return posterior.draws(3), posterior.losses, posterior.predict(data()[0], 3).outputs


def test_networks_of_an_ensemble_are_those_made_in_turn(tmp_path: Path) -> None:
    one, other = together(by_ensemble, tmp_path, str(tmp_path))
    whole = by_ensemble()
    for found in (one, other):
        assert all(torch.equal(value, whole[0][name]) for name, value in found[0].items())
        assert found[1] == whole[1] and torch.equal(found[2], whole[2])
    assert sorted(file.name for file in tmp_path.glob("run*")) == ["run-0.pt", "run-1.pt", "run-2.pt"]


def chains(first: int, count: int, seed: int | None, path: str | None = None) -> dict[str, Tensor]:
    kernel = SGHMC(Dense(net(), Gaussian(0.3), N), data(), step_size=0.03, friction=0.2, batch_size=8)
    posterior = sample(kernel, 6, 4, count, seed=seed, progress=False, checkpoint=path)
    return posterior.draws(6 * count)


def test_chains_are_those_made_in_turn(tmp_path: Path) -> None:
    one, other = together(chains, tmp_path, 0, 4, 0, str(tmp_path / "chain.pt"))
    seeds = derive_seeds(0, 2)
    parts = [chains(2 * rank, 2, seeds[rank]) for rank in range(2)]
    for name, value in one.items():
        assert torch.equal(value, other[name])
        assert torch.equal(value, torch.cat([part[name] for part in parts]))
    assert (tmp_path / "chain-0.pt").is_file() and (tmp_path / "chain-1.pt").is_file()


def unseeded(path: str, draws: int) -> list[float]:
    kernel = SGHMC(Dense(net(), Gaussian(0.3), N), data(), step_size=0.03, friction=0.2, batch_size=8)
    every = Checkpoint(path, epochs=1)
    posterior = sample(kernel, draws, 4, 2, progress=False, checkpoint=every)
    return [float(value.double().sum()) for value in posterior.draws(2 * draws).values()]


def test_chains_without_a_seed_resume(tmp_path: Path) -> None:
    """Proves that the seed on which processes agree anew at each start is no setting of the run."""
    path = str(tmp_path / "chain.pt")
    assert together(unseeded, tmp_path, path, 5) == together(unseeded, tmp_path, path, 5)


def tuned() -> tuple[dict[str, float], int, list[float]]:
    kernel = SGHMC(Dense(net(), Gaussian(0.3), N), data(), batch_size=N, capture=False)
    posterior = sample(kernel, 10, 25, seed=0, progress=False)
    first = [float(v.flatten()[0]) for v in posterior.draws(40).values()]
    return posterior.sampler, posterior.num_stored or 0, first


class Watched(SGHMC):
    """Notes which of its chains start at the network's own weights."""

    at_network: list[bool]

    def _starting_point(self, chain: int) -> Tensor:
        found = super()._starting_point(chain)
        self.at_network.append(torch.equal(found, self.potential.start()))
        return found


def starts() -> list[bool]:
    kernel = Watched(Dense(net(), Gaussian(0.3), N), data(), batch_size=N, capture=False)
    kernel.at_network = []
    sample(kernel, 2, 25, seed=0, progress=False)
    return kernel.at_network


def test_one_chain_of_all_processes_starts_at_the_network(tmp_path: Path) -> None:
    assert together(starts, tmp_path) == [[True, False], [False, False]]


def test_chains_that_tune_themselves_are_four_by_default(tmp_path: Path) -> None:
    one, other = together(tuned, tmp_path)
    assert one == other and one[1] == 40
    assert {"largest R-hat", "step_size", "acceptance"} <= one[0].keys()


def uneven() -> str:
    try:
        chains(0, 3, 0)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_chains_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    assert together(uneven, tmp_path)[0].startswith("num_chains=3: expected a multiple of 2")


def by_swag() -> dict[str, Tensor]:
    engine = SWAG(net(), Gaussian(0.3), N)
    return engine.fit(data(), epochs=4, num_samples=3, batch_size=8, progress=False).draws(3)


def test_swag_without_a_seed_has_the_same_draws_everywhere(tmp_path: Path) -> None:
    one, other = together(by_swag, tmp_path)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def by_nuts() -> str:
    import pyro
    import pyro.distributions as dist
    from pyro.infer import NUTS

    try:
        sample(NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))), 3, progress=False)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_what_is_not_distributed_says_so(tmp_path: Path) -> None:
    said = together(by_nuts, tmp_path)
    assert all(one.startswith("NUTS is not distributed: each of the 2 processes would do all of it") for one in said)


# ------------------------------------------------------------------------------------------------------ evaluation


def scores(kind: str, divided: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = data()
    if kind == "classes":
        model = Dense(nn.Linear(3, 4).double(), Categorical(), N)
        posterior = pb.Posterior(model, MeanFieldGuide(model))
        labels = x[:, 0].sign().long() + 1
        shift = {"less": lambda x, severity: x / (1 + severity), "more": lambda x, severity: x * severity}
        options: dict[str, Any] = {"ood": torch.randn(9, 3).double(), "shift": shift}
        y = labels
    else:
        model = Dense(net(), Gaussian(0.3), N)
        posterior, options = pb.Posterior(model, MeanFieldGuide(model)), {}
    if divided:
        found = pb.diagnostics.evaluate(posterior, (x, y), seed=0, batch_size=7, **options)
    else:
        with alone():
            found = pb.diagnostics.evaluate(posterior, (x, y), seed=0, batch_size=7, **options)
    if "shift" in found:
        found |= {"by kind": found["shift"].by_kind, "rows": found.pop("shift").rows}
    return found


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_processes_divide_the_rows_of_an_evaluation(kind: str, tmp_path: Path) -> None:
    """Metrics of every kind, out-of-distribution detection and shift, from uneven parts (batches of 7 and 1 rows)."""
    one, other = together(scores, tmp_path, kind, True)
    for name, value in scores(kind, True).items():
        if name == "by kind":
            for key, of in value.items():
                assert {n: pytest.approx(v, rel=1e-9) for n, v in of.items()} == one[name][key] == other[name][key]
        else:
            assert one[name] == other[name] == pytest.approx(value, rel=1e-9), name


def first_alone() -> float:
    return scores("classes", False)["nll"] if processes().is_first else 0.0


def test_one_process_evaluates_alone_where_the_others_do_not(tmp_path: Path) -> None:
    found = together(first_alone, tmp_path)
    assert found == [pytest.approx(scores("classes", False)["nll"], rel=1e-9), 0.0]


# ------------------------------------------------------------------------------------------------------- processes


def test_one_process_is_alone() -> None:
    assert processes() == ALONE and not ALONE.are_several and ALONE.is_first
    assert list(ALONE.mine(3)) == [0, 1, 2] and ALONE.gather("x") == ["x"] and ALONE.total([1.5]) == [1.5]
    assert list(Processes(1, 3).mine(7)) == [1, 4]


def inner() -> tuple[Processes, Processes]:
    outside = processes()
    with alone():
        return outside, processes()


def test_parts_are_done_alone(tmp_path: Path) -> None:
    assert together(inner, tmp_path) == [(Processes(0, 2), ALONE), (Processes(1, 2), ALONE)]


SCRIPT = """
import os, signal, torch
import pyro_bnn as pb
x = torch.randn(64, 3)
y = x[:, :1]
model = pb.models.Dense(torch.nn.Linear(3, 1), pb.likelihoods.Gaussian(0.3), 64)
def after(state):
    if state.epoch == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
guide = pb.models.MeanFieldGuide(model)
pb.inference.fit(model, guide, (x, y), epochs=10**6, batch_size=8, callbacks=[after], progress=False)
"""


def test_a_process_that_is_killed_ends_the_others_with_a_message(tmp_path: Path) -> None:
    """By torchrun itself, within a minute of the kill."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode != 0 and time.monotonic() - start < 110
    assert f"Signal {int(signal.SIGKILL)}" in ended.stderr or "exitcode  : -9" in ended.stderr
