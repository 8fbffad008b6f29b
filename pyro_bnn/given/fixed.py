"""The values that a network holds fixed, and the parameters that cannot be random.

======================================  ================================================================================
``padding_idx`` of a table              the row keeps its value: it has no gradient and is not random
``requires_grad=False``                 the parameter keeps its value, unless a selection picks it
``max_norm`` of a table                 cannot be random: every pass of the network writes into the table
``spectral_norm``                       cannot be random: its vectors belong to one value of the weight
another weight that is computed         cannot have factors: what is multiplied is not a parameter
complex numbers, integers               cannot be random: priors are over real numbers
======================================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

_TABLES = (nn.Embedding, nn.EmbeddingBag)
#: modules whose ``weight`` is that of a product, a convolution or a table
_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, *_TABLES)


def padding_rows(net: nn.Module) -> dict[str, int]:
    """The padding row of each table, by parameter name. Tables with another use are left out: it trains that row."""
    uses: dict[int, set[int | None]] = {}
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                is_table = isinstance(module, _TABLES) and name == "weight"
                uses.setdefault(id(p), set()).add(module.padding_idx if is_table else None)  # type: ignore[arg-type]
    found: dict[str, int] = {}
    for name, p in net.named_parameters():
        of_all = uses[id(p)]
        row = next(iter(of_all))
        if len(of_all) == 1 and row is not None:
            found[name] = row
    return found


def with_row_of(value: Tensor, fixed: Tensor, row: int) -> Tensor:
    """``value`` ``[..., n, d]`` with row number ``row`` from ``fixed`` ``[n, d]``, without a gradient."""
    is_row = torch.arange(fixed.shape[0], device=value.device) == row
    return torch.where(is_row.unsqueeze(-1), fixed.detach().to(value), value)


def not_frozen(parameters: Mapping[str, Tensor], what: str) -> list[str]:
    """The names of the parameters that take a gradient.

    :param what: what the parameters are, for the message.
    :raises ValueError: when there are parameters, but none of them takes a gradient.
    """
    found = [name for name, p in parameters.items() if p.requires_grad]
    if parameters and not found:
        raise ValueError(
            f"the network has no {what} to make random: all of them are frozen (requires_grad=False), as "
            f"{next(iter(parameters))!r} is. Pick some with select=, which takes frozen ones too, or unfreeze all with "
            "net.requires_grad_()"
        )
    return found


def require_random(net: nn.Module, names: Iterable[str]) -> None:
    """Checks that parameters can be random.

    :param names: names of the parameters.
    :raises ValueError: when one of them cannot be random; the message names it, and the remedy.
    """
    chosen = set(names)
    first = {id(p): name for name, p in net.named_parameters()}
    for name, p in net.named_parameters():
        if name in chosen and not p.is_floating_point():
            held = "complex" if p.is_complex() else f"of {p.dtype}"
            remedy = (
                "keep it as real numbers (a parameter torch.view_as_real(w), and torch.view_as_complex in forward)"
                if p.is_complex()
                else "give the network in floating point"
            )
            raise ValueError(
                f"the parameter {name!r} is {held}, but priors are over real numbers: {remedy}, or leave it out with "
                "`select=`"
            )
    for where, module in net.named_modules():
        own = {first[id(p)] for p in module._parameters.values() if p is not None} & chosen
        if own and isinstance(module, _TABLES) and module.max_norm is not None:
            raise ValueError(
                f"the table {min(own)!r} has max_norm, so every pass of the network would change its draws. Remove "
                "max_norm, or leave the table out with `select=`"
            )
        random = own | {first[id(p)] for p in _originals(module)} & chosen
        if random and has_spectral_norm(module):
            raise ValueError(
                f"{min(random)!r} is random, but spectral_norm divides by a norm that it estimates with vectors kept "
                f"from earlier passes, which had other draws. Remove it from {where or 'the network'!r} with "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') (for the older form: "
                "torch.nn.utils.remove_spectral_norm(layer)), or leave the layer out with `select=`"
            )


def require_own_weights(net: nn.Module) -> None:
    """Checks that every linear layer, convolution and table has its weight as a parameter.

    :raises ValueError: when a layer computes its weight from other parameters, as weight_norm does.
    """
    for name, module in net.named_modules():
        if not isinstance(module, _PRODUCTS) or "weight" in module._parameters:
            continue
        raise ValueError(
            f"the {type(module).__name__} {name!r} computes its weight from other parameters (weight_norm, "
            "spectral_norm, pruning or another parametrization): what it multiplies is not a parameter, so it cannot "
            "have factors. Make the weight a parameter again (torch.nn.utils.parametrize.remove_parametrizations("
            "layer, 'weight'); for older forms torch.nn.utils.remove_weight_norm(layer), remove_spectral_norm(layer), "
            "torch.nn.utils.prune.remove(layer, 'weight')), or name the layers that are random with `select=`"
        )


def _originals(module: nn.Module) -> list[nn.Parameter]:
    """The parameters from which a module computes its weights."""
    computed = getattr(module, "parametrizations", None)
    return list(computed.parameters()) if isinstance(computed, nn.ModuleDict) else []


def has_spectral_norm(module: nn.Module) -> bool:
    """Whether a layer has spectral norm, in the older form (a hook) or the newer one (a parametrization)."""
    hooks = module._forward_pre_hooks.values()
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return True
    computed = getattr(module, "parametrizations", None)
    lists = computed.values() if isinstance(computed, nn.ModuleDict) else ()
    every = [one for steps in lists if isinstance(steps, ParametrizationList) for one in steps]
    return any(isinstance(one, parametrizations._SpectralNorm) for one in every)
