"""What evaluation leaves behind: nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_bnn.modes import RunningStatistics, evaluating, frozen
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


def test_statistics_of_several_passes_move_once_to_their_mean() -> None:
    """Proves that every pass starts from the same statistics, which move to the mean of where the passes took them, and
    that a graph of an earlier pass keeps its gradients."""
    norm = nn.BatchNorm1d(3)
    with torch.no_grad():
        norm.running_mean.fill_(5.0)
    batches = [torch.randn(8, 3) + 2 * k for k in range(3)]
    start, same = norm.running_mean.clone(), list(norm.buffers())
    ends = []
    for x in batches:
        alone = nn.BatchNorm1d(3)
        alone.load_state_dict(norm.state_dict())
        alone(x)
        ends.append([b.clone() for b in alone.buffers()])
    statistics = RunningStatistics([norm])
    losses = []
    for x in batches:
        with statistics.one_pass():
            losses.append(norm(x).square().sum())
        assert torch.equal(norm.running_mean, start)
    statistics.average()
    torch.stack(losses).sum().backward()
    assert norm.weight.grad is not None and bool(norm.weight.grad.isfinite().all())
    for now, buffer, *moved in zip(norm.buffers(), same, *ends, strict=True):
        assert now is buffer
        mean = torch.stack(moved).mean(0) if buffer.is_floating_point() else moved[0]
        assert torch.equal(now, mean)
    assert int(norm.num_batches_tracked) == 1 and not torch.equal(norm.running_mean, start)


def test_a_pass_that_fails_counts_for_nothing() -> None:
    norm = nn.BatchNorm1d(3)
    statistics = RunningStatistics([norm])
    with pytest.raises(ZeroDivisionError), statistics.one_pass():
        norm(torch.randn(4, 3))
        raise ZeroDivisionError
    assert int(norm.num_batches_tracked) == 0
    with statistics.one_pass():
        norm(torch.ones(4, 3))
    statistics.average()
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 0.1))
