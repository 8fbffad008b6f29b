"""A chain that is killed or asked to stop resumes from its checkpoint to the same draws, to the last bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGHMCEM, SGLD, Checkpoint, KeFanSGHMC, sample
from pyro_bnn.inference.checkpoint import read
from pyro_bnn.inference.sgmcmc.kernel_state import state_of
from pyro_bnn.inference.sgmcmc.pruning import MagnitudeRule
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense, SpikeSlab
from pyro_bnn.priors import SpikeAndSlab

N = 24


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts pytest in the background has Ctrl-C ignored in it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    return x, x[:, :1]


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))


def dense(norm: bool = False) -> Dense:
    return Dense(net(norm), Gaussian(0.5), N)


def spike_slab(**options: Any) -> SpikeSlab:
    return SpikeSlab(net(), Gaussian(0.5), N, prior=SpikeAndSlab(0.05, 0.7, **options))


STEPS: dict[str, Any] = {"step_size": 0.05, "friction": 0.2, "batch_size": 10, "thinning": 2, "capture": False}


def plain() -> SGHMC:
    return SGHMC(dense(), data(), **STEPS)


def adaptive() -> SGHMC:
    return SGHMC(dense(), data(), preconditioner="adaptive", **STEPS)


def rmsprop() -> SGHMC:
    return SGHMC(dense(), data(), preconditioner="rmsprop", schedule="cyclical", **STEPS)


def langevin() -> SGLD:
    loader = DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)
    return SGLD(dense(), loader, step_size=0.03, thinning=2)


def normalised() -> SGHMC:
    return SGHMC(dense(norm=True), data(), **STEPS)


def large() -> SGHMC:
    """So many numbers that noise has generators of its own."""
    torch.manual_seed(1)
    return SGHMC(Dense(nn.Linear(1050, 1000), Gaussian(0.5), N), (torch.randn(N, 1050), torch.randn(N, 1000)), **STEPS)


def tuned() -> SGHMC:
    return SGHMC(dense(), data(), batch_size=12, capture=False)


def exact() -> SGHMC:
    return SGHMC(dense(), data(), batch_size=N, capture=False)


def em() -> SGHMCEM:
    share = dist.Beta(2.0, 2.0)
    model = spike_slab(inclusion=share, variance_prior=dist.InverseGamma(3.0, 3.0))
    return SGHMCEM(model, data(), prune=MagnitudeRule(0.5), prune_every=5, **STEPS)


def swapping() -> SGHMCEM:
    model = spike_slab(inclusion=dist.Beta(1.0, 3.0), group="input")
    return SGHMCEM(model, data(), swap_every=4, **STEPS)


def regrowing() -> SGHMCEM:
    cycles: dict[str, Any] = {"schedule": "cyclical", "draws_per_cycle": 3, "exploration": 4, "prune_start": 0}
    return SGHMCEM(spike_slab(), data(), prune=MagnitudeRule(0.5, regrow=1.0), prune_every=5, **cycles, **STEPS)


def ke_fan() -> KeFanSGHMC:
    return KeFanSGHMC(spike_slab(), data(), prune="ke_fan", em_start=6, **STEPS)


QUICK = [plain, normalised, tuned, em]
KERNELS: list[Any] = [
    pytest.param(make, marks=() if make in QUICK else pytest.mark.slow)
    for make in (plain, adaptive, rmsprop, langevin, normalised, tuned, exact, em, swapping, regrowing, ke_fan)
]


def run(kernel: SGHMC, path: Path | None, chains: int = 1, kill_at: int = 0, **options: Any) -> pb.Posterior:
    """20 draws; the process ends at the step ``kill_at`` of this call."""
    warmup, draws = (25, 4) if kernel.is_tuned else (12, 20)
    checkpoint = None if path is None else Checkpoint(path, epochs=3)
    if kill_at:
        advance, left = kernel.advance, [kill_at]

        def counted(position: int, *batch: object) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), options.get("number", signal.SIGKILL))
            advance(position, *batch)

        kernel.advance = counted  # type: ignore[method-assign]
    return sample(
        kernel, draws, warmup, chains, checkpoint=options.get("checkpoint", checkpoint), seed=0, progress=False
    )


def require_same(one: pb.Posterior, other: pb.Posterior) -> None:
    draws = [posterior.draws(posterior.num_stored or 1) for posterior in (one, other)]
    assert draws[0].keys() == draws[1].keys()
    assert all(torch.equal(value, draws[1][name]) for name, value in draws[0].items())
    assert one.sampler == other.sampler
    if isinstance(one.model.core().net, nn.Sequential):  # type: ignore[attr-defined]
        x, _ = data()
        assert torch.equal(one.predict(x, 4).outputs, other.predict(x, 4).outputs)


def kill_and_resume(make: Callable[[], SGHMC], chains: int, folder: Path, kills: int) -> None:
    whole = run(make(), None, chains)
    probe = make()
    run(probe, None, chains)
    rng, path, ended = random.Random(chains), folder / "chain.pt", 0
    for _ in range(kills):
        step = rng.randint(1, max(2, probe.steps // 4))
        ended += killed.wait(killed.start(lambda at=step: run(make(), path, chains, kill_at=at))) == -signal.SIGKILL  # type: ignore[misc]
    assert ended
    require_same(run(make(), path, chains), whole)
    require_same(run(make(), path, chains), whole)  # once more: nothing is left to do


@pytest.mark.parametrize("make", KERNELS)
def test_a_chain_that_is_killed_resumes_to_the_same_draws(make: Callable[[], SGHMC], tmp_path: Path) -> None:
    """SIGKILL at seeded steps of warm-up and after, ten for the kernels of most use; proves draws, statistics and
    temperatures, and that of a run that had ended nothing is made again."""
    kill_and_resume(make, 1, tmp_path, 10 if make in (plain, em) else 2)


@pytest.mark.parametrize(
    "make",
    [
        swapping,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (plain, adaptive, tuned, exact, em, regrowing)),
    ],
)
def test_vectorised_chains_resume_to_the_same_draws(make: Callable[[], SGHMC], tmp_path: Path) -> None:
    kill_and_resume(make, 3, tmp_path, 2)


@pytest.mark.slow
def test_noise_with_generators_of_its_own_resumes(tmp_path: Path) -> None:
    kill_and_resume(large, 1, tmp_path, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_chain_that_is_asked_to_stop_saves_first(number: int, tmp_path: Path) -> None:
    path = tmp_path / "chain.pt"
    never = Checkpoint(path, epochs=10_000)

    def work() -> None:
        try:
            run(plain(), None, kill_at=31, number=number, checkpoint=never)
        except KeyboardInterrupt as stopped:
            assert number == signal.SIGINT and "the same call resumes from it" in str(stopped)
            os._exit(5)

    ended = killed.wait(killed.start(work))
    assert ended == (5 if number == signal.SIGINT else 1)
    state = read(path)
    assert state is not None and state["draw"] == 4 and state["step"] == 32
    require_same(run(plain(), None, checkpoint=never), run(plain(), None))


def test_a_chain_of_ones_own_model_resumes(tmp_path: Path) -> None:
    """Of latents with constraints, and no network."""

    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))

    def go(path: Path | None, draws: int = 60) -> dict[str, Tensor]:
        kernel = SGHMC(model, step_size=0.2, friction=0.3, num_data=1)
        return sample(kernel, draws, 10, 2, checkpoint=path, seed=0, progress=False).draws(2 * draws)

    whole = go(None)
    child = killed.start(lambda: go(tmp_path / "chain.pt"))
    assert killed.wait(child) == 0
    again = go(tmp_path / "chain.pt")
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "chain.pt"
    run(plain(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"chain.pt.*other settings: .*friction was 0.2 and is 0.3"):
        run(SGHMC(dense(), data(), **STEPS | {"friction": 0.3}), path)
    with pytest.raises(ValueError, match="num_samples was 20 and is 30"):
        sample(plain(), 30, 12, 1, checkpoint=path, seed=0, progress=False)
    with pytest.raises(ValueError, match="data was"):
        run(SGHMC(dense(), (data()[0] + 1, data()[1]), **STEPS), path)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="is no checkpoint of a chain"):
        pb.inference.fit(dense(), pb.models.MeanFieldGuide(dense()), data(), epochs=1, checkpoint=tmp_path / "fit.pt")
        run(plain(), tmp_path / "fit.pt")


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "chain.pt"
    run(plain(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-50] + b"x" + whole[-49:])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        run(plain(), path)
    path.write_bytes(whole)
    folder = tmp_path / "chain.pt.draws"
    (folder / "draws.json").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has lost the draws of the checkpoint"):
        run(plain(), path)


def test_draws_of_an_earlier_run_are_not_overwritten(tmp_path: Path) -> None:
    run(plain(), tmp_path / "chain.pt")
    (tmp_path / "chain.pt").unlink()
    with pytest.raises(ValueError, match="exists: stream= takes a folder without draws of an earlier run"):
        run(plain(), tmp_path / "chain.pt")


def test_what_is_not_known_to_change_or_to_stay_is_an_error() -> None:
    """So that a new attribute of a kernel cannot be forgotten."""
    kernel = plain()
    kernel.setup(2)
    state_of(kernel)
    kernel.something = object()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cannot hold 'something', which is a object"):
        state_of(kernel)


def test_nuts_says_that_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint= needs an SGHMC kernel: NUTS runs in pyro.infer.MCMC"):
        sample(NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))), 5, checkpoint=tmp_path / "c.pt", progress=False)
