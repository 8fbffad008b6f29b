"""Kernels between particles against autograd of their formulas, in coordinates and in low-rank products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bnn.inference.stein.kernels import IMQ, RBF, Kernel, KernelSum, LinearKernel, ScaledMedian
from pyro_bnn.inference.stein.positions import Positions

H = 1.7
#: each kernel with its formula for two vectors; medians are those of the test's own distances
CASES: dict[str, tuple[Kernel, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "rbf": (RBF(H), lambda a, b, h: (-(a - b).square().sum() / H).exp()),
    "rbf, median": (RBF(), lambda a, b, h: (-(a - b).square().sum() / h).exp()),
    "rbf, scaled": (RBF(ScaledMedian(0.5)), lambda a, b, h: (-(a - b).square().sum() / (0.5 * h)).exp()),
    "rbf, function": (RBF(lambda d: d.max()), lambda a, b, h: (-(a - b).square().sum() / (LARGEST[0])).exp()),
    "imq": (IMQ(H), lambda a, b, h: (1 + (a - b).square().sum() / H) ** -0.5),
    "imq, median": (IMQ(exponent=1.5), lambda a, b, h: (1 + (a - b).square().sum() / h) ** -1.5),
    "linear": (LinearKernel(), lambda a, b, h: a @ b / len(a) + 1),
    "mixture": (
        KernelSum([RBF(H), LinearKernel(), IMQ()], [0.5, 2.0, 1.0]),
        lambda a, b, h: (
            0.5 * (-(a - b).square().sum() / H).exp()
            + 2 * (a @ b / len(a) + 1)
            + (1 + (a - b).square().sum() / h) ** -0.5
        ),
    ),
    "mixture, equal": (
        KernelSum([RBF(H), IMQ(H)]),
        lambda a, b, h: ((-(a - b).square().sum() / H).exp() + (1 + (a - b).square().sum() / H) ** -0.5) / 2,
    ),
}
LARGEST = [0.0]


def median(vectors: Tensor) -> float:
    """h from all pairs, written out."""
    n = len(vectors)
    pairs = sorted(float((vectors[i] - vectors[j]).square().sum()) for i in range(n) for j in range(i))
    LARGEST[0] = pairs[-1]
    middle = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
    return middle / math.log(n + 1)


def expected(
    formula: Callable[[Tensor, Tensor, float], Tensor],
    parts: list[Tensor],
    embed: Callable[[list[Tensor]], Tensor],
    own: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The Gram matrix, and sums over j of gradients in the first argument, by autograd and two loops."""
    n = len(parts[0])
    h = median(torch.stack([embed([p[i] for p in parts]) for i in range(n)]))
    gram = torch.empty(n, n, dtype=torch.float64)
    sums = [torch.zeros_like(p) for p in parts]
    for i in range(n):
        for j in range(n):
            at, other = (i, j) if own else (j, i)
            leaves = [p[at].clone().requires_grad_() for p in parts]
            k = formula(embed(leaves), embed([p[other] for p in parts]), h)
            gram[i, j] = k.detach()
            gradients = torch.autograd.grad(k, leaves, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total[i] += 0 if gradient is None else gradient
    return gram, sums


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_formula(name: str, own: bool) -> None:
    """Proves k and the sums of its gradients, at the particle itself and at the others, against autograd in float64,
    with coordinates in two tensors; an even and an odd number of pairs have their true medians."""
    kernel, formula = CASES[name]
    for n in (4, 3):
        torch.manual_seed(n)
        parts = [torch.randn(n, 5, dtype=torch.float64) + 3, torch.randn(n, 2, dtype=torch.float64)]
        points = Positions(parts)
        values = points.evaluate(kernel)
        found, pairs = points.gradients(values, own)
        gram, sums = expected(formula, parts, torch.cat, own)
        assert not pairs
        torch.testing.assert_close(values.value, gram, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, sums, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_products_are_never_formed_and_yet_exact(name: str, own: bool) -> None:
    """Proves distances, inner products and pulled-back gradients of ``scale B A`` against autograd on explicit
    products in float64, with two pairs of different ranks beside coordinates in no pair."""
    kernel, formula = CASES[name]
    n = 4
    torch.manual_seed(0)
    shapes = [(2, 6), (5, 2), (3, 4), (4, 3), (7,)]  # A, B, A, B, flat
    parts = [torch.randn(n, *shape, dtype=torch.float64) for shape in shapes]

    def embed(p: list[Tensor]) -> Tensor:
        return torch.cat([(0.5 * p[1] @ p[0]).flatten(), (2.0 * p[3] @ p[2]).flatten(), p[4]])

    points = Positions([parts[4]], [(parts[0], parts[1], 0.5), (parts[2], parts[3], 2.0)])
    explicit = torch.stack([embed([p[i] for p in parts]) for i in range(n)])
    torch.testing.assert_close(points.distances, torch.cdist(explicit, explicit).square(), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(points.products, explicit @ explicit.T, rtol=1e-12, atol=1e-12)
    assert points.dim == explicit.shape[1]
    values = points.evaluate(kernel)
    (flat,), pairs = points.gradients(values, own)
    gram, sums = expected(formula, parts, embed, own)
    torch.testing.assert_close(values.value, gram, rtol=1e-11, atol=1e-11)
    found = [*pairs[0], *pairs[1], flat]
    torch.testing.assert_close(found, sums, rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(made):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return made


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", [name for name in CASES if "function" not in name])
def test_memory_is_that_of_the_coordinates_and_of_the_pairs(name: str, own: bool) -> None:
    """Proves that no tensor has more elements than the coordinates or the pairs of particles: none is n x n x D, and
    the products of low-rank factors, a hundred times their size, are never formed."""
    n, rank, side = 20, 2, 400
    x, a, b = torch.randn(n, 3000), torch.randn(n, rank, side), torch.randn(n, side, rank)
    with Largest() as largest:
        points = Positions([x], [(a, b, 1.0)])
        points.gradients(points.evaluate(CASES[name][0]), own)
    assert 0 < largest.elements <= max(x.numel(), (n * rank) ** 2, n * rank * side)


def test_single_precision_far_from_the_origin() -> None:
    """Proves that nearby particles far from 0 keep their distances: float32 Gram matrices would lose them all."""
    torch.manual_seed(0)
    x = 1000 + 1e-2 * torch.randn(6, 300)
    points = Positions([x])
    truth = (x.double()[:, None] - x.double()).square().sum(-1)
    torch.testing.assert_close(points.distances, truth, rtol=1e-9, atol=0)
    (found,), _ = points.gradients(points.evaluate(RBF()), own=True)
    wide = Positions([x.double()])
    (exact,), _ = wide.gradients(wide.evaluate(RBF()), own=True)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("kernel", [RBF(), IMQ(), RBF(2.0), LinearKernel(), KernelSum([RBF(), IMQ(0.3)])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_coinciding_particles_and_a_single_one(kernel: Kernel, dtype: torch.dtype) -> None:
    """Proves that no bandwidth of 0 gives NaN, and that particles at one place do not move each other: all of them,
    most of them (a median of 0), or one alone; also as products with B = 0."""
    for same in (1, 4, 5):
        x = torch.full((same, 8), 0.3, dtype=dtype)
        if same == 4:
            x = torch.cat([torch.full_like(x[:1], 2.1), x])
        zero = torch.zeros(len(x), 3, 2, dtype=dtype), torch.zeros(len(x), 4, 3, dtype=dtype), 1.0
        points = Positions([x], [zero])
        values = points.evaluate(kernel)
        for own in (True, False):
            (flat,), ((a, b),) = points.gradients(values, own)
            assert flat.dtype == a.dtype == dtype
            assert all(bool(torch.isfinite(t).all()) for t in (*values[:2], flat, a, b))
            if not isinstance(kernel, LinearKernel):
                assert same == 4 or not flat.any()
                assert not a.any() and not b.any()
                torch.testing.assert_close(values.value.diagonal(), torch.ones(len(x), dtype=torch.float64))


def test_ranges() -> None:
    """Proves k = 1 at distance 0 and 0 < k < 1 beyond, symmetry, and positive semi-definite Gram matrices."""
    torch.manual_seed(0)
    points = Positions([torch.randn(9, 40)])
    for kernel in (RBF(), IMQ(), KernelSum([RBF(), IMQ(2.0)])):
        k = points.evaluate(kernel).value
        off = k[~torch.eye(9, dtype=torch.bool)]
        assert bool((off > 0).all() and (off < 1).all()) and torch.equal(k, k.T)
        assert float(torch.linalg.eigvalsh(k)[0]) > 0
        assert bool((points.evaluate(kernel).by_distance < 0).all())


@pytest.mark.parametrize("dim", [10, 100_000])
def test_the_median_rule_holds_in_any_dimension(dim: int) -> None:
    """Proves that the typical pair has k = 1 / (n + 1), in 1e5 coordinates as in 10: the repulsion does not vanish."""
    torch.manual_seed(0)
    points = Positions([torch.randn(5, dim)])
    k = points.evaluate(RBF()).value
    row, column = torch.triu_indices(5, 5, 1)
    logs = k[row, column].log().sort().values
    assert float(logs[4:6].mean()) == pytest.approx(-math.log(6), rel=1e-9)
    if dim > 10:
        assert float(logs[-1] - logs[0]) < 0.1, "distances concentrate"


def test_convolutions_have_factors_with_kernels() -> None:
    """Proves that A ``[r, in, h, w]`` and B ``[out, r, 1, 1]`` are matrices once flattened, as the engine does."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64), torch.randn(3, 5, 2, 1, 1, dtype=torch.float64)
    points = Positions([], [(a.flatten(2), b.flatten(2), 1.5)])
    explicit = torch.einsum("nor,nrihw->noihw", b[..., 0, 0], 1.5 * a).flatten(1)
    torch.testing.assert_close(points.products, explicit @ explicit.T)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBF(0.0), "bandwidth=0.0: expected a positive number"),
        (lambda: RBF(float("nan")), "bandwidth=nan"),
        (lambda: IMQ("mean"), "bandwidth='mean': expected 'median'"),
        (lambda: IMQ(exponent=-1.0), "exponent=-1.0"),
        (lambda: ScaledMedian(0.0), "factor=0.0"),
        (lambda: KernelSum([]), "expected one kernel or more"),
        (lambda: KernelSum([RBF()], [1.0, 2.0]), "expected 1 numbers"),
        (lambda: KernelSum([RBF(), IMQ()], [0.0, 0.0]), "not all of them 0"),
        (lambda: KernelSum([RBF(), IMQ()], [1.0, -1.0]), "of at least 0"),
    ],
)
def test_numbers_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_same_product_of_other_factors_is_the_same_place() -> None:
    """Proves that B Q and Q' A, with Q orthogonal, are at distance 0 from B and A, whatever is left by rounding: under
    the tiny bandwidth of particles that coincide, rounding would become a force."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    turns = [torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] for _ in range(6)]
    points = Positions([], [(torch.stack([q.T @ a for q in turns]), torch.stack([b @ q for q in turns]), 2.0)])
    assert not bool(points.distances.any())
    for own in (True, False):
        _, ((of_a, of_b),) = points.gradients(points.evaluate(RBF()), own=own)
        assert float(of_a.abs().max()) < 1e-9 and float(of_b.abs().max()) < 1e-9


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kernel", [RBF(), LinearKernel()])
def test_sums_over_a_few_columns_at_a_time(own: bool, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances and gradients do not depend on how many coordinates are worked on at a time."""
    x = torch.randn(6, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for columns in (100, 4):
        monkeypatch.setattr("pyro_bnn.inference.stein.positions.COLUMNS", columns)
        points = Positions([x])
        (gradient,), _ = points.gradients(points.evaluate(kernel), own)
        found.append((points.distances, gradient))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
