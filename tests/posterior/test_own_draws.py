"""Draws of Pyro models of one's own on disk: the same numbers again, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyro_bnn as pb

X = torch.linspace(-1, 1, 8)
Y = 2 * X


def line(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(slope * x, 0.3), obs=y)


def grouped(x: Tensor, y: Tensor | None = None) -> None:
    """With a parameter that is trained as a point, and positive."""
    scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("groups", 2, dim=-2):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("obs", dist.Normal(slope * x, scale), obs=y)


class Module(PyroModule):
    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(start))
        self.slope = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = self.slope * x + self.offset
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.3), obs=y)


def same(one: pb.Posterior, other: pb.Posterior) -> None:
    left, right = one.draws(one.num_stored or 1), other.draws(one.num_stored or 1)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert (one.num_chains, one.is_sampled, one.sampler) == (other.num_chains, other.is_sampled, other.sampler)
    assert one.losses == other.losses
    predicted = [p.predict(X, 5, seed=0, return_site="obs").outputs for p in (one, other)]
    assert torch.equal(*predicted)


def test_draws_of_nuts_are_the_same_again(tmp_path: Path) -> None:
    """Chains and what the sampler says of its run too."""
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(line), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run(X, Y)
    posterior = pb.Posterior.from_mcmc(mcmc, line)
    assert posterior.sampler
    posterior.save(tmp_path / "p")
    same(posterior, pb.load(tmp_path / "p", model=line))


def test_chains_losses_and_dtypes_of_draws_are_kept(tmp_path: Path) -> None:
    """Also of sites with axes, and of whole numbers."""
    draws = {"slope": torch.randn(6, 2, 1), "more": torch.arange(6)}
    posterior = pb.Posterior.from_draws(line, draws, 3, is_sampled=False, losses=[1.5], sampler={"temperature": 2.0})
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", model=line)
    assert (loaded.num_chains, loaded.is_sampled, loaded.sampler) == (3, False, {"temperature": 2.0})
    assert loaded.losses == [1.5]
    assert all(torch.equal(value, posterior.draws(6)[name]) for name, value in loaded.draws(6).items())


def test_draws_of_a_guide_come_with_the_parameters_that_were_trained(tmp_path: Path) -> None:
    """Those of Pyro's store, which a function has, whatever constraint they had."""
    guide = AutoNormal(grouped)
    with pyro.get_param_store().scope() as store:
        guide(X, torch.stack([Y, -Y]))
        pyro.get_param_store().setdefault("scale", torch.tensor(0.07), dist.constraints.positive)
        pyro.get_param_store()["scale"] = torch.tensor(0.07)
    posterior = pb.Posterior(grouped, guide, example=X, store=store, losses=[3.0])
    with pytest.raises(TypeError, match="as_draws"):
        posterior.save(tmp_path / "p")
    stored = posterior.as_draws(10, seed=0)
    stored.save(tmp_path / "p")
    same(stored, pb.load(tmp_path / "p", model=grouped))


def test_a_module_is_copied_and_gets_its_parameters_back(tmp_path: Path) -> None:
    """The given one stays as it is; another model is refused."""
    posterior = pb.Posterior.from_draws(Module(3.0), {"slope": torch.randn(10)})
    posterior.save(tmp_path / "p")
    given = Module()
    same(posterior, pb.load(tmp_path / "p", model=given))
    assert given.offset.item() == 0
    with pytest.raises(ValueError, match="is for another model"):
        pb.load(tmp_path / "p", model=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a module with the parameters offset"):
        pb.load(tmp_path / "p", model=line)


def test_networks_and_models_are_told_apart(tmp_path: Path) -> None:
    """Each refusal says what to give."""
    net = nn.Linear(1, 1)
    dense = pb.models.Dense(net, pb.likelihoods.Gaussian(0.1), num_data=8)
    pb.Posterior(dense, pb.models.MeanFieldGuide(dense)).save(tmp_path / "net")
    pb.Posterior.from_draws(line, {"slope": torch.randn(4)}).save(tmp_path / "own")
    with pytest.raises(ValueError, match=r"own.*load\(path, model=...\)"):
        pb.load(tmp_path / "own", net)
    with pytest.raises(ValueError, match=r"own.*model=..."):
        pb.load(tmp_path / "own")
    with pytest.raises(ValueError, match=r"net holds the posterior of a network"):
        pb.load(tmp_path / "net", model=line)
    with pytest.raises(TypeError, match=r"load\(path, net\)"):
        pb.load(tmp_path / "net", model=dense)
    with pytest.raises(TypeError, match="give model= alone"):
        pb.load(tmp_path / "own", net, model=line)
    with pytest.raises(FileNotFoundError, match="nothing"):
        pb.load(tmp_path / "nothing", model=line)


def test_damage_is_found_by_the_digests(tmp_path: Path) -> None:
    """A flipped bit in each of 100 places of the numbers, a cut file, and edits of the description."""
    pb.Posterior.from_draws(line, {"slope": torch.randn(40)}, 2).save(tmp_path / "p")
    tensors, description = tmp_path / "p" / "tensors.safetensors", tmp_path / "p" / "posterior.json"
    whole, said = tensors.read_bytes(), description.read_text()
    for place in torch.randint(len(whole), (100,), generator=torch.Generator().manual_seed(0)).tolist():
        tensors.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            loaded = pb.load(tmp_path / "p", model=line)
        except (ValueError, OSError) as error:
            assert str(tmp_path / "p") in str(error)
        else:  # the copy of the description, which is read only after a save that was killed
            tensors.write_bytes(whole)
            same(loaded, pb.load(tmp_path / "p", model=line))
    tensors.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated or damaged"):
        pb.load(tmp_path / "p", model=line)
    tensors.write_bytes(whole)
    for key in json.loads(said):
        content = json.loads(said)
        content[key] = None
        description.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"posterior\.json"):
            pb.load(tmp_path / "p", model=line)
