"""Finds the positions of the samples inside a network: one :class:`~pyro_bnn.perturb.Layout` for each use of a weight.

The network runs on three samples, first unchanged and then with one of them marked by other values. The
entries of a tensor that change are those of the marked sample, and their pattern along an axis tells how the batch was
flattened into it; comparing lengths would not do (a time-major and a batch-major flatten have the same lengths).
The result is then checked: a small batch folded with random perturbations must equal one run for each row with its
own explicit weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_bnn.inputs import Inputs
from pyro_bnn.modes import undisturbed
from pyro_bnn.perturb.decisions import Decisions
from pyro_bnn.perturb.factors import Perturbation, Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Layout, Use
from pyro_bnn.perturb.mode import Perturb, consumed, is_product, passes_on, tensors
from pyro_bnn.perturb.samples import batched, markings, select_samples, unlike_samples
from pyro_bnn.perturb.steady import Steady

_SAMPLES = (
    3  # number of samples in the probe: the smallest for which both the period and the run length of a flatten show
)

#: functions that read the shape, dtype or device of a tensor, but not its values
_READ_NO_VALUES = {
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor),
}


def find_layouts(
    run: Callable[..., Tensor],
    net: nn.Module,
    names: dict[int, str],
    neutral: dict[int, Perturbation],
    x: Inputs,
    size: int,
    decisions: Decisions,
) -> dict[Use, Layout]:
    """The layout of every use of a perturbed parameter.

    :param run: ``run(x, weights=None)`` calls ``net`` and returns its output tensor.
    :param names: name of each perturbed parameter, by ``id``.
    :param neutral: a perturbation of shape ``[1, 1, n]`` for each of them, that changes nothing.
    :param x: an example input whose tensors have ``size`` samples on axis 0.
    :param decisions: records the decisions of the first pass, which the others repeat.
    :raises ValueError: when a perturbed parameter is never consumed by a rule, or by an operation without one.
    :raises RuntimeError: when the samples of the batch cannot be told apart where a weight is used.
    """
    base_x = select_samples(x, size, unlike_samples(x, size, _SAMPLES))
    with undisturbed(net), Steady():
        base = _Recorder(neutral, names)
        try:
            with decisions, base:
                run(base_x)
        except Exception as error:
            if takes(run, base_x) or not takes(run, x):  # from a rule, or from a network that fails on any input
                raise
            raise rows_belong_together(error) from error
        base.require_consumption()
        layouts: dict[Use, Layout] = {}
        failures: list[Exception] = []
        ran = False
        for marked_at in markings(x, size, base_x, _SAMPLES):
            missing = [use for use in base.inputs if use not in layouts]
            if not missing:
                break
            marked: list[dict[Use, Tensor]] = []
            try:
                for sample in (1, 2):
                    recorder = _Recorder(neutral, names)
                    with decisions.again(), recorder:
                        run(marked_at(sample))
                    marked.append(recorder.inputs)
            except Exception as error:  # the network cannot run with this mark, but perhaps with the next
                failures.append(error)
                continue
            ran = True
            for use in missing:
                layout = _fit(base.inputs[use], [m.get(use) for m in marked])
                if layout is not None:
                    layouts[use] = layout
        missing = [use for use in base.inputs if use not in layouts]
        if missing and not ran:
            raise RuntimeError(
                f"the samples cannot be located inside the network: it raised {type(failures[0]).__name__} "
                f"({failures[0]}) whenever one sample of its input was changed, even to the values of another sample. "
                f"Let forward() accept them, or use a model that does not look inside, such as pb.models.Dense"
            ) from failures[0]
        if missing:
            layouts |= _constant(run, names, neutral, x, size, decisions, base.inputs, missing, failures)
    return layouts


class _Recorder(Perturb):
    """Runs the rules with neutral perturbations, and keeps the tensors on which they would act."""

    def __init__(self, neutral: dict[int, Perturbation], names: dict[int, str]) -> None:
        super().__init__(neutral, names, {}, 1, _SAMPLES)
        self.inputs: dict[Use, Tensor] = {}
        self.declared = set(names.values())
        self.by_rule: set[str] = set()
        self.without_rule: dict[str, list[str]] = {}

    def __torch_function__(self, func: object, types: object, args: object = (), kwargs: Any = None) -> object:
        used = [t for t in tensors((args, kwargs or {})) if id(t) in self.perturbations]
        result = super().__torch_function__(func, types, args, kwargs)
        if used:
            taken = {id(t) for t in consumed(func, args, kwargs)}
            self.by_rule.update(self.names[id(t)] for t in used if id(t) in taken)
            if func in _READ_NO_VALUES or passes_on(func):
                return result
            if any(id(t) not in self.perturbations for t in tensors((result,))):
                for name in (self.names[id(t)] for t in used if id(t) not in taken):
                    self.without_rule.setdefault(name, []).append(_name(func))
        return result

    def layout(self, x: Tensor, use: Use) -> Layout:
        self.inputs[use] = x.detach().clone()
        return Layout(None)

    def require_consumption(self) -> None:
        if self.without_rule:
            name, functions = next(iter(self.without_rule.items()))
            raise ValueError(
                f"parameter {name!r} is random, but the network uses it in {', '.join(sorted(set(functions)))}, which "
                "has no rule for it. Leave it out with `select=` (biases with `member_bias=False`), or teach the rule "
                "with `pyro_bnn.perturb.register`."
            )
        unused = sorted(self.declared - self.by_rule)
        if unused:
            raise ValueError(
                f"parameter {unused[0]!r} is random, but the network's forward pass never used it"
                + (f" (nor {len(unused) - 1} others: {', '.join(unused[1:4])} ...)" if len(unused) > 1 else "")
                + f". Check that forward() reaches it, or leave it out: {_remedy(unused[0])}"
            )


def _remedy(parameter: str) -> str:
    """How to make a parameter not random: biases follow the weights of their layers, which are what is selected."""
    if parameter.rpartition(".")[2].startswith("bias"):
        return "biases of all layers with `member_bias=False`, that of a `head=` by naming its weight alone"
    return "with `select=`"


def rows_belong_together(error: Exception) -> RuntimeError:
    """The error for a network that accepts a whole input but not some of its rows; ``error`` is what it raised."""
    return RuntimeError(
        f"the network takes its whole input, but not some rows of it ({type(error).__name__}: {error}): the rows "
        "belong together, as the nodes of a graph do, and are not separate samples. Make the whole input one sample: x "
        "of shape [1, rows, ...] and y [1, rows], with what connects the rows (edges) inside the network, in "
        "pb.models.Dense"
    )


def takes(net: Callable[..., Tensor], x: Any) -> bool:
    """Whether a network runs on an input without an error."""
    try:
        net(x)
    except Exception:
        return False
    return True


def _name(function: Any) -> str:
    """A torch function as its documentation calls it: the getter of a property has no name of its own."""
    name = torch.overrides.resolve_name(function)
    return name.removesuffix(".__get__") if name else getattr(function, "__name__", str(function))


class _Finder(TorchFunctionMode):
    """Records the parameters of a network that a product rule consumes."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.found = names, set[str]()
        self.derived: list[object] = []

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_product(func):
            self.found.update(self.names[id(t)] for t in consumed(func, args, kwargs) if id(t) in self.names)
        if passes_on(func) and args and id(args[0]) in self.names:
            self.names[id(result)] = self.names[id(args[0])]
            self.derived.append(result)
        return result


def find_consumed(run: Callable[..., Tensor], net: nn.Module, x: Inputs, size: int) -> set[str]:
    """The names of all parameters that the network gives to a product with a rule."""
    finder = _Finder({id(p): name for name, p in net.named_parameters()})
    with undisturbed(net), finder:
        run(select_samples(x, size, [0, 0]))  # two, because .squeeze() without an axis would remove a single one
    return finder.found


def check_fold(
    run: Callable[..., Tensor],
    net: nn.Module,
    names: dict[int, str],
    neutral: dict[int, Perturbation],
    parameters: dict[str, Tensor],
    layouts: dict[Use, Layout],
    x: Inputs,
    size: int,
    padded: frozenset[int] = frozenset(),
    *,
    decides: bool = False,
) -> None:
    """A folded batch of 2 members x 2 samples with random perturbations equals four runs with explicit weights.

    :param decides: whether the network branches in Python on values that depend on the weights. The runs may then take
        different branches: they are compared a second time, with the decisions of the first run in all of them.
    :raises RuntimeError: when it does not; the message names the parameters at fault.
    :raises ValueError: when axis 0 of the network's output does not run over its rows.
    """
    pair = select_samples(x, size, unlike_samples(x, size, 2))
    with undisturbed(net), _no_small_weights(net):
        for alike in (False, True) if decides else (False,):
            reason = _misfold(run, net, names, neutral, parameters, layouts, pair, padded, alike)
            if reason is None:
                return
        alone = {
            n: _misfold(run, net, names, neutral, {n: p}, layouts, pair, padded, decides) for n, p in parameters.items()
        }
        bad = [n for n, why in alone.items() if why is not None] or list(parameters)
    raise RuntimeError(
        f"rows with weights of their own for {', '.join(map(repr, bad[:5]))} do not give what the network gives with "
        f"those weights ({reason}): the network treats the rows of a batch differently, or the weight meets a tensor "
        "that does not depend on the sample. Leave it out with `select=`."
    )


def require_rows(y: Tensor, rows: int) -> None:
    """Checks the output of a network.

    :raises ValueError: when axis 0 of it does not run over the rows of the input.
    """
    if y.shape[:1] != (rows,):
        raise ValueError(
            f"the network's output has shape {tuple(y.shape)}; its axis 0 must run over the {rows} rows of its input. "
            "Pick or transpose it with `output=`"
            + (", and give .squeeze() an axis: without one it removes that of a single row." if rows == 1 else ".")
        )


def _misfold(
    run: Callable[..., Tensor],
    net: nn.Module,
    names: dict[int, str],
    neutral: dict[int, Perturbation],
    parameters: dict[str, Tensor],
    layouts: dict[Use, Layout],
    pair: Any,
    padded: frozenset[int],
    alike: bool,
) -> str | None:
    """How a folded batch with perturbed ``parameters`` differs from separate runs; ``None`` if it does not.

    :param alike: whether all runs make the decisions of the first.
    """
    like = next(iter(parameters.values()))
    generator = torch.Generator().manual_seed(0)

    def random(n: int) -> Tensor:
        return (0.5 + torch.rand(2, 2, n, generator=generator)).to(like.device, like.dtype)

    perturbations: dict[str, Perturbation] = {}
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            perturbations[name] = Replacement(parameter.detach() + random(parameter.shape[0]) - 1)
        else:
            perturbations[name] = Rank1Factors(random(parameter.shape[0]), random(parameter.shape[1]))
    folded = pytree.tree_map(lambda t: torch.cat([t, t]) if batched(t, 2) else t, pair)
    ids = {name: i for i, name in names.items()}
    decisions = Decisions(p for p in net.parameters() if id(p) in names)
    try:
        with (
            Steady(),
            decisions,
            Perturb(neutral | {ids[n]: p for n, p in perturbations.items()}, names, layouts, 2, 2, padded),
        ):
            y = run(folded)
    except (RuntimeError, IndexError, TypeError, AssertionError) as error:  # the network rejects the shapes
        return str(error) or type(error).__name__
    require_rows(y, 4)
    # a network may return more digits than its weights have
    tolerance = max(torch.finfo(t.dtype).eps for t in (y, *parameters.values())) ** 0.5
    for m in range(2):
        for b in range(2):
            weights = {n: p.explicit(parameters[n], m, b) for n, p in perturbations.items()}
            with Steady(), decisions.again() if alike else contextlib.nullcontext():
                alone = run(select_samples(pair, 2, [b, b]), weights)[0]
            if y.shape[1:] != alone.shape:
                return f"an output of shape {tuple(y.shape[1:])} instead of {tuple(alone.shape)} for a sample"
            scale = alone.abs().max()
            if not torch.allclose(y[2 * m + b], alone, rtol=0, atol=float(tolerance * scale), equal_nan=True):
                return "another output"
    return None


@contextlib.contextmanager
def _no_small_weights(net: nn.Module) -> Iterator[None]:
    """Replaces weights, gains and gates that start at or near zero (last layers, residual branches).

    They would make an error too small to detect.
    """
    small = [p.data for p in net.parameters() if p.is_floating_point() and p.numel() and p.abs().max() < 1e-3]
    values = [p.clone() for p in small]  # through `.data`, for the reason given in `modes.evaluating`
    try:
        for p in small:
            p.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 1.0)
        yield
    finally:
        for p, value in zip(small, values, strict=True):
            p.copy_(value)


def _fit(base: Tensor, marked: list[Tensor | None]) -> Layout | None:
    """The one axis along which the changed entries have the pattern of samples 1 and 2 of three."""
    changed = []
    for other in marked:
        if other is None or other.shape != base.shape:
            return None
        changed.append((base != other) & ~(base.isnan() & other.isnan()))
    for dim, length in enumerate(base.shape):
        if length % _SAMPLES:
            continue
        others = [d for d in range(base.dim()) if d != dim]
        seen = [c.any(others) if others else c for c in changed]
        for inner in _divisors(length // _SAMPLES):
            sample = torch.arange(length, device=base.device) // inner % _SAMPLES
            if all(torch.equal(s, sample == j) for j, s in zip((1, 2), seen, strict=True)):
                return Layout(dim, length // _SAMPLES // inner, inner)
    return None


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _constant(
    run: Callable[..., Tensor],
    names: dict[int, str],
    neutral: dict[int, Perturbation],
    x: Inputs,
    size: int,
    decisions: Decisions,
    inputs: dict[Use, Tensor],
    uses: list[Use],
    failures: list[Exception],
) -> dict[Use, Layout]:
    """Layouts of tensors that no mark reached: they are the same for every sample, with or without a batch axis."""
    smaller = _Recorder(neutral, names)
    with decisions.again(), smaller:
        run(select_samples(x, size, unlike_samples(x, size, 2)))
    layouts: dict[Use, Layout] = {}
    for use in uses:
        base, other = inputs[use], smaller.inputs.get(use)
        grown = [] if other is None or other.dim() != base.dim() else [
            d for d in range(base.dim()) if base.shape[d] * 2 == other.shape[d] * _SAMPLES
        ]  # fmt: skip
        fits = [
            Layout(d, base.shape[d] // _SAMPLES // inner, inner)
            for d in grown
            for inner in _divisors(base.shape[d] // _SAMPLES)
            if _same_for_all(base.unflatten(d, (-1, _SAMPLES, inner)), d + 1)
        ]
        if fits:
            layouts[use] = fits[0]
        elif other is not None and base.shape == other.shape:
            layouts[use] = Layout(None)
        else:
            raise RuntimeError(
                f"the samples of the batch cannot be told apart where parameter {use.parameter!r} is used (an input "
                f"of shape {tuple(base.shape)}): rows interact before it, in eval mode too. Leave it out with "
                "`select=`."
            ) from (failures[-1] if failures else None)
    return layouts


def _same_for_all(x: Tensor, dim: int) -> bool:
    return torch.equal(x.select(dim, 0), x.select(dim, 1)) and torch.equal(x.select(dim, 0), x.select(dim, 2))
