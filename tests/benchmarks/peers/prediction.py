"""Prediction, evaluation, and what happens before and between the steps of ``fit``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from tests.benchmarks.evaluating import BATCH, posteriors
from tests.benchmarks.peers.mean_field import by_hand
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build, Seconds
from tests.benchmarks.peers.tasks import adamw, chain, wide
from tests.benchmarks.training_step import COMPARED, NUM_DATA, Step, stepper

DEPTH, DRAWS = 160, 32


def deep_chain() -> nn.Module:
    return chain(DEPTH)


def few_rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 16)


def many_rows() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1000, 784)


Net = Callable[[], nn.Module]
Rows = Callable[[], Tensor]


def plain(net: Net, rows: Rows) -> Step:
    """One pass."""
    made, x = net().eval(), rows()
    return torch.no_grad()(lambda: made(x).softmax(-1))


def posterior_of(form: str, net: Net) -> pb.Posterior:
    likelihood = pb.likelihoods.Categorical()
    if form == "Dense":
        dense = pb.models.Dense(net(), likelihood, NUM_DATA)
        return pb.Posterior(dense, pb.models.MeanFieldGuide(dense))
    rank1 = pb.models.Rank1(net(), likelihood, NUM_DATA)
    return pb.Posterior(rank1, pb.models.Rank1Guide(rank1, 1))


def ours(form: str, net: Net, rows: Rows, draws: int, compiles: bool = False) -> Step:
    posterior, x = posterior_of(form, net), rows()
    step: Step = lambda: posterior.predict(x, num_samples=draws).probs  # noqa: E731
    if compiles:
        posterior.compile()
        for _ in range(COMPARED):
            step()
    return step


def loop(net: Net, rows: Rows, draws: int) -> Step:
    """One draw of a mean field by hand after the other, whose probabilities are added up."""
    made, x = by_hand(net()).net.eval(), rows()

    @torch.no_grad()
    def run() -> Tensor:
        total = torch.zeros(())
        for _ in range(draws):
            total = total + made(x).softmax(-1)
        return total / draws

    return run


def laplace(net: Net, rows: Rows, draws: int) -> Step:
    """Draws from a diagonal Laplace approximation of all weights."""
    from laplace import Laplace

    x = rows()
    few = x[:1]  # the fit, whose gradients of each row take memory, is no part of prediction
    made = Laplace(net(), "classification", subset_of_weights="all", hessian_structure="diag")
    classes = made.model(few).shape[-1]
    made.fit(DataLoader(TensorDataset(few, torch.randint(classes, (len(few),))), batch_size=len(few)))
    return lambda: made(x, pred_type="nn", link_approx="mc", n_samples=draws)


def ways(net: Net, rows: Rows, draws: int) -> dict[str, Build]:
    found: dict[str, Build] = {PLAIN: partial(plain, net, rows)}
    found |= {f"{OURS}, {form}": partial(ours, form, net, rows, draws) for form in ("Dense", "Rank1")}
    if net is deep_chain:
        found |= {f"{OURS}, {f}, {COMPILED}": partial(ours, f, net, rows, draws, True) for f in ("Dense", "Rank1")}
    found |= {"a loop by hand, mean field": partial(loop, net, rows, draws)}
    return found | {"laplace-torch, diagonal": partial(laplace, net, rows, draws)}


def evaluated(name: str) -> dict[str, Step]:
    """``predict``, ``evaluate`` and ``check`` of one posterior on the same rows, in the same batches."""
    posterior = posteriors()[name]
    x, y = torch.randn(10 * BATCH, 784), torch.randint(10, (10 * BATCH,))
    settings: dict[str, Any] = {"num_samples": 16, "batch_size": BATCH, "seed": 0}
    return {
        "predict": lambda: posterior.predict(x, **settings).probs,
        "evaluate": lambda: pb.diagnostics.evaluate(posterior, (x, y), **settings),
        "check": lambda: pb.diagnostics.check(posterior, (x, y), **settings),
    }


def one_pass() -> dict[str, Step]:
    """What stands for a plain step: a pass over the same rows."""
    return {"step": plain(wide, partial(torch.randn, 10 * BATCH, 784))}


EVALUATION_WAYS: dict[str, Build] = {
    PLAIN: one_pass,
    **{f"{OURS}, {name}": partial(evaluated, name) for name in ("Dense", "Rank1, 4 components")},
}


# ------------------------------------------------------------------------------------------------------------- fit

SIZE, SMALL_BATCH = 1280, 64
#: epochs of a short and of a long run, whose difference has no start
SHORT, LONG = 5, 15
#: a compiled run starts with seconds of compilation, which may differ by more than 10 epochs take
LONG_COMPILED = 505


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 50), nn.ReLU(), nn.Linear(50, 10))


def small_data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(SIZE, 16), torch.randint(10, (SIZE,))


def of_both_lengths(train: Callable[[int], Any], long: int = LONG) -> dict[str, Step]:
    """Runs by their number of epochs."""
    return {str(epochs): partial(train, epochs) for epochs in (SHORT, long)}


def seconds_a_step(own: Seconds) -> float:
    short, long = sorted(own, key=int)
    return (own[long] - own[short]) / ((int(long) - int(short)) * SIZE // SMALL_BATCH)


def fit_over_plain(own: Seconds, reference: Seconds) -> float:
    return seconds_a_step(own) / seconds_a_step(reference)


def milliseconds_a_step(own: Seconds, _: Seconds) -> float:
    return 1e3 * seconds_a_step(own)


def fitted(**training: Any) -> dict[str, Step]:
    model = pb.models.Dense(small_net(), pb.likelihoods.Categorical(), SIZE)
    guide, data = pb.models.MeanFieldGuide(model), small_data()
    settings: dict[str, Any] = {"batch_size": SMALL_BATCH, "progress": False, **training}
    return of_both_lengths(
        lambda epochs: pb.inference.fit(model, guide, data, epochs=epochs, **settings),
        LONG_COMPILED if training else LONG,
    )


def looped(mean_field: bool) -> dict[str, Step]:
    """A loop by hand, which keeps the losses as ``fit`` does."""
    x, y = small_data()
    net: nn.Module = small_net()
    kl: Callable[[], Tensor] = partial(torch.zeros, ())
    if mean_field:
        made = by_hand(net)
        net, kl = made.net, made.kl[""]
    optimizer = adamw(net.parameters())

    def train(epochs: int) -> list[float]:
        losses = []
        for _ in range(epochs):
            for rows in torch.randperm(SIZE).split(SMALL_BATCH):
                optimizer.zero_grad(set_to_none=True)
                pred = net(x[rows])
                loss = F.cross_entropy(pred, y[rows]) + kl() / SIZE
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    return of_both_lengths(train)


FIT_WAYS: dict[str, Build] = {
    PLAIN: partial(looped, False),
    OURS: fitted,
    f"{OURS}, {COMPILED}": partial(fitted, compile=True),
    "by hand, mean field": partial(looped, True),
}


def image_rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 3, 64, 64), torch.randint(10, (16,))


def deep_images() -> nn.Module:
    net: nn.Module = torchvision.models.resnet50(num_classes=10)
    return net


def deep_plain() -> Step:
    net, (x, y) = deep_images(), image_rows()
    return stepper(adamw(net.parameters()), lambda: F.cross_entropy(net(x), y))


def started() -> dict[str, Step]:
    """Building a rank-1 network, and building it and ``fit`` up to the end of its first and of its second step."""
    data = image_rows()

    def build() -> tuple[Any, Any]:
        model = pb.models.Rank1(deep_images(), pb.likelihoods.Categorical(), len(data[1]))
        return model, pb.models.Rank1Guide(model, 1)

    def fit(steps: int) -> None:
        pb.inference.fit(*build(), data, epochs=steps, batch_size=len(data[1]), progress=False)

    return {"build": build, "build, one step": partial(fit, 1), "build, two steps": partial(fit, 2)}


def start_in_seconds(own: Seconds, _: Seconds) -> float:
    """What ``fit`` does before its first step, by which that is slower than the second, and at its end."""
    return 2 * own["build, one step"] - own["build, two steps"] - own["build"]


def start_over_plain(own: Seconds, reference: Seconds) -> float:
    return start_in_seconds(own, reference) / reference["step"]


START_WAYS: dict[str, Build] = {PLAIN: deep_plain, OURS: started}


# ------------------------------------------------------------------------------------------------------- processes


def python(*arguments: str) -> Step:
    """A new process; of the checkout that this one runs."""
    command = [sys.executable, "-P", *arguments]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def seconds(own: Seconds, _: Seconds) -> float:
    return own["step"]


PROCESS_WAYS: dict[str, Build] = {
    PLAIN: partial(python, "-c", "import torch"),
    f"{OURS}, pyro-bnn --help": partial(python, "-m", "pyro_bnn", "--help"),
    f"{OURS}, import pyro_bnn": partial(python, "-c", "import pyro_bnn"),
    f"{OURS}, import pyro_bnn.inference": partial(python, "-c", "import pyro_bnn.inference"),
    "import pyro, torch": partial(python, "-c", "import pyro, torch"),
}
