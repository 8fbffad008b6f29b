"""Networks that decide in Python on values that their weights have a part in: every member decides for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb

N = 6


class Deciding(nn.Module):
    """Between two layers stands something that is decided; ``seen`` has what was decided in each pass."""

    def __init__(self, between: Callable[[Tensor, list[object]], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between, self.seen = nn.Linear(3, 4), nn.Linear(4, 2), between, list[object]()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), self.seen))


def branch(h: Tensor, seen: list[object]) -> Tensor:
    seen.append(bool(h.sum() > 2))
    return h.tanh() if seen[-1] else 3 * h


def any_large(h: Tensor, seen: list[object]) -> Tensor:
    seen.append(bool((h.amax(1) > 2).any()))
    return h.tanh() if seen[-1] else h


def until_small(h: Tensor, seen: list[object]) -> Tensor:
    steps = 0
    while h.abs().mean() > 0.5:
        h, steps = h / 2, steps + 1
    seen.append(steps)
    return h


def scaled(h: Tensor, seen: list[object]) -> Tensor:
    seen.append(h.abs().max().item())
    return h / float(seen[-1])  # type: ignore[arg-type]


def listed(h: Tensor, seen: list[object]) -> Tensor:
    means = h.mean(0).tolist()
    seen.append(tuple(means))
    return h * (1 if means[0] > means[1] else -1)


def written(h: Tensor, seen: list[object]) -> Tensor:
    out = torch.zeros(h.shape, dtype=h.dtype)
    out[:, :2] = h[:, :2]
    seen.append(bool(out.mean() > 0))
    return out if seen[-1] else -2 * out


def row_by_row(h: Tensor, seen: list[object]) -> Tensor:
    chosen = [bool(row.sum() > 0) for row in h]
    seen.append(tuple(chosen))
    return torch.stack([row if c else -row for row, c in zip(h, chosen, strict=True)])


BETWEEN = [branch, any_large, until_small, scaled, listed, written, row_by_row]


def rank1(net: nn.Module) -> tuple[Any, Any]:
    model = pb.models.Rank1(net, pb.likelihoods.Categorical(), N)
    return model, pb.models.Rank1Guide(model, components=8)


def bella(net: nn.Module) -> tuple[Any, Any]:
    model = pb.models.Bella(net, pb.likelihoods.Categorical(), N)
    return model, pb.models.ParticleGuide(model, particles=8)


def spread_out(guide: nn.Module) -> None:
    """Members are from nearly the given network to far from it."""
    with torch.no_grad():
        for p in guide.parameters():
            assert len(p) == 8
            p.add_(torch.linspace(0.1, 1.5, 8).view(-1, *[1] * (p.dim() - 1)) * torch.randn_like(p))


@pytest.mark.parametrize("make", [rank1, bella])
@pytest.mark.parametrize("between", BETWEEN)
def test_each_member_decides_for_itself(between: Callable[..., Tensor], make: Callable[..., Any]) -> None:
    """Proves that predictions of members that decide differently are those of their plain networks, and that it is said
    that they run one by one."""
    torch.manual_seed(0)
    model, guide = make(Deciding(between).double())
    spread_out(guide)
    x, net = torch.randn(N, 3, dtype=torch.double), model.core().net
    posterior = pb.Posterior(model, guide)
    with pytest.warns(UserWarning, match="members run one by one, because each may decide differently"):
        f = posterior.predict(x, num_samples=2, seed=0).outputs
    draws = posterior.draws(2, seed=0)
    net.seen.clear()
    for i in range(f.shape[0]):
        for m in range(f.shape[1]):
            weights = model.weights_of({name: value[i, m] for name, value in draws.items()})
            expected = functional_call(net, dict(net.named_parameters()) | weights, (x,))
            torch.testing.assert_close(f[i, m], expected, rtol=1e-10, atol=1e-10)
    assert len(set(net.seen)) > 1, "all members decide alike: the test shows nothing"


@pytest.mark.parametrize("make", [rank1, bella])
def test_gradients_are_those_of_members_that_decide_for_themselves(make: Callable[..., Any]) -> None:
    """Proves it against plain autograd on explicit weights, in float64."""
    torch.manual_seed(0)
    model, guide = make(Deciding(branch).double())
    spread_out(guide)
    x, net = torch.randn(N, 3, dtype=torch.double), model.core().net
    draws = {n: v[0].requires_grad_() for n, v in pb.Posterior(model, guide).draws(1, seed=0).items()}
    lead = (-1,) + (1,) * (-model.members_dim - 1)
    latents = {n: v.reshape(lead + v.shape[1:]) for n, v in draws.items()}
    model.function(x, latents, N).square().sum().backward()
    found = {n: v.grad.clone() for n, v in draws.items() if v.grad is not None}
    for v in draws.values():
        v.grad = None
    net.seen.clear()
    for m in range(8):
        weights = model.weights_of({n: v[m] for n, v in draws.items()})
        functional_call(net, dict(net.named_parameters()) | weights, (x,)).square().sum().backward()
    assert set(net.seen) == {True, False}
    assert found.keys() == {n for n, v in draws.items() if v.grad is not None} and len(found) >= 4
    for name, grad in found.items():
        torch.testing.assert_close(grad, draws[name].grad, rtol=1e-10, atol=1e-12)


def test_decisions_on_inputs_alone_keep_members_in_one_pass() -> None:
    """Proves that the network runs once for all members where weights have no part in what is decided."""

    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.passes = nn.Linear(3, 2), list[int]()

        def forward(self, x: Tensor) -> Tensor:
            self.passes.append(len(x))
            if not bool(torch.isfinite(x).all()):
                raise ValueError("not finite")
            return self.a(x)

    model, guide = rank1(Checked())
    posterior, x = pb.Posterior(model, guide), torch.randn(N, 3)
    posterior.predict(x, num_samples=2, seed=0)
    passes = model.core().net.passes
    passes.clear()
    posterior.predict(x, num_samples=2, seed=0)
    assert passes == [2 * 8 * N]
