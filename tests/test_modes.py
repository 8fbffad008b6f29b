"""What evaluation leaves behind: nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_bnn.modes import evaluating, frozen
from pyro_bnn.randomness import derive_seeds, seeded


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[0].eval()
    net[2].bias.requires_grad_(False)
    return net


def test_modes_and_buffers_are_put_back_whatever_happens_inside() -> None:
    net = network()
    buffers, values = list(net.buffers()), [buffer.clone() for buffer in net.buffers()]
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(part.training for part in net.modules())
        net[1].train()
        net(torch.randn(5, 2))
        assert not torch.equal(net[1].running_mean, values[0])
        raise ZeroDivisionError
    assert [part.training for part in net.modules()] == [True, False, True, True]
    for now, before, value in zip(net.buffers(), buffers, values, strict=True):
        assert now is before and torch.equal(now, value)


def test_a_graph_from_before_keeps_its_gradients() -> None:
    """Proves that buffers are not written in place, which a pass with gradients still to come would not survive."""
    net = network().eval()
    y = net(torch.randn(5, 2)).sum()
    with evaluating(net):
        net[1].train()
        net(torch.randn(5, 2))
    y.backward()
    assert net[0].weight.grad is not None


def test_what_took_a_gradient_takes_one_again() -> None:
    net = network()
    before = [p.requires_grad for p in net.parameters()]
    with frozen(net):
        assert not any(p.requires_grad for p in net.parameters()) and not net.training
    assert [p.requires_grad for p in net.parameters()] == before and not all(before) and net.training
    with frozen(lambda x: x):  # a program that is a function has nothing to freeze
        pass


def test_seeds_leave_no_trace() -> None:
    before = torch.get_rng_state()
    with seeded(torch.device("cpu"), 3):
        first = torch.randn(2)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(torch.device("cpu"), 3):
        assert torch.equal(torch.randn(2), first)
    with seeded(torch.device("cpu"), None):
        torch.randn(1)
    assert not torch.equal(torch.get_rng_state(), before)
    assert derive_seeds(None, 2) == [None, None] and len(set(derive_seeds(1, 50))) == 50
