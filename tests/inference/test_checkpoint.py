"""A checkpoint knows what it was made with, is found damaged, and survives a kill at any moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import numpy as np
import pandas as pd
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.inference import cosine, multistep
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.priors import Laplace, Normal

N = 12
#: moments at which a run is killed, in the default tests and in the slow ones
QUICK, LONG = 2, 10


def data(shift: float = 0.0) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0)) + shift
    return x, x[:, :1]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 1))


def fit(path: Path, model: Any = None, guide: Any = None, given: Any = None, **options: Any) -> pb.Posterior:
    model = pb.models.Dense(net(), Gaussian(0.5), N) if model is None else model
    guide = pb.models.MeanFieldGuide(model) if guide is None else guide(model)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 0.01, "seed": 0, "progress": False} | options
    return pb.inference.fit(model, guide, data() if given is None else given, checkpoint=path, **settings)


def dense(**options: Any) -> pb.models.Dense:
    given: dict[str, Any] = {"likelihood": Gaussian(0.5), "num_data": N} | options
    return pb.models.Dense(net(), **given)


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0.5}, "lr was 0.01 and is 0.5"),
    ({"optim": "sgd"}, "optim was 'AdamW' and is 'SGD'"),
    ({"weight_decay": 0.1, "decay": "all"}, "weight_decay was"),
    ({"schedule": cosine()}, r"schedule was None and is cosine.build\(warmup=0.0\)"),
    ({"schedule": lambda optimizer, steps, epochs: LambdaLR(optimizer, float)}, "schedule was None and is .*<lambda>"),
    ({"seed": 1}, "seed was 0 and is 1"),
    ({"seed": None}, "seed was 0 and is None"),
    ({"batch_size": 6}, "batch_size was 4 and is 6"),
    ({"kl_annealing": 3.0}, r"kl_annealing was 0.0 and is 3.0"),
    ({"clip_norm": 1.0}, "clip_norm was None and is 1.0"),
    ({"elbo": Trace_ELBO(num_particles=2)}, r"elbo was MixtureELBO\(.*\) and is Trace_ELBO\(.*num_particles=2"),
    ({"given": data(1e-6)}, "data was .* and is .*"),
    ({"given": TensorDataset(*data())}, "data was .* and is .*TensorDataset"),
    ({"model": dense(likelihood=Gaussian(0.4))}, r"likelihood was Gaussian\(.*scale=0.5.* and is .*scale=0.4"),
    ({"model": dense(prior=Laplace(0.0, 1.0))}, r"prior was Normal\(.*\) and is Laplace"),
    ({"model": dense(prior={".*": Normal(0.0, 2.0)})}, r"prior was Normal.* and is \{'\.\*': Normal"),
    ({"model": dense(select=["3"])}, "another model or guide"),
    ({"model": pb.models.Rank1(net(), Gaussian(0.5), N), "guide": pb.models.Rank1Guide}, "another model or guide"),
    ({"guide": lambda model: pb.models.MeanFieldGuide(model, components=2)}, "another model or guide"),
    ({"guide": AutoNormal}, "another model or guide"),
    ({"epochs": 1}, "has 2 epochs, and epochs=1 is fewer"),
]


@pytest.mark.parametrize(("other", "message"), OTHERS, ids=[message[:20] for _, message in OTHERS])
def test_a_run_with_other_settings_is_refused_by_name(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Proves that the message says what differs with both values and what to do, that nothing has moved, and that the
    same settings resume."""
    fit(tmp_path / "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    model = dense() if "model" not in other else other["model"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"run.pt.*({message}).*remove it to start afresh"):
        fit(tmp_path / "run.pt", **({"epochs": 3} | other | {"model": model}))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (tmp_path / "run.pt").read_bytes() == before
    assert len(fit(tmp_path / "run.pt", epochs=3).losses) == 9


def test_what_does_not_change_the_run_resumes() -> None:
    """Proves that arrays, frames and tensors with the same numbers are the same data, and a schedule made anew is the
    same schedule."""
    settings = pb.inference.settings.settings_of
    model, (x, y) = dense(), data()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def of(given: Any, **engine: Any) -> dict[str, str]:
        return settings(model, model, optimizer, given, **engine)

    forms: list[Any] = [(x.numpy(), y.numpy()), (pd.DataFrame(x.numpy()), y), (x.tolist(), y.double())]
    assert all(of(form) == of((x, y)) for form in forms)
    assert of((x, y)) != of((x[torch.arange(N).flip(0)], y)) and of((x, y)) != of((x, -y))
    assert of((x, y), schedule=multistep(1, (2, 3), 0.1)) == of((x, y), schedule=multistep(1, (2, 3), 0.1))
    assert of((x, y), schedule=multistep(1, (2, 3), 0.1)) != of((x, y), schedule=multistep(1, (2, 4), 0.1))
    loaders = [DataLoader(TensorDataset(x, y), batch_size=size) for size in (4, 4, 6)]
    assert of(loaders[0]) == of(loaders[1]) != of(loaders[2])
    assert of(DataLoader(TensorDataset(x, y + 1), batch_size=4)) != of(loaders[0])
    assert of(np.zeros) != of(loaders[0])


def test_frozen_weights_are_part_of_the_model(tmp_path: Path) -> None:
    """Proves that low-rank particles do not resume on another base network, and that drawn weights may differ."""

    def run(seed: int, path: Path) -> pb.Posterior:
        torch.manual_seed(seed)
        model = pb.models.Bella(nn.Linear(2, 1), Gaussian(0.5), N, rank=1)
        engine = pb.inference.SVGD(model, pb.models.ParticleGuide(model, 2), lr=0.01)
        return engine.fit(data(), 2 + seed, seed=0, progress=False, checkpoint=path)

    run(0, tmp_path / "bella.pt")
    with pytest.raises(ValueError, match="frozen weights was"):
        run(1, tmp_path / "bella.pt")
    for seed in (0, 1):
        torch.manual_seed(seed)
        fit(tmp_path / "dense.pt", epochs=2 + seed)


def svgd(path: Path, epochs: int = 2, **options: Any) -> pb.Posterior:
    of_engine = {name: options.pop(name) for name in ("kernel", "repulsion", "method", "lr") if name in options}
    model = dense()
    engine = pb.inference.SVGD(model, pb.inference.AutoParticles(model, 2), **({"lr": 0.01} | of_engine))
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0, "progress": False} | options
    return engine.fit(data(), epochs, checkpoint=path, **settings)


PARTICLES: list[tuple[dict[str, Any], str]] = [
    ({"kernel": pb.inference.RBF(2.0)}, "kernel was .* and is RBF"),
    ({"repulsion": 0.5}, "repulsion was 1.0 and is 0.5"),
    ({"method": "ensemble"}, "method was 'svgd' and is 'ensemble'"),
    ({"lr": 0.1}, "lr was 0.01 and is 0.1"),
    ({"seed": 3}, "seed was 0 and is 3"),
    ({"epochs": 1}, "has 2 epochs, and epochs=1 is fewer"),
]


@pytest.mark.parametrize(("other", "message"), PARTICLES, ids=[message[:12] for _, message in PARTICLES])
def test_particles_with_other_settings_are_refused_by_name(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    svgd(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=message):
        svgd(tmp_path / "run.pt", **({"epochs": 3} | other))
    with pytest.raises(ValueError, match="another model or guide"):
        fit(tmp_path / "run.pt")
    assert len(svgd(tmp_path / "run.pt", epochs=3).losses) == 9


# -------------------------------------------------------------------------------------------------------- damage


def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    """Proves it for 150 flipped bits and 50 truncations; the whole file still resumes."""
    path, rng = tmp_path / "run.pt", random.Random(0)
    fit(path, epochs=1)
    whole = path.read_bytes()
    for i in range(200):
        changed = bytearray(whole if i % 4 else whole[: rng.randrange(len(whole))])
        if i % 4:
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="run.pt"):
            fit(path)
    path.write_bytes(whole)
    assert len(fit(path).losses) == 6


# --------------------------------------------------------------------------------------------------------- kills


def ensemble(path: Path, epochs: int = 2) -> pb.Posterior:
    engine = pb.inference.DeepEnsemble(net(), Gaussian(0.5), N, num_networks=2)
    return engine.fit(data(), epochs=epochs, batch_size=4, seed=0, progress=False, checkpoint=path)


def codebook(path: Path, epochs: int = 2) -> pb.Posterior:
    torch.manual_seed(0)
    model = pb.models.WeightSharing(nn.Linear(2, 1), Gaussian(0.5), N)
    guide = pb.models.CodebookGuide(model, codes=2)
    return pb.inference.fit(model, guide, data(), epochs=epochs, batch_size=4, seed=0, progress=False, checkpoint=path)


def rank1(path: Path, epochs: int = 2) -> pb.Posterior:
    model = pb.models.Rank1(net(), Gaussian(0.5), N)
    return fit(path, model, pb.models.Rank1Guide, epochs=epochs, schedule=cosine())


def dropout(path: Path, epochs: int = 2) -> pb.Posterior:
    torch.manual_seed(0)
    engine = pb.inference.MCDropout(nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1)), Gaussian(0.5), N)
    return engine.fit(data(), epochs=epochs, batch_size=4, seed=0, progress=False, checkpoint=path)


ENGINES: dict[str, Callable[..., pb.Posterior]] = {
    "mean field": fit,
    "rank-1": rank1,
    "codebook": codebook,
    "particles": svgd,
    "ensemble": ensemble,
    "dropout": dropout,
}


def kill_and_resume(engine: Callable[..., pb.Posterior], folder: Path, kills: int) -> None:
    """A run that is killed so many times, at seeded moments, ends where one that is not does, to the last bit."""
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    engine(folder / "warm.pt", epochs=1)  # a first run takes longer
    torch.manual_seed(5)
    start = time.perf_counter()
    whole = engine(folder / "whole" / "run.pt", epochs=kills + 2)
    seconds = time.perf_counter() - start
    rng, ended = random.Random(kills), 0
    for i in range(kills):
        torch.manual_seed(5)
        moment = 0.5 * seconds * (i + rng.random()) / kills
        ended += killed.kill_after(lambda: engine(folder / "killed" / "run.pt", epochs=kills + 2), moment)
    torch.manual_seed(5)
    resumed = engine(folder / "killed" / "run.pt", epochs=kills + 2)
    assert ended, "no run was killed before it ended"
    assert resumed.losses == whole.losses
    x, _ = data()
    assert torch.equal(resumed.predict(x, 2, seed=0).outputs, whole.predict(x, 2, seed=0).outputs)
    names = [sorted(child.name for child in (folder / which).iterdir()) for which in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_is_killed_resumes_to_the_same_end(name: str, tmp_path: Path) -> None:
    kill_and_resume(ENGINES[name], tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_a_run_that_is_killed_many_times_resumes_to_the_same_end(name: str, tmp_path: Path) -> None:
    kill_and_resume(ENGINES[name], tmp_path, LONG)
