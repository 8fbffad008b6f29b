"""When a function is replayed as a graph: what are its inputs, what forbids a recording, and what drops one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.recording.recorded import MAX_GRAPHS, Recorded

X = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]])


class Counting(nn.Module):
    """A layer that keeps in Python how often it ran, and lets that change what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return x * self.passes


def recorded(net: nn.Module, capture: Any = True) -> Recorded:
    return Recorded(lambda x: (net(x),), "the network", capture, programs=[net])


def test_parameters_and_buffers_are_those_of_now() -> None:
    """Proves that one graph follows an optimiser, and moves running statistics as the network itself does."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    twin.load_state_dict(net.state_dict())
    run = recorded(net)
    for step in range(3):
        (found,) = run(X + step) or (None,)
        torch.testing.assert_close(found, twin(X + step).detach())
        for one in (net, twin):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.mul_(1.5)
    for ours, true in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, true)
    assert len(run) == 1


def test_each_form_has_a_graph_and_no_more() -> None:
    """Proves that shapes, dtypes, numbers of Python and frozen parameters are forms, and that there is a limit."""
    net = nn.Linear(3, 1)
    run = Recorded(lambda x, factor: (net(x) * factor,), "the network", True, programs=[net])
    for x, factor in ((X, 1), (X, 1), (X[:1], 1), (X[:1], 2), (X + 1, 2)):
        (found,) = run(x, factor) or (None,)
        torch.testing.assert_close(found, net(x).detach() * factor)
    assert len(run) == 4 - 1 + 1
    net.weight.requires_grad_(False)
    run(X, 1)
    assert len(run) == 5
    for i in range(MAX_GRAPHS):
        run(X, 10 + i)
    assert len(run) == MAX_GRAPHS and run(X, 50) is None and run.is_on


def test_autocast_is_a_form() -> None:
    """Proves that a graph of full precision is not replayed where half is asked for."""
    net = nn.Linear(3, 1)
    run = recorded(net)
    run(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = run(X) or (None,)
    assert len(run) == 2 and found is not None and found.dtype == torch.bfloat16


def of_python(x: Tensor) -> Tensor:
    return x * random.random()


def of_numpy(x: Tensor) -> Tensor:
    return x * float(np.random.random())  # noqa: NPY002  as legacy code draws


@pytest.mark.parametrize("draw", [of_python, of_numpy], ids=["random", "numpy"])
def test_random_numbers_of_python_forbid_a_recording(draw: Callable[[Tensor], Tensor]) -> None:
    """Proves that a draw that torch does not make cannot become a constant."""
    net = nn.Linear(3, 1)
    run = Recorded(lambda x: (draw(net(x)),), "the network", "auto", programs=[net])
    with pytest.warns(UserWarning, match="draws random numbers of Python or NumPy"):
        assert run(X) is None
    assert not run.is_on


def test_numbers_that_a_module_changes_forbid_a_recording() -> None:
    """Proves that a layer that counts its passes runs itself."""
    with pytest.warns(UserWarning, match="changes a number that a module keeps"):
        assert recorded(Counting(), "auto")(X) is None
    with pytest.raises(Exception, match="changes a number that a module keeps"):
        recorded(Counting())(X)


def test_what_changes_between_calls_is_noticed() -> None:
    """Proves that a graph is compared with the function at calls 2, 4, 8 and every ``verify_every``, and dropped."""
    net = nn.Dropout(0.0)
    run = Recorded(lambda x: (net(x),), "the network", "auto", programs=[net], verify_every=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            assert run(X) is not None
        net.p = 1.0
        assert run(X) is not None  # the ninth call
    with pytest.warns(UserWarning, match="is not what it was when it was recorded"):
        assert run(X) is None


class Halving(nn.Module):
    """A network that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        f: Tensor = self.layer(x.mul_(0.5))
        return f


def test_an_input_is_written_into_once_a_call() -> None:
    """Proves that recording and comparing work on copies, and that a replay writes as the network does."""
    net, x = Halving(), X.clone()
    run = Recorded(lambda x: (net(x),), "the network", True, programs=[net], verify_every=1)
    for i in range(1, 4):
        (found,) = run(x) or (None,)
        assert torch.equal(x, X * 0.5**i)
        torch.testing.assert_close(found, net.layer(x).detach())


def test_a_comparison_leaves_no_trace() -> None:
    """Proves that recording and verifying draw no random numbers of the caller, and move no statistics."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    run = recorded(net)
    torch.manual_seed(0)
    run(X)  # records
    run.verify(X)
    mean, state = net[0].running_mean.clone(), torch.get_rng_state()  # type: ignore[union-attr, operator]
    run.verify(X)
    assert torch.equal(net[0].running_mean, mean) and torch.equal(torch.get_rng_state(), state)  # type: ignore[arg-type]
    torch.testing.assert_close(mean, 0.1 * X.mean(0))  # one pass, that of the only call
