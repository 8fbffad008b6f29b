"""Runs Markov chains: vectorised chains, a progress bar, and draws that are written to disk during the run."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.progress import progress_bar
from pyro_bnn.inference.sgmcmc.agreement import agreement
from pyro_bnn.inference.sgmcmc.draw_files import DrawFiles
from pyro_bnn.inference.sgmcmc.gradient import moving_statistics
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC
from pyro_bnn.modes import settle
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded

#: chains by default, for a kernel that tunes itself
NUM_CHAINS = 4


@one_at_a_time
def sample(
    kernel: MCMCKernel,
    num_samples: int,
    warmup_steps: int | None = None,
    num_chains: int | None = None,
    *,
    args: tuple[object, ...] = (),
    stream: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
) -> Posterior:
    """Runs a kernel and returns the posterior.

    Chains of :class:`~pyro_bnn.inference.SGHMC` are vectorised: each step computes one batched gradient for all of
    them, and every chain has its own minibatches. Other kernels run in ``pyro.infer.MCMC``.

    Of a kernel with ``step_size="auto"`` each chain but the first starts at new weights of the network, and
    ``posterior.sampler`` says what warm-up has found, the largest R-hat and the smallest effective sample size, of the
    network's outputs at some rows or, for other models, of the latents. A warning says when these are not good.

    :param kernel: an :class:`~pyro_bnn.inference.SGHMC`, or any kernel of Pyro.
    :param num_samples: number of draws of each chain that are kept.
    :param warmup_steps: number of draws of each chain that are discarded, during which the kernel adapts; by default as
        many as ``num_samples`` for a kernel with ``step_size="auto"``, and none for others.
    :param num_chains: number of chains; by default 4 for a kernel with ``step_size="auto"``, and 1 for others and for
        networks whose normalisation layers gather statistics, which cannot be vectorised.
    :param args: the arguments of the model, for kernels without data.
    :param stream: a folder to which each draw is written during the run (one ``.npy`` file per site), and from which
        the posterior reads, so that memory holds only one draw. After a run was killed,
        :func:`~pyro_bnn.inference.load_stream` reads its draws. By default, draws are kept in memory, on the device.
    :param progress: whether to show a progress bar.
    :param seed: makes the run reproducible and leaves the global random state unchanged.
    :return: a posterior with the stored draws of all chains, one chain after the other.
    :raises TypeError: when ``args`` is not a tuple.
    :raises ValueError: for counts out of range, a folder that contains earlier draws, or ``stream`` with a kernel other
        than :class:`~pyro_bnn.inference.SGHMC`.
    :raises OSError: when the disk has no room for all draws that are to be streamed; nothing has been sampled then.
    :raises FloatingPointError: when a chain diverges; streamed draws stay on disk.
    """
    num_samples = checks.count("num_samples", num_samples)
    is_tuned = isinstance(kernel, SGHMC) and kernel.is_tuned
    default = num_samples if is_tuned else 0
    warmup_steps = default if warmup_steps is None else checks.count("warmup_steps", warmup_steps, 0)
    default = NUM_CHAINS if isinstance(kernel, SGHMC) and is_tuned and not moving_statistics(kernel.model) else 1
    num_chains = default if num_chains is None else checks.count("num_chains", num_chains)
    checks.seed("seed", seed)
    checks.truth("progress", progress)
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r}: expected a tuple of what the model is called with, as args=(x, y)")
    stream = None if stream is None else checks.path("stream", stream)
    model: Program = kernel.model  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(device_of(model), seed))
        if isinstance(kernel, SGHMC):
            draws, statistics = _run(kernel, num_samples, warmup_steps, num_chains, args, stream, progress)
            settle(model)
            posterior = Posterior.from_draws(model, draws, num_chains, statistics)
            posterior.sampler = _temperatures(kernel)
            if is_tuned:
                posterior.sampler |= agreement(posterior, kernel.streams.first, num_chains)
            return posterior
        if stream is not None:
            raise ValueError(
                f"stream= needs an SGHMC kernel: {type(kernel).__name__} keeps its draws in memory; leave stream= out"
            )
        mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=not progress)
        mcmc.run(*args)
    settle(model)
    return Posterior.from_mcmc(mcmc, model)


def _run(
    kernel: SGHMC,
    num_samples: int,
    warmup_steps: int,
    num_chains: int,
    args: tuple[object, ...],
    stream: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``{site: [num_chains * num_samples, *event]}``, chain after chain, and statistics of normalisation likewise."""
    statistics: dict[str, list[Tensor]] = {}
    kernel.chains = num_chains if num_chains > 1 else None
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, kernel, "chains", None)
        stack.callback(kernel.cleanup)
        kernel.setup(warmup_steps, *args)
        params = kernel.initial_params
        first = kernel.potential.constrain(params)
        values = {name: value if num_chains > 1 else value.unsqueeze(0) for name, value in first.items()}
        kept = {name: value.new_empty((num_chains, num_samples, *value.shape[1:])) for name, value in values.items()}
        files = None
        if stream is not None:
            files = DrawFiles(Path(stream), num_chains, num_samples, values, kernel.moving_buffers())
            stack.callback(files.close)
            kept = files.draws
        bar = stack.enter_context(progress_bar(type(kernel).__name__, warmup_steps + num_samples, progress=progress))
        shown = -math.inf
        for i in range(-warmup_steps, num_samples):
            params = kernel.sample(params)
            text = None
            if progress and (time.monotonic() > shown + 0.5 or i == num_samples - 1):
                shown = time.monotonic()
                text = " ".join(" ".join(pair) for pair in kernel.logging().items())
            bar.advance(text)
            if i < 0:
                continue
            with contextlib.nullcontext() if files is None else files.adding(i):
                for name, value in kernel.potential.constrain(params).items():
                    kept[name][:, i] = value
                for name, value in kernel.statistics().items():
                    statistics.setdefault(name, []).append(value)
                    if files is not None:
                        files.statistics[name][i] = value
        kernel.check()
    draws = {name: value.flatten(0, 1) for name, value in kept.items()}
    return draws, {name: torch.stack(values) for name, values in statistics.items()}


def _temperatures(kernel: SGHMC) -> dict[str, float]:
    """The temperatures that were measured, those that they should be, and T; nothing for a kernel that has none.

    Of a kernel that tuned itself, what it has found too.
    """
    reported = ("step_size", "friction", "thinning", "acceptance")
    found = kernel.diagnostics()
    measured = {name: value for name, value in found.items() if name.endswith(" temperature") or name in reported}
    if not measured:
        return {}
    expected = {"expected kinetic temperature": kernel.expected_kinetic_temperature, "temperature": kernel.temperature}
    return measured | expected
