"""The loss of a batch and its gradient as machine code of ``torch.compile``, where that can be made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_bnn.distributed import Processes
from pyro_bnn.entry.checks import Compile
from pyro_bnn.inference.training.options import Training
from pyro_bnn.recording.recorded import Recorded, Results

#: steps after which a compiled step is compared with the model again
VERIFY_EVERY = 100


class CompiledStep:
    """Adds the gradient of a loss to ``.grad``, by one compiled function for each form of batch.

    The function has the passes forward and backward in it, with all of Python and Pyro left out, and is compared with
    the model before it is used and every ``VERIFY_EVERY`` steps. Where it cannot be made, or differs, this warns, and
    makes no more.

    :param differentiate: of any inputs; adds the gradient to ``.grad`` and returns the losses, a tensor.
    :param parameters: those that may get a gradient.
    :param programs: modules that ``differentiate`` runs.
    :param verifies_epochs: whether to compare at the first step of each epoch too, as callbacks may change a model.
    :param compiles: ``"reduce-overhead"`` for CUDA graphs.
    """

    def __init__(
        self,
        differentiate: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        programs: Sequence[object],
        verifies_epochs: bool,
        compiles: Compile = True,
    ) -> None:
        self._differentiate, self._parameters = differentiate, list(parameters)
        self._verifies_epochs = verifies_epochs
        self._recorded = Recorded(
            self._with_gradients,
            "a step of training",
            "auto",
            compiles=compiles,
            programs=programs,
            verify_every=VERIFY_EVERY,
            silence="compile=False",
        )

    def __len__(self) -> int:
        """How many forms of batch were compiled."""
        return len(self._recorded)

    def __call__(self, *inputs: object, is_first_of_epoch: bool = False) -> Tensor | None:
        """Adds the gradient for these inputs and returns the losses; ``None``, and nothing done, where it cannot."""
        if is_first_of_epoch and self._verifies_epochs:
            self._recorded.verify(*inputs)
        found = self._recorded(*inputs)
        if found is None:
            return None
        losses, *gradients = found
        seen: set[int] = set()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad += gradient
            elif gradient.data_ptr() in seen or 0 in gradient.stride():  # .grad is written into by who clips it
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            else:
                parameter.grad = gradient
            seen.add(gradient.data_ptr())
        return losses

    def _with_gradients(self, *inputs: object) -> Results:
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            losses = self._differentiate(*inputs)
            return (losses.detach(), *(parameter.grad for parameter in self._parameters))
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient


def compiled_step(
    options: Training,
    differentiate: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    programs: Sequence[object],
    together: Processes,
    why_not: str | None = None,
) -> CompiledStep | None:
    """What ``compile=`` asks for; ``None`` for nothing, and with a warning where several processes train.

    :param why_not: another reason against it.
    """
    if not options["compile"]:
        return None
    why_not = "several processes train together" if together.are_several else why_not
    if why_not is not None:
        warnings.warn(
            f"a step of training is not compiled, because {why_not}. compile=False silences this", stacklevel=4
        )
        return None
    return CompiledStep(differentiate, parameters, programs, bool(options["callbacks"]), options["compile"])
