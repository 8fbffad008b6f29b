"""Runs Markov chains: vectorised chains, a progress bar, and draws that are written to disk during the run."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_bnn.distributed import Processes, processes, require_one_process
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.checkpoint import Checkpoint, CheckpointFile
from pyro_bnn.inference.progress import progress_bar
from pyro_bnn.inference.settings import differences, settings_of_chain
from pyro_bnn.inference.sgmcmc.agreement import agreement
from pyro_bnn.inference.sgmcmc.draw_files import DrawFiles, require_no_draws
from pyro_bnn.inference.sgmcmc.gradient import moving_statistics
from pyro_bnn.inference.sgmcmc.kernel_state import set_state, state_of
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC
from pyro_bnn.inference.training.stopping import stop_requests
from pyro_bnn.modes import settle
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import derive_seeds, device_of, random_states, seeded, set_random_states

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
    checkpoint: str | os.PathLike[str] | Checkpoint | None = None,
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
        networks whose normalisation layers gather statistics, which cannot be vectorised. Under ``torchrun`` every
        process runs as many of them, with a seed of its own, and has the draws of all in memory at the end; the number
        is then a multiple of that of processes, by default the next.
    :param args: the arguments of the model, for kernels without data.
    :param stream: a folder to which each draw is written during the run (one ``.npy`` file per site), and from which
        the posterior reads, so that memory holds only one draw. After a run was killed,
        :func:`~pyro_bnn.inference.load_stream` reads its draws. By default, draws are kept in memory, on the device.
    :param checkpoint: a file from which the run resumes if it exists, to the same bits on the CPU, with the same
        settings; or a :class:`~pyro_bnn.inference.Checkpoint`. It holds the whole state of the kernel, and draws are
        streamed to ``stream``, or to the folder ``CHECKPOINT.draws`` beside it. By default it is written once a minute;
        and at the end, and when Ctrl-C or SIGTERM stops the run.
    :param progress: whether to show a progress bar.
    :param seed: makes the run reproducible and leaves the global random state unchanged.
    :return: a posterior with the stored draws of all chains, one chain after the other.
    :raises TypeError: when ``args`` is not a tuple.
    :raises ValueError: for counts out of range, a folder that contains earlier draws, a checkpoint that is damaged or
        of a run with other settings, or ``stream`` or ``checkpoint`` with a kernel other than
        :class:`~pyro_bnn.inference.SGHMC`.
    :raises OSError: when the disk has no room for all draws that are to be streamed; nothing has been sampled then.
    :raises FloatingPointError: when a chain diverges; streamed draws stay on disk.
    """
    num_samples = checks.count("num_samples", num_samples)
    is_tuned = isinstance(kernel, SGHMC) and kernel.is_tuned
    default = num_samples if is_tuned else 0
    warmup_steps = default if warmup_steps is None else checks.count("warmup_steps", warmup_steps, 0)
    default = NUM_CHAINS if isinstance(kernel, SGHMC) and is_tuned and not moving_statistics(kernel.model) else 1
    together = processes()
    default = -(-default // together.size) * together.size
    num_chains = default if num_chains is None else checks.count("num_chains", num_chains)
    if num_chains % together.size:
        raise ValueError(
            f"num_chains={num_chains}: expected a multiple of {together.size}, as so many processes divide the chains"
        )
    checks.seed("seed", seed)
    checks.truth("progress", progress)
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r}: expected a tuple of what the model is called with, as args=(x, y)")
    stream = None if stream is None else checks.path("stream", stream)
    checkpoint = Checkpoint.of(checkpoint)
    model: Program = kernel.model  # type: ignore[attr-defined]
    with contextlib.ExitStack() as stack:
        own_seed = (
            derive_seeds(together.shared_seed(seed), together.size)[together.rank] if together.are_several else seed
        )
        stack.enter_context(seeded(device_of(model), own_seed))
        if isinstance(kernel, SGHMC):
            own = num_chains // together.size
            if together.are_several:
                stream = None if stream is None else _of_process(stream, together)
                if checkpoint is not None:
                    checkpoint = replace(checkpoint, path=_of_process(checkpoint.path, together))
            kernel.first_chain = own * together.rank
            chain = _Chain(kernel, num_samples, warmup_steps, own, args, stream, checkpoint, seed)
            draws, statistics = chain.run(progress and together.is_first)
            if together.are_several:
                draws, statistics = _of_all(together, draws), _of_all(together, statistics)
            settle(model)
            posterior = Posterior.from_draws(model, draws, num_chains, statistics)
            posterior.sampler = _mean(together.gather(_temperatures(kernel)))
            if is_tuned:
                posterior.sampler |= agreement(posterior, kernel.streams.first, num_chains)
            return posterior
        for name, given in (("stream", stream), ("checkpoint", checkpoint)):
            if given is not None:
                raise ValueError(
                    f"{name}= needs an SGHMC kernel: {type(kernel).__name__} runs in pyro.infer.MCMC, which keeps its "
                    f"state in memory; leave {name}= out, and save the posterior of a shorter run now and then"
                )
        require_one_process(type(kernel).__name__, "Run it without torchrun, or sample with SGHMC, whose chains are.")
        mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=not progress)
        mcmc.run(*args)
    settle(model)
    return Posterior.from_mcmc(mcmc, model)


class _Chain:
    """A run of a kernel, with what it keeps on disk."""

    def __init__(
        self,
        kernel: SGHMC,
        num_samples: int,
        warmup_steps: int,
        num_chains: int,
        args: tuple[object, ...],
        stream: str | None,
        checkpoint: Checkpoint | None,
        seed: int | None,
    ) -> None:
        self.kernel, self.num_samples, self.warmup_steps = kernel, num_samples, warmup_steps
        self.num_chains, self.args = num_chains, args
        self.file, self.folder, self.settings = None, stream, dict[str, str]()
        if checkpoint is not None:
            own = checkpoint if checkpoint.has_interval else replace(checkpoint, minutes=1.0)
            self.file = CheckpointFile(own)
            self.folder = stream or f"{own.path}.draws"
            counts = {"num_samples": num_samples, "warmup_steps": warmup_steps, "num_chains": num_chains, "seed": seed}
            options = {"kernel": type(kernel).__name__, **kernel.repr_arguments(), **counts}
            self.settings = settings_of_chain(kernel.model, kernel.data, **options)

    def run(self, progress: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``{site: [num_chains * num_samples, *event]}``, chain after chain, and statistics of normalisation."""
        kernel = self.kernel
        kernel.chains = self.num_chains if self.num_chains > 1 else None
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, kernel, "chains", None)
            stack.callback(kernel.cleanup)
            kernel.setup(self.warmup_steps, *self.args)
            state = None if self.file is None else self._read(self.file)
            if self.file is not None and state is None:
                require_no_draws(Path(self.folder or ""))
                self._write(self.file, -self.warmup_steps)
            files, kept = self._places(stack, state)
            statistics: dict[str, list[Tensor]] = {}
            done = -self.warmup_steps if state is None else state["draw"]
            params = kernel.initial_params
            if state is not None:
                set_state(kernel, state["kernel"])
                set_random_states(device_of(kernel.model), state["random"])
                params = kernel.last_draw
            total, label = self.warmup_steps + self.num_samples, type(kernel).__name__
            bar = stack.enter_context(progress_bar(label, total, done=done + self.warmup_steps, progress=progress))
            stop = stack.enter_context(stop_requests(None if self.file is None else self.file.path))
            shown = -math.inf
            for i in range(done, self.num_samples):
                params = kernel.sample(params)
                text = None
                if progress and (time.monotonic() > shown + 0.5 or i == self.num_samples - 1):
                    shown = time.monotonic()
                    text = " ".join(" ".join(pair) for pair in kernel.logging().items())
                bar.advance(text)
                if i >= 0:
                    with contextlib.nullcontext() if files is None else files.adding(i):
                        self._keep(i, params, kept, statistics, files)
                if self.file is not None and (stop or self.file.is_due_after_draw(kernel.draws, kernel.steps)):
                    self._write(self.file, i + 1)
                stop.obey(kernel.steps)
            kernel.check()
            if self.file is not None and done < self.num_samples:
                self._write(self.file, self.num_samples)
        draws = {name: value.flatten(0, 1) for name, value in kept.items()}
        if files is not None:
            return draws, files.statistics
        return draws, {name: torch.stack(values) for name, values in statistics.items()}

    def _places(
        self, stack: contextlib.ExitStack, state: dict[str, Any] | None
    ) -> tuple[DrawFiles | None, dict[str, Tensor]]:
        """Where draws go, ``{site: [chains, samples, *event]}``: files, or memory."""
        kernel, chains, samples = self.kernel, self.num_chains, self.num_samples
        first = kernel.potential.constrain(kernel.initial_params)
        values = {name: value if chains > 1 else value.unsqueeze(0) for name, value in first.items()}
        if self.folder is None:
            return None, {name: v.new_empty((chains, samples, *v.shape[1:])) for name, v in values.items()}
        has_draws = state is not None and state["draw"] > 0
        files = DrawFiles(
            Path(self.folder),
            chains,
            samples,
            values,
            kernel.moving_buffers(),
            resumed=has_draws,
            anew=self.file is not None and not has_draws,
        )
        stack.callback(files.close)
        return files, files.draws

    def _keep(
        self,
        i: int,
        params: dict[str, Tensor],
        kept: dict[str, Tensor],
        statistics: dict[str, list[Tensor]],
        files: DrawFiles | None,
    ) -> None:
        for name, value in self.kernel.potential.constrain(params).items():
            kept[name][:, i] = value
        for name, value in self.kernel.statistics().items():
            if files is None:
                statistics.setdefault(name, []).append(value)
            else:
                files.statistics[name][i] = value

    def _write(self, file: CheckpointFile, draw: int) -> None:
        random = random_states(device_of(self.kernel.model))
        state = {"step": self.kernel.steps, "draw": draw, "settings": self.settings, "random": random}
        file.write(state | {"kernel": state_of(self.kernel)})

    def _read(self, file: CheckpointFile) -> dict[str, Any] | None:
        state = file.read()
        if state is None:
            return None
        if "kernel" not in state:
            raise ValueError(f"{file.path} is no checkpoint of a chain; choose another path or remove it")
        if differ := differences(state["settings"], self.settings):
            raise ValueError(
                f"{file.path} is the checkpoint of a run with other settings: {'; '.join(differ)}. Use the same "
                "settings to resume it, or remove it to start afresh"
            )
        return state


def _of_process(path: str | os.PathLike[str], together: Processes) -> str:
    """A path of this process alone: ``chain-1.pt`` for ``chain.pt``."""
    place = Path(path)
    return str(place.with_name(f"{place.stem}-{together.rank}{place.suffix}"))


def _of_all(together: Processes, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws of all processes, one process after the other."""
    parts = together.gather({name: value.cpu() for name, value in values.items()})
    return {name: torch.cat([part[name] for part in parts]).to(value.device) for name, value in values.items()}


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


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
