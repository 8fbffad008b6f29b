"""An exported posterior is one module without Pyro that gives what `predict` gives, in torch and in ONNX Runtime."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pyro
import pytest
import torch
from exported import FORMS, NETWORKS, called, dense, mlp, of_any_size, of_floats, parts, rank1, to_onnx
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson
from pyro_bnn.models import Dense, MeanFieldGuide
from pyro_bnn.posterior import draw_source

OUTPUTS = ("mean", "epistemic", "entropy")
EVERY = [(network, form) for network in NETWORKS for form in FORMS]
#: what the default tests take of all pairs, one of every network
QUICK = [("mlp", form) for form in FORMS] + [
    ("lenet", "rank1"),
    ("torchvision_vit", "rank1"),
    ("lstm", "rank1"),
    ("bert", "dense"),
]
QUICK_ONNX = [("mlp", "codebook")]


def quick_ones(quick: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in EVERY]


def posterior_of(network: str, form: str) -> pb.Posterior:
    torch.manual_seed(0)
    return FORMS[form](NETWORKS[network][0]())


def require_equal(found: dict[str, Any], prediction: pb.Prediction, tolerance: float = 1e-5) -> None:
    assert found
    for name, value in found.items():
        expected = getattr(prediction, name)
        assert tuple(value.shape) == tuple(expected.shape)
        torch.testing.assert_close(
            torch.as_tensor(value), expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def count_of(posterior: pb.Posterior) -> int:
    return 1 if posterior.is_deterministic else 2


@pytest.mark.parametrize(("network", "form"), quick_ones(QUICK))
def test_the_module_and_its_torch_export_predict_at_any_number_of_samples(network: str, form: str) -> None:
    posterior, data = posterior_of(network, form), NETWORKS[network][1]
    draws, x = count_of(posterior), data(4)
    module = posterior.export(x, draws, OUTPUTS, seed=3)
    args, kwargs = parts(x)
    program = torch.export.export(module, args, kwargs, dynamic_shapes=of_any_size(x)).module(check_guards=False)
    for rows in (1, 7):
        prediction = posterior.predict(data(rows), draws, seed=3)
        assert prediction.epistemic.min() > 1e-7, "the draws differ, and the posterior predicts with all of them"
        require_equal(called(module, data(rows)), prediction)
        require_equal(called(program, data(rows)), prediction)


@pytest.mark.parametrize(("network", "form"), quick_ones(QUICK_ONNX))
def test_onnx_runtime_predicts_at_any_number_of_samples(network: str, form: str, tmp_path: Path) -> None:
    posterior, data = posterior_of(network, form), NETWORKS[network][1]
    draws = count_of(posterior)
    run = to_onnx(posterior.export(data(4), draws, OUTPUTS, seed=3), data(4), tmp_path / "posterior.onnx")
    for rows in (1, 7):
        require_equal(run(data(rows)), posterior.predict(data(rows), draws, seed=3))


@pytest.mark.parametrize(("network", "form"), quick_ones([("mlp", "rank1")]))
def test_a_compiled_module_predicts(network: str, form: str) -> None:
    posterior, data = posterior_of(network, form), NETWORKS[network][1]
    draws = count_of(posterior)
    compiled = torch.compile(posterior.export(data(4), draws, OUTPUTS, seed=3), backend="aot_eager")
    for rows in (2, 7):
        require_equal(called(compiled, data(rows)), posterior.predict(data(rows), draws, seed=3))


# ------------------------------------------------------------------------------------------------ what it holds


def numbers_in(path: Path) -> int:
    """Numbers in the tensors of a file, constants of operations included."""
    model = onnx.load(path)
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    return sum(onnx.numpy_helper.to_array(tensor).size for tensor in tensors)


@pytest.mark.parametrize("form", ["rank1", "bella"])
def test_module_and_file_hold_w_once(form: str, tmp_path: Path) -> None:
    """Proves that draws cost their factors alone, in the module and in the file that ONNX Runtime reads."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 64))
    weights = sum(p.numel() for p in net.parameters())
    posterior = FORMS[form](net)
    draws = 1 if form == "bella" else 6
    module = posterior.export(of_floats(64)(4), draws, "mean", seed=0)
    used = {site.removeprefix("draws.") for site in module.state_dict() if site.startswith("draws.")}
    factors = sum(value.numel() for site, value in posterior.draws(draws, seed=0).items() if site in used)
    assert {"1.weight.s", "4.weight.r"} <= used or {"1.weight.A", "4.weight.B"} <= used
    held = sum(buffer.numel() for buffer in module.buffers())
    assert weights - 80 <= held - factors <= weights  # W, and the biases where they are not drawn
    run = to_onnx(module, of_floats(64)(4), tmp_path / "posterior.onnx")
    require_equal(run(of_floats(64)(7)), posterior.predict(of_floats(64)(7), draws, seed=0))
    assert held <= numbers_in(tmp_path / "posterior.onnx") < held + 500  # shapes and other constants


def test_a_dense_module_holds_the_weights_of_each_draw_and_no_others() -> None:
    posterior = dense(mlp())
    module = posterior.export(of_floats(4)(3), 5, "mean", seed=0)
    assert sum(buffer.numel() for buffer in module.buffers()) == 5 * sum(p.numel() for p in mlp().parameters())


def test_the_module_keeps_its_numbers_when_the_posterior_changes() -> None:
    posterior, x = rank1(mlp()), of_floats(4)(3)
    module = posterior.export(x, 2, seed=0)
    before = module(x)
    with torch.no_grad():
        for parameter in [*posterior.model.parameters(), *posterior.guide.parameters()]:
            parameter.add_(1.0)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_the_posterior_is_as_it_was() -> None:
    """Proves that modes, gradients, buffers, validation and random state survive, also when an export fails."""
    posterior, x = dense(NETWORKS["lenet"][0]()), NETWORKS["lenet"][1](3)
    posterior.model.train()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in posterior.model.named_buffers()}
    wanted = [p.requires_grad for p in posterior.model.parameters()]
    state, validates = torch.get_rng_state(), torch.distributions.Distribution._validate_args
    posterior.export(x, 2, seed=0)
    with pytest.raises(RuntimeError):
        posterior.export(x[:, :, :5, :5], 2, seed=0)
    assert posterior.model.training and wanted == [p.requires_grad for p in posterior.model.parameters()]
    assert torch.equal(state, torch.get_rng_state()) and validates == torch.distributions.Distribution._validate_args
    for name, buffer in posterior.model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])


def test_copies_and_states_of_a_module() -> None:
    posterior, x = rank1(mlp()), of_floats(4)(5)
    module = posterior.export(x, 2, seed=0)
    copied = copy.deepcopy(module).train().eval()
    assert (copied.inputs, copied.outputs) == (module.inputs, module.outputs) == (("input",), ("mean", "epistemic"))
    other = posterior.export(x, 2, seed=1)
    assert not torch.equal(other(x)["mean"], module(x)["mean"])
    other.load_state_dict(module.state_dict())
    for same in (copied, other):
        torch.testing.assert_close(same(x), module(x), rtol=0, atol=0)
    assert repr(module).startswith("AveragedNetwork(input) -> {mean, epistemic}, ")
    with pytest.raises(TypeError, match=r"torch\.export\.save"):
        pickle.dumps(module)


def test_threads_share_a_module() -> None:
    module, data = dense(mlp()).export(of_floats(4)(3), 3, seed=0), of_floats(4)
    alone = [module(data(rows)) for rows in range(1, 30)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda rows: module(data(rows)), range(1, 30)))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------- draws and outputs


@pytest.mark.parametrize(
    ("likelihood", "width", "outputs"),
    [
        (Gaussian(), 1, ("mean", "aleatoric", "epistemic", "variance", "std")),
        (Gaussian(0.3), 2, ("mean", "aleatoric", "epistemic", "variance", "std")),
        (HeteroscedasticGaussian(), 2, ("mean", "aleatoric", "epistemic", "variance", "std")),
        (Poisson(), 1, ("mean", "aleatoric", "epistemic", "variance", "std")),
        (Bernoulli(), 1, ("mean", "probs", "entropy", "mutual_information", "aleatoric", "epistemic")),
        (Categorical(), 3, ("mean", "probs", "entropy", "mutual_information", "aleatoric", "epistemic")),
        (None, 2, ("mean", "epistemic", "variance", "std")),
    ],
    ids=repr,
)
def test_every_output_of_every_likelihood_in_double_precision(likelihood: Any, width: int, outputs: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, width)).double()
    posterior, x = rank1(net, likelihood), of_floats(4)(6).double()
    module = posterior.export(x[:2], 3, outputs, seed=1)
    found = module(x)
    assert tuple(found) == outputs == module.outputs
    assert {value.dtype for value in found.values()} == {torch.float64}
    require_equal(found, posterior.predict(x, 3, seed=1), 1e-12)


def test_draws_are_those_of_predict_by_default() -> None:
    posterior, x = dense(mlp()), of_floats(4)(5)
    require_equal(posterior.export(x, seed=4)(x), posterior.predict(x, seed=4))
    few = posterior.as_draws(3, seed=4)
    require_equal(few.export(x, draws=2)(x), few.predict(x, 2))
    assert "mean" in few.export(x, outputs="mean").outputs


@pytest.mark.parametrize("kind", ["draws", "gathered"])
@pytest.mark.parametrize("form", ["rank1", "dense"])
def test_each_draw_predicts_with_its_own_statistics(kind: str, form: str) -> None:
    posterior, x = posterior_of("lenet", form), NETWORKS["lenet"][1](6)
    if kind == "gathered":
        posterior.recompute_statistics([NETWORKS["lenet"][1](8)])
    else:
        generator = torch.Generator().manual_seed(0)
        own = {"1.running_mean": torch.randn(3, 3, generator=generator), "1.running_var": torch.rand(3, 3) + 0.5}
        posterior = pb.Posterior.from_draws(posterior.model, posterior.draws(3, seed=0), statistics=own)
    module = posterior.export(x[:3], 2, OUTPUTS, seed=0)
    assert module.get_buffer("statistics.1.running_mean").shape == (2, 3)
    require_equal(module(x), posterior.predict(x, 2, seed=0))


def test_draws_that_do_not_fit_the_budget_at_once_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, x = rank1(mlp()), of_floats(4)(6)
    at_once = posterior.export(x, 5, seed=0)
    monkeypatch.setattr(draw_source, "MAX_ELEMENTS", 2 * 2 * 6 * 8)  # two draws of two members, six samples, width 8
    in_parts = posterior.export(x, 5, seed=0)
    linear = torch.ops.aten.linear.default
    counts = [sum(node.target is linear for node in module.graph.nodes) for module in (at_once, in_parts)]
    assert counts == [2, 6]
    require_equal(in_parts(x), posterior.predict(x, 5, seed=0))


def test_other_engines_export_too() -> None:
    data = (of_floats(4)(40), torch.arange(40) % 2)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    x = of_floats(4)(5)
    fits = {"epochs": 1, "progress": False, "seed": 0}
    model = Dense(net, Categorical(), 40)
    guide = AutoNormal(model)
    guide(*data)
    posteriors = [
        pb.inference.MCDropout(net, Categorical(), 40).fit(data, **fits),
        pb.inference.LastLayerLaplace(net, Categorical(), 40).fit(data, **fits),
        pb.inference.DeepEnsemble(net, Categorical(), 40).fit(data, **fits),
        pb.inference.sample(pb.inference.SGLD(model, data, step_size=0.01), 3, 2, num_chains=1, progress=False, seed=0),
        pb.Posterior(model, guide),
    ]
    for posterior in posteriors:
        require_equal(posterior.export(x[:2], seed=0)(x), posterior.predict(x, seed=0))


class Mixed(nn.Module):
    """Numbers and one category for each sample, with a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(7, 2)

    def forward(self, numbers: Tensor, category: Tensor, double: bool = False) -> Tensor:
        y: Tensor = self.out(torch.cat([numbers, self.table(category)], -1))
        return 2 * y if double else y


@pytest.mark.parametrize("form", ["rank1", "dense"])
def test_several_inputs_keep_their_names_and_settings_stay(form: str) -> None:
    posterior = FORMS[form](Mixed())
    x = (of_floats(4)(5), torch.arange(5))
    module = posterior.export(x, 2, seed=0)
    assert module.inputs == ("numbers", "category")
    require_equal(module(*x), posterior.predict(x, 2, seed=0))
    named = {"category": x[1], "double": True, "numbers": x[0]}
    module = posterior.export(named, 2, seed=0)
    require_equal(module(numbers=x[0], category=x[1]), posterior.predict(named, 2, seed=0))


class Blocks(nn.Module):
    """Parts without gradients, tied weights, and a constant that is made in the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = x.cumsum(-1)
        with torch.autocast("cpu", enabled=False):
            h = torch.tanh(self.b(torch.tanh(self.a(x)))) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        y: Tensor = self.out(h + shift)
        return y


def test_blocks_without_gradients_and_tied_weights() -> None:
    posterior, x = rank1(Blocks()), of_floats(4)(5)
    module = posterior.export(x, 2, seed=0)
    assert sum(name.startswith("network.") and name.endswith("weight") for name in module.state_dict()) == 2
    assert not list(module.graph.find_nodes(op="get_attr", target="blocks"))
    require_equal(module(x), posterior.predict(x, 2, seed=0))


class Gathers(nn.Module):
    """Picks columns by a constant with eight entries, which is no batch of eight rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(8, 2)
        self.register_buffer("order", torch.arange(8) % 4, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(torch.tanh(self.first(x)).index_select(1, self.order))
        return y


def test_constants_of_a_network_do_not_limit_the_number_of_samples() -> None:
    posterior, data = FORMS["bella"](Gathers()), of_floats(4)
    module = posterior.export(data(4), seed=0)
    for rows in (1, 8):
        require_equal(module(data(rows)), posterior.predict(data(rows), seed=0))


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_a_module_is_the_same_in_whatever_context_it_is_exported(context: Any) -> None:
    posterior, x = rank1(mlp()), of_floats(4)(5)
    with context():
        module = posterior.export(x, 2, seed=0)
    require_equal(module(x), posterior.predict(x, 2, seed=0))
    (slope,) = torch.autograd.grad(module(x.requires_grad_())["mean"][:, 0].sum(), x)
    assert slope.abs().min() > 0


def test_nothing_checks_that_numbers_are_finite() -> None:
    posterior, x = dense(mlp()), of_floats(4)(3)
    module = posterior.export(x, 2, seed=0)
    x[1, 2] = torch.nan
    found = module(x)["mean"]
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()
    with pytest.raises(ValueError, match="NaN"):
        posterior.predict(x)


# ----------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    posterior, x = rank1(mlp()), of_floats(4)(3)
    stored = posterior.as_draws(3)
    refusals: list[tuple[type[Exception], str, Any]] = [
        (
            ValueError,
            r"outputs='median': expected one of 'mean', 'probs'",
            lambda: posterior.export(x, outputs="median"),
        ),
        (ValueError, r"outputs=\(\): expected at least one", lambda: posterior.export(x, outputs=())),
        (ValueError, "each once", lambda: posterior.export(x, outputs=["mean", "mean"])),
        (TypeError, "std is not defined for Categorical", lambda: posterior.export(x, outputs="std")),
        (TypeError, "outputs=3: expected a string", lambda: posterior.export(x, outputs=3)),  # type: ignore[arg-type]
        (ValueError, "draws=0: expected a whole number", lambda: posterior.export(x, 0)),
        (TypeError, "draws=2.5|draws='2'", lambda: posterior.export(x, "2")),  # type: ignore[arg-type]
        (ValueError, "only 3 draws are stored", lambda: stored.export(x, 4)),
        (ValueError, "seed=-1", lambda: posterior.export(x, seed=-1)),
        (ValueError, "example is empty", lambda: posterior.export(x[:0])),
        (
            ValueError,
            "example holds 1 NaN",
            lambda: posterior.export(torch.full((1, 4), torch.nan)[:, :1].expand(1, 1)),
        ),
        (TypeError, "containers inside", lambda: posterior.export({"input": (x, x)})),
        (TypeError, "key 'a b'", lambda: posterior.export({"a b": x})),
        (ValueError, "'x_1' of example has shape", lambda: posterior.export((x, torch.ones(2)))),
        (ValueError, "one integer for each sample", lambda: rank1(Mixed()).export((x, torch.tensor([1, 1, 1])))),
    ]
    for kind, message, attempt in refusals:
        with pytest.raises(kind, match=message):
            attempt()


def test_an_example_that_the_network_does_not_take_is_named() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        rank1(mlp()).export(of_floats(3)(2))
    assert any("x is [2, 3] of float32" in note for note in caught.value.__notes__)


def test_a_model_of_ones_own_is_refused() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        value: Tensor = pyro.sample("a", pyro.distributions.Normal(0.0, 1.0))
        return value

    with pytest.raises(TypeError, match=r"export\(\) is for models of this package"):
        pb.Posterior.from_draws(model, {"a": torch.randn(5)}).export(torch.ones(2, 3))


def test_a_call_with_something_else_is_refused() -> None:
    module = rank1(Mixed()).export((of_floats(4)(5), torch.arange(5)), 2)
    numbers, category = of_floats(4)(3), torch.arange(3)
    with pytest.raises(ValueError, match=r"numbers has shape \[3, 3\]: this module was exported for \[samples, 4\]"):
        module(numbers[:, :3], category)
    with pytest.raises(ValueError, match=r"category has shape \[2\]"):
        module(numbers, category[:2])
    with pytest.raises(TypeError, match=r"numbers is torch.float64: .* \[samples, 4\] of torch.float32"):
        module(numbers.double(), category)
    with pytest.raises(TypeError, match="category is list"):
        module(numbers, [0, 1, 2])
    with pytest.raises(TypeError, match="category"):
        module(numbers)
    with pytest.raises(TypeError, match="other"):
        module(numbers, category, other=numbers)


class Odd(nn.Module):
    """A network that no graph can show, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.out = way, nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(x)
        if self.way == "values" and y.sum() > 0:
            return -y
        if self.way == "samples" and len(x) > 100:
            return -y
        if self.way == "random":
            return y + torch.randn_like(y)
        if self.way == "writes":
            self.calls += 1
        return y


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("values", "cannot be exported for any number of samples"),
        ("samples", "cannot be exported for any number of samples"),
        ("random", "draws random numbers in eval mode"),
        ("writes", "writes into its buffer 'calls'"),
    ],
)
def test_a_network_that_no_graph_can_show_is_refused(way: str, message: str) -> None:
    model = Dense(Odd(way), Categorical(), 10)
    with pytest.raises(RuntimeError, match=message):
        pb.Posterior(model, MeanFieldGuide(model)).export(of_floats(4)(3), 2)
