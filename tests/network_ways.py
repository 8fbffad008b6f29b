"""What every pair of a network and a model goes through: a refusal with a reason, or all from gradients to ArviZ."""

import shutil
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb

CLASSES = 3
#: of the largest gradient, between two ways to compute one function in float64: thousands of roundings of 1e-16
SAME_FUNCTION = 1e-9
#: of the largest gradient in float32, where plain autograd is itself that near to float64
FLOAT32 = 1e-5
#: otherwise this many times what plain autograd in float32 is off by: two orders of summing differ by the sum of the
#: errors of both, and the error of the other order is one of the same distribution, up to twice as large in the worst
#: of many weights
ERRORS = 3.0

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Dense": (pb.models.Dense, pb.models.MeanFieldGuide, {}),
    "Rank1": (pb.models.Rank1, pb.models.Rank1Guide, {"components": 2}),
    "WeightSharing": (pb.models.WeightSharing, pb.models.CodebookGuide, {"codes": 8}),
    "SpikeSlab": (pb.models.SpikeSlab, pb.models.MeanFieldGuide, {}),
    "Bella": (pb.models.Bella, pb.models.ParticleGuide, {"particles": 2}),
}


@dataclass(frozen=True)
class Kind:
    """A network and its inputs.

    :param refused: models that refuse the network, with what the message says.
    :param select: models that need some layers left out, with the selection of the others.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    class_dim: int = 1
    output: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    select: Mapping[str, Callable[[str, nn.Parameter], bool]] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """Matrices that start at zero, as the head of a vision transformer, get values, as zeros give no gradients."""
        net = self.make()
        for parameter in net.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return net


def without(*parts: str) -> Callable[[str, nn.Parameter], bool]:
    """The weights, not biases, whose names have none of these parts."""
    return lambda name, p: p.dim() > 1 and not any(part in name for part in parts)


def in_float64(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: in_float64(value) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(in_float64(value) for value in x)
    return x.double() if x.is_floating_point() else x


@dataclass
class Gradients:
    """The outputs and the gradients of the latent sites, of the model and of plain autograd."""

    output: Tensor
    own: list[Tensor]
    plain_output: Tensor
    plain: list[Tensor]

    @property
    def largest(self) -> float:
        return max(float(g.abs().max()) for g in self.plain)


def gradients(
    model: Any,
    plain: nn.Module,
    kind: Kind,
    x: Any,
    rows: int,
    drawn: dict[str, Tensor],
    y: Callable[[torch.Size], Tensor],
) -> Gradients:
    """By the model, and by plain autograd on the weights that the draw stands for."""
    latents = {name: value.requires_grad_() for name, value in drawn.items()}
    differentiated = Differentiated(plain, kind, y, list(latents.values()))
    f = model.function(x, {name: value[None, None] for name, value in latents.items()}, rows)[0]
    weights = model.core().held(model.weights_of(latents))
    named = {f"plain.{name}": value for name, value in weights.items()}
    expected, found = functional_call(differentiated, named, (x,))
    return Gradients(f.detach(), differentiated.gradients(f), expected, found)


class Differentiated(nn.Module):
    """A network with its backward pass, in which layers with checkpointing run again and need the weights of a call."""

    def __init__(self, plain: nn.Module, kind: Kind, y: Callable[[torch.Size], Tensor], latents: list[Tensor]) -> None:
        super().__init__()
        self.plain, self.kind, self.y, self.latents = plain, kind, y, latents

    def forward(self, x: Any) -> tuple[Tensor, list[Tensor]]:
        out: Any = self.plain(**x) if isinstance(x, dict) else self.plain(*(x if isinstance(x, tuple) else (x,)))
        if self.kind.output is not None:
            out = out[self.kind.output]
        f = out if isinstance(out, Tensor) else out.logits
        return f.detach(), self.gradients(f)

    def gradients(self, outputs: Tensor) -> list[Tensor]:
        outputs = outputs.movedim(self.kind.class_dim, 1)
        loss = F.cross_entropy(outputs, self.y(outputs.shape[2:]))
        # the scales of priors are sites that no output depends on
        return list(torch.autograd.grad(loss, self.latents, allow_unused=True, materialize_grads=True))


def off(first: list[Tensor], second: list[Tensor], largest: float) -> float:
    """The largest difference, relative to the largest gradient."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(first, second, strict=True)) / largest


def require_gradients_of_plain_autograd(
    model: Any, guide: Any, kind: Kind, net: nn.Module, x: Any, rows: int, make_model: Callable[[nn.Module], Any]
) -> torch.Size:
    """In float64 to :data:`SAME_FUNCTION`, and in float32 to what float32 can do on this network.

    :returns: the axes of the labels behind that of the rows.
    """
    posterior = pb.Posterior(model.eval(), guide.eval())
    drawn = {name: value[0, 0].detach() for name, value in posterior.draws(1, seed=0).items()}
    plain = posterior.networks(1, seed=0)[0]
    labels: dict[torch.Size, Tensor] = {}

    def y(rest: torch.Size) -> Tensor:
        if rest not in labels:
            labels[rest] = torch.randint(0, CLASSES, (rows, *rest))
        return labels[rest]

    single = gradients(model, plain, kind, x, rows, drawn, y)
    doubled = {name: value.detach().double() for name, value in drawn.items()}
    exact_model = make_model(deepcopy(net).double()).eval()
    exact = gradients(exact_model, deepcopy(plain).double(), kind, in_float64(x), rows, doubled, y)

    assert torch.isfinite(exact.plain_output).all() and exact.largest > 0, "the network itself has no gradients here"
    largest_output = float(exact.plain_output.abs().max())
    assert off([exact.output], [exact.plain_output], largest_output) <= SAME_FUNCTION, "outputs in float64"
    assert off(exact.own, exact.plain, exact.largest) <= SAME_FUNCTION, "gradients in float64"

    own_error = off([single.plain_output], [exact.plain_output], largest_output)
    error = off(single.plain, exact.plain, exact.largest)
    output = off([single.output], [single.plain_output], largest_output)
    gradient = off(single.own, single.plain, exact.largest)
    assert output <= max(FLOAT32, ERRORS * own_error), (
        f"outputs in float32 differ by {output:.2g}, where plain float32 is off by {own_error:.2g}"
    )
    assert gradient <= max(FLOAT32, ERRORS * error), (
        f"gradients in float32 differ by {gradient:.2g}, where plain float32 is off by {error:.2g}"
    )
    return next(rest for rest in labels)


def whole_way(kind: Kind, model_name: str, tmp_path: Path, rows: int) -> None:
    """Gradients, a training step, predictions, files and ArviZ; or the refusal, before any of these."""
    cls, guide_class, options = MODELS[model_name]
    net, x = kind.network(), kind.inputs()

    def make_model(given: nn.Module) -> Any:
        likelihood = pb.likelihoods.Categorical(class_dim=kind.class_dim)
        return cls(given, likelihood, rows, select=kind.select.get(model_name), output=kind.output)

    if model_name in kind.refused:
        with pytest.raises((ValueError, RuntimeError), match=kind.refused[model_name]):
            pb.Posterior(made := make_model(net), guide_class(made, **options)).predict(x, num_samples=2, seed=0)
        return
    model = make_model(net)
    guide = guide_class(model, **options)
    label_axes = require_gradients_of_plain_autograd(model, guide, kind, net, x, rows, make_model)

    y = torch.randint(0, CLASSES, (rows, *label_axes))
    before = {name: value.detach().clone() for name, value in guide.named_parameters()}
    fitted = pb.inference.fit(model, guide, (x, y), epochs=1, batch_size=(rows + 1) // 2, progress=False, seed=0)
    assert any(not torch.equal(value, before[name]) for name, value in guide.named_parameters()), "nothing was trained"
    predicted = fitted.predict(x, num_samples=2, seed=0)
    assert torch.isfinite(predicted.outputs).all()
    fitted.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", kind.network())
    draws = loaded.draws(1, seed=0)
    assert all(torch.equal(draws[name], values) for name, values in fitted.draws(1, seed=0).items())
    # sums of large products round by where their tensors lie in memory, of one posterior twice too
    outputs = loaded.predict(x, num_samples=2, seed=0).outputs
    assert off([outputs], [predicted.outputs], float(predicted.outputs.abs().max())) <= FLOAT32, "predictions of a file"
    del loaded, draws
    shutil.rmtree(tmp_path / "p")  # pytest keeps folders of its last runs, and those of large networks are large
    data = pb.diagnostics.to_arviz(
        fitted, x, y, num_samples=2, groups=("posterior", "posterior_predictive", "log_likelihood"), seed=0
    )
    assert rows in data["log_likelihood"]["obs"].shape
    assert float(abs(data["log_likelihood"]["obs"]).max()) < float("inf")
