"""Gradient checkpointing inside a network changes memory and nothing else, whatever the model and its engine."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyro_bnn as pb
from pyro_bnn.inference.potential import Potential
from pyro_bnn.program.model import BayesianNetwork

N = 12


class Net(nn.Module):
    """Two residual blocks, the second of which holds a segment of its own, with dropout in all."""

    def __init__(self, again: dict[str, Any] | None, dropout: float) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.drop, self.again = nn.Dropout(dropout), again

    def run(self, part: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
        return part(h) if self.again is None else checkpoint(part, h, **self.again)

    def block(self, h: Tensor) -> Tensor:
        return self.drop(self.b(h).relu() + h)

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(self.block, self.a(x).tanh())
        return self.c(self.run(lambda z: self.drop(self.run(self.block, z)).tanh(), h))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=generator), torch.randint(0, 3, (N,), generator=generator)


def loss_of(model: BayesianNetwork, guide: Any, x: Any, y: Tensor) -> list[Tensor]:
    """The loss of one step, and the gradients of everything that trains."""
    for p in [*model.parameters(), *guide.parameters()]:
        p.grad = None
    torch.manual_seed(2)
    loss = pb.inference.MixtureELBO().differentiable_loss(model, guide, x, y)
    loss.backward()
    trained = [p for p in [*model.parameters(), *guide.parameters()] if p.requires_grad]
    return [loss.detach(), *(p.grad for p in trained if p.grad is not None)]


def dense(net: nn.Module, components: int = 1) -> list[Tensor]:
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), N)
    return loss_of(model, pb.models.MeanFieldGuide(model, components), *data())


def mixture(net: nn.Module) -> list[Tensor]:
    return dense(net, 3)


def point(net: nn.Module) -> list[Tensor]:
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), N)
    return loss_of(model, pb.models.PointGuide(model), *data())


def rank1(net: nn.Module) -> list[Tensor]:
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), N)
    return loss_of(model, pb.models.Rank1Guide(model, 2), *data())


def bella(net: nn.Module) -> list[Tensor]:
    model = pb.models.Bella(net, pb.likelihoods.Categorical(), N, rank=2)
    return loss_of(model, pb.models.ParticleGuide(model, 3), *data())


def svgd(net: nn.Module) -> list[Tensor]:
    """Where the particles are after two steps."""
    model = pb.models.Bella(net, pb.likelihoods.Categorical(), N, rank=2)
    guide = pb.models.ParticleGuide(model, 3)
    posterior = pb.inference.SVGD(model, guide, "sgd", lr=1e-4).fit(data(), epochs=2, seed=0, progress=False)
    return [torch.tensor(posterior.losses), *(p.detach() for p in guide.parameters())]


def weight_sharing(net: nn.Module) -> list[Tensor]:
    model = pb.models.WeightSharing(net, pb.likelihoods.Categorical(), N)
    return loss_of(model, pb.models.CodebookGuide(model, 4), *data())


def sghmc(net: nn.Module) -> list[Tensor]:
    """Where two chains are after three steps, and one chain alone."""
    model = pb.models.SpikeSlab(net, pb.likelihoods.Categorical(), N)
    kernel = pb.inference.SGHMC(model, data(), step_size=1e-3, friction=0.1, capture=False)
    two = pb.inference.sample(kernel, 3, 0, 2, seed=0, progress=False).draws(3)
    kernel = pb.inference.SGHMC(model, data(), step_size=1e-3, friction=0.1, capture=False)
    return [*two.values(), *pb.inference.sample(kernel, 3, seed=0, progress=False).draws(3).values()]


def spike_and_slab(net: nn.Module) -> list[Tensor]:
    model = pb.models.SpikeSlab(net, pb.likelihoods.Categorical(), N)
    potential = Potential(model, *data())
    theta = potential.start().requires_grad_()
    torch.manual_seed(2)
    energy = potential(potential.split(theta), *data())
    energy.backward()
    return [energy.detach(), theta.grad]


MODELS = [dense, point, rank1, bella, svgd, weight_sharing, spike_and_slab, sghmc]


def require_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert all(g.norm() > 0 for g in expected[:2])


@pytest.mark.filterwarnings("ignore:the forward pass of Net could not be vectorised")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("gradients", "dropout"),
    # members that are vectorised without segments draw other masks than those that run one by one
    [(mixture, 0.0), *((gradients, dropout) for gradients in MODELS for dropout in (0.0, 0.4))],
)
def test_loss_and_gradients_are_those_without_segments(
    gradients: Callable[[nn.Module], list[Tensor]], reentrant: bool, dropout: float
) -> None:
    """Proves it in float32 within 1e-5, with the masks of dropout drawn again where the state of torch is kept."""
    results = []
    for again in (None, {"use_reentrant": reentrant}):
        torch.manual_seed(0)
        results.append(gradients(Net(again, dropout)))
    require_same(results[1], results[0])


# ------------------------------------------------------------------------------------- networks of other libraries


def densenet(memory_efficient: bool) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8, "num_classes": 3}
    net = torchvision.models.DenseNet(**options, memory_efficient=memory_efficient)
    return nn.Sequential(nn.Upsample((32, 32)), net)


@pytest.mark.parametrize("kind", ["dense", "rank-1", "low-rank"])
def test_a_densenet_in_little_memory(kind: str) -> None:
    """Proves loss, gradients and statistics of `memory_efficient=True`: those of the same network without it."""
    x, y = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 3
    results, statistics = [], []
    for memory_efficient in (False, True):
        net, likelihood = densenet(memory_efficient), pb.likelihoods.Categorical()
        model: BayesianNetwork
        if kind == "dense":
            model = pb.models.Dense(net, likelihood, N)
            guide: Any = pb.models.MeanFieldGuide(model, 2)
        elif kind == "rank-1":
            model = pb.models.Rank1(net, likelihood, N)
            guide = pb.models.Rank1Guide(model, 2, init_means=pb.priors.Normal(1.0, 0.05))
        else:
            model = pb.models.Bella(net, likelihood, N, rank=1)
            guide = pb.models.ParticleGuide(model, 2)
        results.append(loss_of(model, guide, x, y))
        statistics.append([b.clone() for _, b in model.core().net.named_buffers()])
    scale = max(float(g.norm()) for g in results[0][1:])
    for one, other in zip(results[1], results[0], strict=True):
        assert (one - other).norm() <= 1e-5 * max(float(other.norm()), scale)
    for one, other in zip(statistics[1], statistics[0], strict=True):
        torch.testing.assert_close(one, other)


def transformer(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 11, "num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(
            **sizes, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(**sizes, n_embd=8, n_layer=2, n_head=2, n_positions=8, use_cache=False)
    return transformers.GPT2ForSequenceClassification(config)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["dense", "rank-1", "low-rank"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(name: str, kind: str, reentrant: bool) -> None:
    """Proves that `gradient_checkpointing_enable` changes neither loss nor gradients, with dropout as configured."""
    ids = torch.randint(1, 11, (N, 5), generator=torch.Generator().manual_seed(1))
    x, y, results = {"input_ids": ids}, torch.arange(N) % 3, []
    for on in (False, True):
        net = transformer(name)
        if on:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore
        likelihood = pb.likelihoods.Categorical()
        model: BayesianNetwork
        if kind == "dense":
            model = pb.models.Dense(net, likelihood, N)
            guide: Any = pb.models.MeanFieldGuide(model)
        elif kind == "rank-1":
            model = pb.models.Rank1(net, likelihood, N, select="all-linear")
            guide = pb.models.Rank1Guide(model, 2, init_means=pb.priors.Normal(1.0, 0.05))
        else:
            model = pb.models.Bella(net, likelihood, N, rank=1)
            guide = pb.models.ParticleGuide(model, 2)
        results.append(loss_of(model, guide, x, y))
    scale = max(float(g.norm()) for g in results[0][1:])
    for one, other in zip(results[1], results[0], strict=True):
        assert (one - other).norm() <= 1e-5 * max(float(other.norm()), scale)


# ------------------------------------------------------------------------------------------- hooks, and refusals


def test_a_backward_hook_sees_the_weights_of_its_pass() -> None:
    """Proves it for a hook that reads a weight: three members in one graph, each with the norm of its own."""
    torch.manual_seed(0)
    net, seen = nn.Sequential(nn.Linear(4, 3)), list[float]()
    net[0].register_full_backward_hook(lambda module, *_: seen.append(float(module.weight.detach().norm())))
    network, x = pb.models.Dense(net, pb.likelihoods.Categorical(), N).core(), data()[0]
    weights = {"0.weight": torch.randn(3, 3, 4, requires_grad=True)}
    x.requires_grad_()
    sum(network(x, {"0.weight": w}).square().sum() for w in weights["0.weight"]).backward()  # type: ignore[union-attr]
    assert sorted(seen) == pytest.approx(sorted(float(w.detach().norm()) for w in weights["0.weight"]))
    assert isinstance(network.net[0].weight, nn.Parameter)  # type: ignore[index]


@pytest.mark.parametrize("gradients", [dense, rank1, bella])
def test_a_backward_pass_in_another_thread_sees_the_weights_too(gradients: Callable[[nn.Module], list[Tensor]]) -> None:
    """Proves it for a loss whose gradient is taken where the network never ran, as on the threads of a device."""
    results = []
    for again in (None, {"use_reentrant": False}):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            backward = Tensor.backward
            patch.setattr(Tensor, "backward", lambda loss, run=backward: in_a_thread(lambda: run(loss)))
            results.append(gradients(Net(again, 0.4)))
    require_same(results[1], results[0])


def in_a_thread(run: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()


def test_a_hook_that_is_there_for_the_pass_alone_is_there_when_a_part_runs_again() -> None:
    """Proves it for a hook that changes what a layer returns, and is removed before the backward pass."""
    results = []
    for again in (None, {"use_reentrant": False}):
        torch.manual_seed(0)
        core = pb.models.Dense(Net(again, 0.0), pb.likelihoods.Categorical(), N).core()
        handle = core.net.get_submodule("b").register_forward_hook(lambda module, args, h: 3 * h)
        weight = torch.ones(6, 6, requires_grad=True)
        f = core(data()[0], {"b.weight": weight})
        handle.remove()
        f.sum().backward()
        results.append([f.detach(), weight.grad])
    require_same(results[1], results[0])


class OwnCheckpoint(torch.autograd.Function):
    """A function that runs its argument again, as people have written them."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


class Squash(torch.autograd.Function):
    """An activation of the user's own, which runs nothing again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Own(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 3), nn.Linear(3, 3), how

    def part(self, h: Tensor) -> Tensor:
        return self.b(h).tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "squash":
            return Squash.apply(self.part(h))
        runs: dict[str, Any] = {"method": self.part, "module": self.b, "closure": lambda z: self.b(z).tanh()}
        return OwnCheckpoint.apply(runs[self.how], h)


@pytest.mark.parametrize("how", ["method", "module", "closure"])
@pytest.mark.parametrize("gradients", [point, rank1, bella])
def test_a_checkpoint_of_the_networks_own_is_refused_by_name(
    gradients: Callable[[nn.Module], list[Tensor]], how: str
) -> None:
    """Proves the message for what may run modules again where nothing here would know of it."""
    with pytest.raises(RuntimeError, match=r"OwnCheckpoint.*use_reentrant=False.*turn recomputation off"):
        gradients(Own(how))


@pytest.mark.parametrize("gradients", [point, rank1, bella])
def test_an_autograd_function_without_modules_is_no_checkpoint(
    gradients: Callable[[nn.Module], list[Tensor]],
) -> None:
    torch.manual_seed(0)
    assert len(gradients(Own("squash"))) > 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_exception_in_a_segment_that_runs_again_leaves_the_network_as_it_was(reentrant: bool) -> None:
    """Proves it for a segment that fails in the backward pass alone; the next step is that of a new model."""
    torch.manual_seed(0)
    net = Net({"use_reentrant": reentrant}, 0.0)
    model = pb.models.Dense(net, pb.likelihoods.Categorical(), N)
    guide, (x, y) = pb.models.MeanFieldGuide(model), data()
    expected = loss_of(model, guide, x, y)
    own = dict(model.core().net.named_parameters())

    def fail(*_: Any) -> None:
        if torch._C._current_graph_task_id() >= 0:
            raise KeyboardInterrupt

    handle = model.core().net.get_submodule("b").register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss_of(model, guide, x, y)
    handle.remove()
    assert all(p is own[n] for n, p in model.core().net.named_parameters())
    require_same(loss_of(model, guide, x, y), expected)


def test_torch_checkpoints_as_ever_outside_of_a_pass() -> None:
    """Proves that nothing of torch is left changed, and that the given network still trains on its own."""
    before = vars(torch.utils.checkpoint).copy()
    dense(Net({"use_reentrant": True}, 0.0))
    assert vars(torch.utils.checkpoint) == before
