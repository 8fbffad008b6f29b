"""Saving keeps what belongs to the user, survives a kill, and says how classes of one's own come back."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killed
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.priors import Normal, Prior

X = torch.linspace(-1, 1, 5)[:, None]


def net() -> nn.Module:
    return nn.Linear(1, 1)


def posterior(seed: int, likelihood: Likelihood | None = None, prior: Any = None) -> pb.Posterior:
    torch.manual_seed(seed)
    model = pb.models.Dense(net(), likelihood or pb.likelihoods.Gaussian(0.5), 5, prior=prior or Normal())
    return pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=0.1))


def outputs(one: pb.Posterior) -> Tensor:
    return one.predict(X, 3, seed=0).outputs


def same(a: pb.Posterior, b: pb.Posterior) -> bool:
    return torch.equal(outputs(a), outputs(b))


# ------------------------------------------------------------------------------------------------ files of users


def test_saving_again_leaves_what_others_put_into_the_folder(tmp_path: Path) -> None:
    posterior(0).save(tmp_path / "p")
    (tmp_path / "p" / "notes").mkdir()
    (tmp_path / "p" / "notes" / "mine.txt").write_text("mine")
    os.link(tmp_path / "p" / "posterior.json", tmp_path / "p" / "copy.json")
    posterior(1).save(tmp_path / "p")
    assert (tmp_path / "p" / "notes" / "mine.txt").read_text() == "mine"
    names = ["copy.json", "notes", "posterior.json", "tensors.safetensors"]
    assert sorted(child.name for child in (tmp_path / "p").iterdir()) == names
    assert same(pb.load(tmp_path / "p", net()), posterior(1))


def test_a_link_to_a_posterior_stays_a_link(tmp_path: Path) -> None:
    posterior(0).save(tmp_path / "store" / "first")
    (tmp_path / "current").symlink_to(tmp_path / "store" / "first")
    (tmp_path / "next").symlink_to(tmp_path / "store" / "second")
    for link in ("current", "next"):
        posterior(1).save(tmp_path / link)
        assert (tmp_path / link).is_symlink() and same(pb.load(tmp_path / link, net()), posterior(1))
    assert sorted(child.name for child in (tmp_path / "store").iterdir()) == ["first", "second"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_all_files_have_the_permissions_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):
            posterior(0).save(tmp_path / "p")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "p").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_folder_that_may_not_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"could not be written .*file/p'"):
        posterior(0).save(tmp_path / "file" / "p")
    if os.geteuid() == 0:
        return  # root may write everywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="locked/p"):
        posterior(0).save(tmp_path / "locked" / "p")
    assert not [*(tmp_path / "locked").iterdir()]


# ------------------------------------------------------------------------------------------------------- kills


@contextmanager
def dying_at(call: int) -> Iterator[None]:
    """The process is killed before it renames for this time."""
    counts, replace, rename = [0], os.replace, os.rename

    def counted(rename: Any) -> Any:
        def renamed(source: Any, target: Any) -> None:
            counts[0] += 1
            if counts[0] == call:
                killed.kill_self()
            rename(source, target)

        return renamed

    os.replace, os.rename = counted(replace), counted(rename)
    try:
        yield
    finally:
        os.replace, os.rename = replace, rename


def save_and_die(path: Path, call: int) -> int:
    def work() -> None:
        with dying_at(call):
            posterior(1).save(path)

    return killed.wait(killed.start(work))


@pytest.mark.parametrize("version", [2, 3])
def test_a_kill_between_the_files_leaves_one_whole_posterior(version: int, tmp_path: Path) -> None:
    """Proves it for every rename of a save over a posterior, with digests and of before there were any: the posterior
    loads as the old or the new one, and the next save leaves nothing beside it."""
    found = []
    for call in (1, 2, 3):
        folder = tmp_path / str(call)
        posterior(0).save(folder / "p")
        if version == 2:
            content = json.loads((folder / "p" / "posterior.json").read_text()) | {"version": 2}
            del content["digest"], content["tensors"]
            (folder / "p" / "posterior.json").write_text(json.dumps(content))
        ended = save_and_die(folder / "p", call)
        loaded = pb.load(folder / "p", net())
        assert same(loaded, posterior(0)) or same(loaded, posterior(1))
        found.append((ended, same(loaded, posterior(1))))
        posterior(2).save(folder / "p")
        assert same(pb.load(folder / "p", net()), posterior(2))
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
        assert names == ["p", "p/posterior.json", "p/tensors.safetensors"]
    assert found == [(-9, False), (-9, True), (0, True)]


def test_a_kill_of_the_first_save_leaves_no_posterior(tmp_path: Path) -> None:
    assert save_and_die(tmp_path / "p", 1) == -9
    with pytest.raises(FileNotFoundError, match="no posterior at"):
        pb.load(tmp_path / "p", net())
    posterior(0).save(tmp_path / "p")
    assert [child.name for child in tmp_path.iterdir()] == ["p"]


def test_kills_at_random_moments_leave_the_old_or_the_new_posterior(tmp_path: Path) -> None:
    """Proves it for 20 moments of a child that saves two posteriors in turn."""
    path = tmp_path / "p"
    wanted = [posterior(seed) for seed in (0, 1)]
    wanted[0].save(path)

    def work() -> None:
        while True:
            for one in wanted:
                one.save(path)

    for i in range(20):
        assert killed.kill_after(work, 0.01 + 0.003 * i) == -9
        loaded = pb.load(path, net())
        assert any(same(loaded, one) for one in wanted)
    wanted[1].save(path)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "p",
        "p/posterior.json",
        "p/tensors.safetensors",
    ]


@pytest.mark.parametrize("is_there", [False, True])
def test_processes_that_save_to_one_place_at_once_leave_one_whole_posterior(is_there: bool, tmp_path: Path) -> None:
    path = tmp_path / "p"
    if is_there:
        posterior(9).save(path)

    def saving(seed: int) -> Any:
        one = posterior(seed)
        return lambda: [one.save(path) for _ in range(15)]

    children = [killed.start(saving(seed)) for seed in range(3)]
    assert [killed.wait(child) for child in children] == [0, 0, 0]
    loaded = pb.load(path, net())
    assert any(same(loaded, posterior(seed)) for seed in range(3))
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "p",
        "p/posterior.json",
        "p/tensors.safetensors",
    ]


# ------------------------------------------------------------------------------------------ classes of one's own


@dataclass(frozen=True)
class Robust(Likelihood):
    """A likelihood of one's own, with a field of its own."""

    kind = "regression"
    df: float = 4.0
    bounds: tuple[float, ...] = (0.0, 1.0)

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.StudentT(self.df, f, 1.0)


@dataclass(frozen=True)
class Wide(Prior):
    scale: float = 3.0

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros_like(like), self.scale)


class Laplace(Wide):
    """Has the name of a prior of the package, which a file must not mean."""


def test_likelihoods_and_priors_of_ones_own_come_back(tmp_path: Path) -> None:
    priors: list[Any] = [Wide(2.0), {"weight": Laplace(0.5), ".*": Wide()}]
    for prior in priors:
        saved = posterior(0, Robust(temperature=2.0, df=7.0, bounds=(1.0, 2.0)), prior)
        saved.save(tmp_path / "p")
        loaded: Any = pb.load(tmp_path / "p", net())
        assert loaded.model.likelihood == Robust(temperature=2.0, df=7.0, bounds=(1.0, 2.0))
        assert loaded.model.prior == prior and same(loaded, saved)
        assert {name: type(own) for name, own in loaded.model.priors.items()} == {
            name: type(own)
            for name, own in saved.model.priors.items()  # type: ignore[attr-defined]
        }


@pytest.mark.parametrize("what", ["likelihood", "prior"])
def test_a_class_that_is_not_defined_where_a_file_is_loaded_can_be_given(what: str, tmp_path: Path) -> None:
    """Proves that the message names class and remedy, and that the remedy works."""
    saved = posterior(0, Robust(), Wide())
    saved.save(tmp_path / "p")
    file = tmp_path / "p" / "posterior.json"
    content = json.loads(file.read_text()) | {"version": 2}
    del content["digest"], content["tensors"]
    content["model"][what]["class"] = "elsewhere.Missing"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"unknown {what} .*elsewhere.Missing.* load\(path, net, {what}=...\)"):
        pb.load(tmp_path / "p", net())
    given: dict[str, Any] = {what: {"likelihood": Robust(), "prior": Wide()}[what]}
    assert same(pb.load(tmp_path / "p", net(), **given), saved)


def test_what_a_file_could_not_give_back_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    """Proves it for values beside the fields, fields that are no numbers, and priors that are no dataclass."""

    class Set(Robust):
        def __init__(self) -> None:
            super().__init__()
            object.__setattr__(self, "factor", 2.0)

    @dataclass(frozen=True, eq=False)
    class Held(Robust):
        table: Any = None

    class Bare(Prior):
        def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
            return dist.Normal(torch.zeros_like(like), 1.0)

    for likelihood in (Set(), Held(table=torch.ones(2)), Held(table=lambda: 1)):
        with pytest.raises(TypeError, match=r"the likelihood .* cannot be written to JSON.*@dataclass\(frozen=True\)"):
            posterior(0, likelihood).save(tmp_path / "p")
    with pytest.raises(TypeError, match=r"the prior Bare cannot be written .* save\(path, prior=False\)"):
        posterior(0, prior=Bare()).save(tmp_path / "p")
    assert not [*tmp_path.iterdir()]


def test_a_model_and_a_guide_of_ones_own_are_registered_by_a_decorator(tmp_path: Path) -> None:
    class OwnModel(pb.models.Dense):
        pass

    class OwnGuide(pb.models.MeanFieldGuide):
        pass

    model = OwnModel(net(), pb.likelihoods.Gaussian(0.5), 5)
    saved = pb.Posterior(model, OwnGuide(model))
    with pytest.raises(TypeError, match="decorate your own class with pyro_bnn.storable"):
        saved.save(tmp_path / "p")
    pb.storable(OwnModel)
    with pytest.raises(TypeError, match="decorate your own class with pyro_bnn.storable"):
        saved.save(tmp_path / "p")
    pb.storable(OwnGuide)
    saved.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net())
    assert type(loaded.model) is OwnModel and type(loaded.guide) is OwnGuide and same(loaded, saved)


def test_intervals_of_a_distribution_without_a_distribution_function_say_what_to_define(tmp_path: Path) -> None:
    prediction = posterior(0, Robust()).predict(X, 50, seed=0)
    with pytest.raises(
        TypeError, match=r"StudentT, the distribution of Robust, has no cdf\(y\).*prediction.sample\(\)"
    ):
        prediction.interval()
    draws = prediction.sample(seed=0).flatten(0, 1)
    assert bool((draws.quantile(0.975, 0) > draws.quantile(0.025, 0)).all())
    shutil.rmtree(tmp_path)


def test_a_process_that_has_imported_no_model_loads(tmp_path: Path) -> None:
    """Proves that files find the package's own classes wherever loading is the first thing that a process does."""
    model = pb.models.Rank1(nn.Linear(2, 1), pb.likelihoods.Gaussian(0.5), 4)
    pb.Posterior(model, pb.models.Rank1Guide(model)).save(tmp_path / "posterior")
    code = (
        "import sys; from torch import nn; from pyro_bnn.posterior import load; "
        "print('pyro_bnn.models' in sys.modules, type(load(sys.argv[1], nn.Linear(2, 1)).model).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "posterior")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["False", "Rank1"]
