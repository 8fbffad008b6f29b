"""Noise: its law over pieces, shares and threads, and what it is drawn from."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from pyro_bnn.inference.sgmcmc.noise import DEVICE_PIECE, PIECE, SHARE, Noise

SIZE = 2 * SHARE + 3 * PIECE + 5


def drawn(size: int, seed: int = 0, calls: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    noise, buffer = Noise(torch.empty(size)), torch.zeros(size)
    for _ in range(calls):
        noise.add_to(buffer, 0.5)
    return buffer


@pytest.mark.parametrize("size", [7, PIECE + 1, SIZE])
def test_it_is_standard_normal(size: int) -> None:
    """KS of the whole; the variance of two calls adds up, so that they are independent; no piece repeats another."""
    one, two = drawn(size), drawn(size, 1, calls=2)
    assert stats.kstest(one.numpy() / 0.5, "norm").pvalue > 0.01
    assert float(two.double().square().mean()) == pytest.approx(0.5, abs=4 * 0.5 * (2 / size) ** 0.5)
    starts = one[::PIECE]
    assert len(starts.unique()) == len(starts)


def test_the_law_of_every_share() -> None:
    """Mean and variance of each thousand of pieces, by chi-squared over all of them."""
    xi = drawn(SIZE)[: 2 * SHARE].double().view(-1, 1024) / 0.5
    means, squares = xi.mean(-1) * 32, xi.square().sum(-1)
    assert stats.kstest(means.numpy(), "norm").pvalue > 0.01
    assert stats.kstest(squares.numpy(), stats.chi2(1024).cdf).pvalue > 0.01


@pytest.mark.parametrize("size", [7, PIECE + 1, SIZE])
def test_what_is_kept_is_what_was_added(size: int) -> None:
    torch.manual_seed(0)
    noise, start, kept = Noise(torch.empty(size)), torch.randn(size), torch.empty(size)
    buffer = start.clone()
    noise.add_to(buffer, 0.3, kept)
    torch.testing.assert_close(buffer, start + 0.3 * kept)
    assert float(kept.std()) == pytest.approx(1, abs=1.2 if size < 10 else 0.02)


def test_it_depends_on_the_seed_alone() -> None:
    """Not on how many threads draw."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(drawn(SIZE, 3, calls=2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], drawn(SIZE, 4, calls=2))


def test_rows_of_chains() -> None:
    buffer = torch.zeros(3, 5, dtype=torch.float64)
    Noise(buffer).add_to(buffer, 1.0)
    assert len(buffer.unique()) == 15


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_draws_its_own() -> None:
    size = DEVICE_PIECE + 7
    buffer = torch.zeros(size, device="cuda")
    Noise(buffer).add_to(buffer, 2.0)
    assert float(buffer.std()) == pytest.approx(2, rel=0.01) and len(buffer[::DEVICE_PIECE].unique()) == 2
