"""What a perturbed network must agree with: the plain network, run once for each row with that row's weights in it.

Nothing in this file uses the rules, the probe or `Rank1Factors.explicit`.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bnn.network import Network
from pyro_bnn.perturb import LowRankFactors, Perturbation, Rank1Factors, Replacement

TOLERANCE = 1e-10  # relative, float64
VISIBLE = 1e-6  # the relative change that every perturbation must cause, or the comparison would show nothing

#: sizes of the first two axes of a perturbation
DRAWS: dict[str, Callable[[int, int], tuple[int, int]]] = {
    "row": lambda members, rows: (members, rows),
    "member": lambda members, rows: (members, 1),
    "sample": lambda members, rows: (1, rows),
    "shared": lambda members, rows: (1, 1),
}


def outer(weight: Tensor, r: Tensor, s: Tensor, groups: int = 1) -> Tensor:
    """W o (r s^T): r over dimension 0, s over dimension 1 of W (in every group, or through all groups)."""
    if s.numel() == weight.shape[1]:
        s = s.repeat(groups)
    blocks = weight.unflatten(0, (groups, -1))
    scaled = torch.einsum("goi...,go,gi->goi...", blocks, r.reshape(groups, -1), s.reshape(groups, -1))
    return scaled.flatten(0, 1)


def owner_of(net: nn.Module, name: str) -> nn.Module:
    return net.get_submodule(name.rpartition(".")[0])


def groups_of(net: nn.Module, name: str) -> int:
    return int(getattr(owner_of(net, name), "groups", 1))


def row_weights(net: nn.Module, perturbations: dict[str, Perturbation], member: int, row: int) -> dict[str, Tensor]:
    """The perturbed parameters as one row of one member has them."""
    parameters = dict(net.named_parameters())

    def pick(values: Tensor) -> Tensor:
        return values[min(member, values.shape[0] - 1), min(row, values.shape[1] - 1)]

    def own(name: str, p: Perturbation) -> Tensor:
        if isinstance(p, Replacement):
            return pick(p.value).view_as(parameters[name])
        if isinstance(p, LowRankFactors):
            a, b = (factor[min(member, factor.shape[0] - 1)] for factor in (p.A, p.B))
            return parameters[name] + p.scale * torch.einsum("or,r...->o...", b, a)
        return outer(parameters[name], pick(p.r), pick(p.s), groups_of(net, name))

    weights = {name: own(name, p) for name, p in perturbations.items()}
    for name in weights:
        owner, _, leaf = name.rpartition(".")
        padding = getattr(net.get_submodule(owner), "padding_idx", None) if leaf == "weight" else None
        if (
            padding is not None
            and sum(q is parameters[name] for _, q in net.named_parameters(remove_duplicate=False)) == 1
        ):
            weights[name][padding] = parameters[name][padding].detach()  # the row for padding is not perturbed
    return weights


def call(net: nn.Module, x: Any) -> Any:
    return net(**x) if isinstance(x, dict) else net(*x) if isinstance(x, (tuple, list)) else net(x)


def sample(x: Any, size: int, row: int) -> Any:
    """One sample of x, as a batch of one."""
    return pytree.tree_map(
        lambda leaf: leaf[row : row + 1] if isinstance(leaf, Tensor) and leaf.shape[:1] == (size,) else leaf, x
    )


def row_by_row(
    net: nn.Module, x: Any, size: int, perturbations: dict[str, Perturbation], members: int, output: Any = None
) -> Tensor:
    """``[members, size, ...]``, every row from a run of its own."""
    results = []
    alone = copy.deepcopy(net)
    parameters = dict(alone.named_parameters())
    with torch.no_grad():
        for member in range(members):
            for row in range(size):
                for name, weight in row_weights(net, perturbations, member, row).items():
                    parameters[name].copy_(weight)
                y = call(alone, sample(x, size, row))
                results.append((y if output is None else output(y))[0])
    return torch.stack(results).unflatten(0, (members, size))


def relative(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference in every row, ``[members, rows]``, relative to the largest entry of b in that row."""
    a, b = (t.flatten(2) if t.dim() > 2 else t.unsqueeze(-1) for t in (a, b))
    return (a - b).abs().amax(-1) / b.abs().amax(-1)


def parameters_of(net: nn.Module, skip: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The names of all parameters that factors, and of all that vectors of a member's own, can perturb."""
    names = {name: p for name, p in net.named_parameters() if name not in skip}
    return [n for n, p in names.items() if p.dim() > 1], [n for n, p in names.items() if p.dim() == 1]


def perturb(
    net: nn.Module,
    weights: list[str],
    biases: list[str],
    members: int,
    rows: int,
    draws: str = "row",
    seed: int = 0,
    sizes: tuple[float, float] = (1.2, 1.8),
    signs: bool = True,
) -> dict[str, Perturbation]:
    """Factors of these sizes for the weights (no product of two is 1 by default), other values for the biases."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    lead = DRAWS[draws](members, rows)

    def uniform(n: int) -> Tensor:
        size = torch.empty(*lead, n, dtype=torch.float64).uniform_(*sizes, generator=generator)
        return size * (torch.rand(size.shape, generator=generator) - 0.5).sign() if signs else size

    perturbations: dict[str, Perturbation] = {}
    for name in weights:
        out, into = parameters[name].shape[:2]
        perturbations[name] = Rank1Factors(uniform(out), uniform(into * groups_of(net, name)))
    for name in biases:
        perturbations[name] = Replacement(
            parameters[name].detach().flatten() + uniform(parameters[name].numel()) - sum(sizes) / 4
        )
    return perturbations


def perturb_low_rank(
    net: nn.Module, weights: list[str], members: int, rank: int = 2, scale: float = 0.7, seed: int = 0
) -> dict[str, Perturbation]:
    """A and B whose product has entries of about the size that initialisation gives to a weight."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(net.named_parameters())
    perturbations: dict[str, Perturbation] = {}
    for name in weights:
        out, *rest = parameters[name].shape
        a = torch.randn(members, rank, *rest, dtype=torch.float64, generator=generator)
        b = torch.randn(members, out, rank, dtype=torch.float64, generator=generator)
        perturbations[name] = LowRankFactors(a / a[0, 0].numel() ** 0.5, b, scale)
    return perturbations


def assert_exact(
    net: nn.Module,
    x: Any,
    *,
    draws: str = "row",
    skip: Collection[str] = (),
    members: int = 2,
    perturbations: dict[str, Perturbation] | None = None,
    effects: bool = True,
) -> None:
    """A folded pass equals one run for each row, and no perturbation is without effect on any row.

    :param skip: parameters that are not perturbed; all others are.
    :param effects: whether to run the loop again without each perturbation in turn, to see that it has an effect.
    """
    net = net.double()
    size = next(leaf.shape[0] for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
    if perturbations is None:
        perturbations = perturb(net, *parameters_of(net, skip), members, size, draws)
    network = Network(net)
    with torch.no_grad():
        folded = network.perturbed(x, size, perturbations, members)
    expected = row_by_row(net, x, size, perturbations, members)
    assert folded.shape == expected.shape
    assert relative(folded, expected).max() <= TOLERANCE
    for name in perturbations if effects else ():
        others = {n: p for n, p in perturbations.items() if n != name}
        assert relative(row_by_row(net, x, size, others, members), expected).min() > VISIBLE, f"{name} has no effect"
