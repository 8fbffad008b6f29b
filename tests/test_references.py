"""What the benchmarks compare with is right: Hamiltonian Monte Carlo, BatchEnsemble, distances of predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference.potential import Potential
from pyro_bnn.models import Dense
from tests.benchmarks import datasets, hmc, measure, reference, sequences
from tests.benchmarks.images import methods, rows, tasks
from tests.benchmarks.images.batch_ensemble import BatchEnsemble, signs
from tests.benchmarks.tables import images as section
from tests.benchmarks.tables.figures import by_method, with_best

N, D, UNITS = 12, 3, 4


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_energy_of_the_reference_is_that_of_the_model(outputs: int) -> None:
    """Up to a constant, for the same prior, whose code it does not share; and so are its gradients."""
    torch.manual_seed(0)
    x = torch.randn(N, D).double()
    y = torch.randn(N, 1).double() if outputs == 1 else torch.randint(outputs, (N,))
    net = nn.Sequential(nn.Linear(D, UNITS), nn.ReLU(), nn.Linear(UNITS, outputs)).double()
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    deviations = (0.7, 1.0, 0.5, 2.0)
    prior = {name: pb.priors.Normal(0.0, s) for name, s in zip(names, deviations, strict=True)}
    likelihood = pb.likelihoods.Gaussian() if outputs == 1 else pb.likelihoods.Categorical()
    potential = Potential(Dense(net, likelihood, N, prior=prior), x, y)
    ours = hmc.Posterior(x, y, UNITS, outputs, deviations)
    states = [torch.randn(2, *shape).double() for shape in ours.shapes]
    log_noise = torch.randn(2, 1).double()
    z = torch.cat([*(state.flatten(1) for state in states), *([log_noise] if outputs == 1 else [])], 1)
    true = []
    for i in range(2):
        values = {name: s * state[i] for name, s, state in zip(names, deviations, states, strict=True)}
        if outputs == 1:
            values["noise"] = log_noise[i, 0]
        true.append(potential(values, x, y))
    energies = ours.energy(z)
    assert float(energies[0] - energies[1]) == pytest.approx(float(true[0] - true[1]), rel=1e-9)
    numeric = (ours.energy(z + 1e-6) - ours.energy(z - 1e-6)) / 2e-6
    torch.testing.assert_close(ours.gradient(z)[0].sum(1), numeric, rtol=1e-5, atol=1e-5)


def test_trajectories_are_reversible_and_keep_the_energy() -> None:
    def gradient(z: Tensor) -> tuple[Tensor, Tensor]:
        return z**3, z.pow(4).sum(1) / 4

    z, p = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[0.5, 0.2]]).double()
    there, momentum, grad, energy = hmc.leapfrog(gradient, z, p, gradient(z)[0], 0.01, 50)
    before = gradient(z)[1] + p.square().sum() / 2
    assert float(energy + momentum.square().sum() / 2 - before) == pytest.approx(0.0, abs=1e-4)
    back, momentum, *_ = hmc.leapfrog(gradient, there, -momentum, grad, 0.01, 50)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(momentum, -p)


class Standard:
    """Independent standard normals in the place of a posterior, whose output is its first coordinate."""

    dim, is_regression = 5, True

    def forward(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return z[:, None, :1], z[:, -1].exp()

    def energy(self, z: Tensor) -> Tensor:
        return z.square().sum(1) / 2

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, self.energy(z)


def test_chains_have_the_moments_of_their_target() -> None:
    """400 draws of 8 chains, whose mean and variance are within four standard errors of 0 and 1, if draws are apart."""
    posterior: Any = Standard()
    found = hmc.draw(posterior, torch.zeros(1, 1), chains=8, warmup=100, draws=400, seed=1)
    values = found.outputs.flatten()
    assert 0.6 < found.acceptance <= 1.0
    assert abs(float(values.mean())) < 4 / math.sqrt(len(values))
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / len(values))
    assert found.noise.shape == (8, 400)


@pytest.mark.parametrize("channels", [1, 2])
def test_members_of_a_batch_ensemble_are_the_networks_of_their_explicit_weights(channels: int) -> None:
    """Layers without a bias among them, and norms, which the members share; of a grey image and of one in colour."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 4, 3, bias=False)
    net = nn.Sequential(conv, nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).double()
    ensemble = BatchEnsemble(net, 3, signs).double()
    for value in (ensemble.net[4].bias, *ensemble.net[1].parameters()):  # type: ignore[index]
        nn.init.normal_(value)
    x = torch.randn(5, channels, 4, 4).double()
    weights = ensemble.explicit()
    assert {name: value.shape[1:] for name, value in weights.items()} == {n: p.shape for n, p in net.named_parameters()}
    for member, logits in enumerate(ensemble(x)):
        own = {name: value[member].double() for name, value in weights.items()}
        torch.testing.assert_close(torch.func.functional_call(net, own, (x,)), logits)
    assert set(ensemble.net[0].r.flatten().tolist()) == {-1.0, 1.0}  # type: ignore[index]
    shared, factors, biases = channels * 4 * 9 + 16 * 5 + 4 + 4, 3 * (channels + 4 + 16 + 5), 3 * 5
    assert ensemble.numbers() == shared + factors + biases


def test_distance_of_two_normals_is_the_closed_form() -> None:
    """TV of N(0, 1) and N(m, 1) is 2 Phi(m / 2) - 1; and a variance ratio of 4 is found."""
    likelihood = pb.likelihoods.Gaussian()
    noise = torch.ones(1, 1)
    zero, moved = (pb.Prediction(torch.full((1, 1, 2, 1), m), likelihood, noise) for m in (0.0, 1.5))
    expected = math.erf(1.5 / 2 / math.sqrt(2))
    assert reference.distance(zero, moved) == pytest.approx(expected, abs=1e-4)
    draws = torch.randn(50, 1, 2, 1, generator=torch.Generator().manual_seed(0))
    wide, narrow = (pb.Prediction(s * draws, likelihood, torch.ones(50, 1)) for s in (2.0, 1.0))
    of: Any = type("Of", (), {"likelihood": "gaussian"})
    found = reference.compared(wide, narrow, of)
    assert found["variance_ratio"] == pytest.approx(4.0, rel=1e-5)
    assert found["agreement"] is None
    assert found["total_variation"] == pytest.approx(reference.distance(narrow, wide), rel=1e-5)


def test_the_best_of_a_column_is_bold_with_what_is_within_its_error() -> None:
    column = [(0.50, 0.02), (0.51, 0.001), (0.60, 0.01), None]
    assert with_best([column], [2], [False])[0] == ["**0.50 ± 0.02**", "**0.51 ± 0.00**", "0.60 ± 0.01", ""]
    assert with_best([column], [2], [True])[0][2] == "**0.60 ± 0.01**"


def test_means_over_other_seeds_are_not_compared() -> None:
    def lines(*found: tuple[str, int, float]) -> list[list[str]]:
        methods = list(dict.fromkeys(method for method, _, _ in found))
        rows = [{"method": method, "seed": seed, "nll": nll} for method, seed, nll in found]
        return by_method(rows, methods, {"nll": ("NLL", 1, False)})

    one = ("a", 0, 1.0), ("b", 0, 2.0)
    assert lines(*one) == [["a", "**1.0**"], ["b", "2.0"]]
    assert lines(*one, ("b", 1, 3.0)) == [["a (1 seed)", "1.0"], ["b (2 seeds)", "2.5 ± 0.5"]]
    assert lines(one[0]) == [["a", "1.0"]], "the best of one is not told"
    several = lines(*one, ("a", 1, 1.0), ("b", 1, 4.0), ("c", 0, 0.5))
    assert several == [["a (2 seeds)", "**1.0 ± 0.0**"], ["b (2 seeds)", "3.0 ± 1.0"], ["c (1 seed)", "0.5"]]
    other = lines(*one, ("a", 1, 1.0), ("b", 2, 4.0))
    assert other == [["a (2 seeds)", "1.0 ± 0.0"], ["b (2 seeds)", "3.0 ± 1.0"]], "as many seeds, but others"


def test_sequences_are_standardised_by_their_training_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files in the format of the archive; steps beyond the end of a sequence stay 0, and halves are shorter."""
    folder = tmp_path / "JapaneseVowels"
    folder.mkdir()
    (folder / "JapaneseVowels_TRAIN.ts").write_text("@classLabel true 1 2\n@data\n1,3,5:0,2,4:1\n7:8:2\n")
    (folder / "JapaneseVowels_TEST.ts").write_text("@data\n90,110:80,120:2\n")
    monkeypatch.setenv("PYRO_BNN_DATA", str(tmp_path))
    data = datasets.vowels()
    assert data.x.shape == (3, 3, 2)
    assert data.lengths.tolist() == [3, 1, 2] and data.y.tolist() == [0, 1, 1] and data.group.tolist() == [0, 0, 1]
    split = sequences.split(data, data.group == 1, torch.ones(3, dtype=torch.bool))
    (train, labels), (test, _) = split.train, split.test
    inside = torch.cat([train["x"][0], train["x"][1, :1]])
    torch.testing.assert_close(inside.mean(0), torch.zeros(2), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(inside.std(0), torch.ones(2))
    assert labels.tolist() == [0, 1]
    assert bool((train["x"][1, 1:] == 0).all()) and bool((test["x"][0, 2:] == 0).all())
    deviation = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0], [7.0, 8.0]]).std(0)
    torch.testing.assert_close(test["x"][0, 0], torch.tensor([90 - 4.0, 80 - 3.5]) / deviation)
    assert sequences.moved(split.train, "half", 0)[0]["lengths"].tolist() == [2, 1]
    assert not torch.equal(sequences.moved(split.test, "noise", 0)[0]["x"], test["x"])


def test_the_network_of_the_images_has_a_relu_after_each_layer_but_the_last() -> None:
    net = tasks.lenet5(0)
    layers = list(net.layers)  # type: ignore[arg-type]
    followed = [isinstance(layers[i + 1], nn.ReLU) for i in range(len(layers) - 1) if list(layers[i].parameters())]
    assert followed == [True, True, True] and isinstance(layers[-1], nn.Linear)
    assert sum(p.numel() for p in net.parameters()) == 431_080
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_network_of_colour_images_is_resnet_20() -> None:
    """As He et al. 2015 count it: 20 layers with those of the blocks, .27 million numbers, at 32, 16 and 8 pixels."""
    net = tasks.resnet20(0)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[-1] != 1]
    assert len(layers) == 20 and sum(p.numel() for p in net.parameters()) == pytest.approx(0.27e6, rel=0.02)
    sizes: list[int] = []
    for module in net.modules():
        if isinstance(module, tasks.Block):
            module.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-1]))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [32] * 3 + [16] * 3 + [8] * 3


@pytest.mark.parametrize("outside", [16, 32])
def test_a_block_adds_to_its_shortcut(outside: int) -> None:
    """Proves it with a last norm that gives zero; the shortcut is the input where the shape stays."""
    block = tasks.Block(16, outside, 0.0)
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x), block.shortcut(x).relu()) and block(x).any()
    assert (block.shortcut(x) is x) == (outside == 16)


def test_colour_images_are_in_units_of_the_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.rand(7, 3, 32, 32), torch.rand(5, 3, 32, 32) / 2
    labels = torch.zeros(7, dtype=torch.long), torch.zeros(5, dtype=torch.long)
    monkeypatch.setattr(datasets, "cifar10", lambda: datasets.Images(pixels[0], labels[0], pixels[1], labels[1]))
    found = tasks.TASKS["cifar10"].load()
    assert abs(float(found.x_train.mean())) < 1e-5 and float(found.x_train.std()) == pytest.approx(1.0)
    torch.testing.assert_close(found.x_test, (pixels[1] - pixels[0].mean()) / pixels[0].std())


@pytest.mark.parametrize("network", [tasks.lenet5, tasks.resnet20])
def test_dropout_changes_no_starting_value(network: Any) -> None:
    """Nor what a network says once it is trained."""
    x = torch.randn(2, 1, 28, 28) if network is tasks.lenet5 else torch.randn(2, 3, 32, 32)
    plain, noisy = network(3).eval(), network(3, dropout=0.5)
    assert torch.equal(plain(x), noisy.eval()(x)) and not torch.equal(plain(x), noisy.train()(x))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_grey_images_of_another_set_are_seen_as_those_of_the_own(shape: tuple[int, int, int]) -> None:
    """Of as many channels and pixels, in the same units, in a black frame."""
    study = object.__new__(rows.Study)
    study.mean, study.std, study.test = 51.0, 10.0, (torch.zeros(1, *shape), torch.zeros(1))
    found = study.as_ours(torch.full((2, 28, 28), 255, dtype=torch.uint8))
    edge = (shape[-1] - 28) // 2
    inside = found[..., edge : edge + 28, edge : edge + 28]
    assert found.shape == (2, *shape) and (inside == 20.4).all()
    assert (found == -5.1).sum() == found.numel() - inside.numel()


@pytest.mark.parametrize("changed", ["network", "batch_size", "lr", "epochs"])
def test_a_kept_network_of_another_recipe_is_trained_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is taken for the recipe that it was written with, and for no other."""
    monkeypatch.chdir(tmp_path)
    study = object.__new__(rows.Study)  # without the images, which are not there for every user
    study.data, study.share = "fashion", 0.01
    pair = torch.randn(4, 1, 28, 28), torch.randint(10, (4,))
    settings = {"scale": 1.0, "epochs": 10}
    nlls = {str(one): float(one != settings) for one in methods.METHODS[tasks.ONE].grid}
    study.quick = {"rows": [], "validation": {tasks.ONE: nlls}}
    study.network(0, 0, pair)
    (file,) = (tmp_path / rows.RUNS).iterdir()
    kept = torch.load(file, weights_only=True)
    kept["seconds"] = -1.0
    torch.save(kept, file)
    assert study.network(0, 0, pair)[1] == -1.0
    kept["recipe"][changed] = "another"
    torch.save(kept, file)
    assert study.network(0, 0, pair)[1] > 0
    fewer = pair[0][:2], pair[1][:2]
    assert study.network(0, 0, fewer)[1] > 0 and len(list((tmp_path / rows.RUNS).iterdir())) == 2


@pytest.mark.parametrize(
    ("nlls", "chosen"),
    [((0.3, 0.2, 0.1), 2), ((0.1005, 0.2, 0.1), 0), ((0.102, 0.1004, 0.1), 1), ((math.inf, 0.2, 0.3), 1)],
)
def test_of_settings_that_are_alike_the_first_is_chosen(
    nlls: tuple[float, ...], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fits to the images that are not held out; the one that is scored sees all training images."""
    seen: list[int] = []

    def run(start: methods.Start, settings: tasks.Settings) -> methods.Fit:
        seen.append(len(start.pair[1]))
        return methods.Fit(settings["nll"], 0.0)

    monkeypatch.setattr(rows, "draws_of", lambda method, posterior: 1)
    monkeypatch.setattr(pb.diagnostics, "evaluate", lambda posterior, held, **_: {"nll": posterior}, raising=False)
    grid = tuple({"nll": nll} for nll in nlls)
    monkeypatch.setitem(methods.METHODS, "some", methods.Method(run, grid=grid))
    study = object.__new__(rows.Study)
    study.data, study.share, study.quick = "fashion", 0.01, {"rows": [], "validation": {}}
    study.train = torch.zeros(5, 1, 28, 28), torch.zeros(5)
    study.inner, study.held = (tuple(part[of] for part in study.train) for of in (slice(3), slice(3, 5)))  # type: ignore[assignment]
    assert study.chosen("some") == grid[chosen]
    study.fitted("some", grid[chosen], 0)
    assert seen == [3, 3, 3, 5]


@pytest.mark.parametrize(("seeds", "chosen"), [(1, 0), (2, 1)])
def test_settings_are_compared_by_their_mean_over_the_seeds_of_validation(
    seeds: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One seed may be lucky: of two seeds' fits the mean counts, and one that fails has no mean."""
    nlls = {0: (0.1, 0.4), 1: (0.2, 0.2), 2: (0.0, math.nan)} if seeds == 2 else {0: (0.1,), 1: (0.2,)}

    def run(start: methods.Start, settings: tasks.Settings) -> methods.Fit:
        nll = nlls[settings["a"]][start.seed]
        if math.isnan(nll):
            raise FloatingPointError
        return methods.Fit(nll, 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(rows, "draws_of", lambda method, posterior: 1)
    monkeypatch.setattr(pb.diagnostics, "evaluate", lambda posterior, held, **_: {"nll": posterior}, raising=False)
    grid = tasks.grid(a=tuple(nlls))
    monkeypatch.setitem(methods.METHODS, "some", methods.Method(run, grid=grid, seeds=seeds))
    study = object.__new__(rows.Study)
    study.data, study.share, study.quick = "fashion", 0.01, {"rows": [], "validation": {}}
    study.inner = study.held = torch.zeros(3, 1, 28, 28), torch.zeros(3)
    assert study.chosen("some") == grid[chosen]
    expected = [sum(own) / seeds if not math.isnan(own[-1]) else math.inf for own in nlls.values()]
    assert list(study.tried("some").values()) == pytest.approx(expected)


def test_rows_of_settings_that_are_no_longer_the_best_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that grows is tried where it is new; what starts from a network follows the network's settings."""
    monkeypatch.setattr(rows.Study, "validated", lambda self, method, settings: tried.append(settings) or settings["a"])
    monkeypatch.setattr(rows.Study, "scored", lambda self, method, settings, seed: {})
    study, tried = object.__new__(rows.Study), list[dict[str, float]]()
    study.data, study.share, study.quick = "fashion", 0.01, {"rows": [], "validation": {}}

    def measured(*values: float) -> list[tuple[str, Any]]:
        run = methods.METHODS[tasks.ONE].run
        monkeypatch.setitem(methods.METHODS, tasks.ONE, methods.Method(run, grid=tasks.grid(a=values)))
        monkeypatch.setitem(methods.METHODS, "after", methods.Method(run, is_after=True))
        return [(row["method"], row["settings"]) for row in study.rows([tasks.ONE, "after"], [0])]

    assert measured(2.0, 1.0) == [(tasks.ONE, {"a": 1.0}), ("after", {"network": {"a": 1.0}})]
    assert measured(2.0, 1.0) == []
    assert measured(2.0, 1.0, 3.0) == []
    assert tried == [{"a": 2.0}, {"a": 1.0}, {"a": 3.0}]
    assert measured(0.5, 2.0, 1.0) == [(tasks.ONE, {"a": 0.5}), ("after", {"network": {"a": 0.5}})]
    assert len(tried) == 4 and len(study.quick["rows"]) == 2


def test_settings_that_are_taken_over_are_those_that_the_other_set_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """MNIST tries nothing on its own images, also for what starts from a network."""

    def few(study: rows.Study, data: str, share: float) -> None:
        study.data, study.share, study.quick = data, share, {"rows": [], "validation": {}}

    def validated(study: rows.Study, method: str, settings: tasks.Settings) -> float:
        tried.append(study.data)
        return float(settings["a"])

    monkeypatch.setattr(rows.Study, "__init__", few)
    monkeypatch.setattr(rows.Study, "validated", validated)
    monkeypatch.setattr(rows.Study, "scored", lambda self, method, settings, seed: {})
    run = methods.METHODS[tasks.ONE].run
    for name, after in ((tasks.ONE, False), ("after", True)):
        grid = tasks.grid(a=(2.0, 1.0))
        monkeypatch.setitem(methods.METHODS, name, methods.Method(run, grid=grid, is_after=after))
    study, tried = rows.Study("mnist", 0.01), list[str]()
    found = [row["settings"] for row in study.rows([tasks.ONE, "after"], [0, 1])]
    assert found == [{"a": 1.0}, {"a": 1.0, "network": {"a": 1.0}}] * 2
    assert tried == ["fashion"] * 4 and not study.quick["validation"]


def test_the_settings_of_a_table_are_those_of_all_its_rows() -> None:
    """What was not tried is counted, with a network's settings or without, and rows of two settings have no mean."""
    fields = [{"around": value} for value in (0.02, 0.05, 0.1)]
    start = {"network": {"scale": 0.3, "epochs": 5}}
    rows = [{"method": "mean field", "seed": seed, "settings": {**fields[0], **start}} for seed in (0, 1)]
    tried = {"mean field": {str({**fields[i], **start}): 0.2 for i in (0, 2)}}
    rows.append({"method": "ensemble of 4", "seed": 0, "settings": start})
    assert (
        section.chosen("fashion", rows, tried)
        == "Chosen by validation: mean field around 0.02 (1 of 3 settings not tried yet)."
    )
    tried["mean field"][str({**fields[1], **start})] = 0.3
    assert section.chosen("fashion", rows, tried) == "Chosen by validation: mean field around 0.02."
    later = {"method": "mean field", "seed": 2, "settings": {**fields[0], "network": {"scale": 1.0, "epochs": 5}}}
    with pytest.raises(ValueError, match=r"rows of mean field have different settings.*0\.3.*1\.0"):
        section.chosen("fashion", [*rows, later], tried)


@pytest.mark.parametrize("changed", ["network", "images", None])
def test_rows_of_another_recipe_are_refused(
    changed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one network or training do not stand beside those of another, and none is lost."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    study = object.__new__(rows.Study)
    study.data, study.share, study.recipe = "fashion", 1.0, {**rows.recipe_of(tasks.TASKS["fashion"]), "images": 60_000}
    study.keep(rows=[{"method": "one network", "seed": 0}])
    before = (tmp_path / "images_fashion.json").read_text()
    if changed is None:
        assert study.known()["rows"]
        return
    study.recipe = {**study.recipe, changed: "another"}
    with pytest.raises(ValueError, match="remove the file to measure anew"):
        study.keep(rows=[])
    assert (tmp_path / "images_fashion.json").read_text() == before
