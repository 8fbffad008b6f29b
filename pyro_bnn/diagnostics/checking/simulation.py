"""Simulation-based calibration: whether an inference algorithm finds the posterior, on data drawn from the model.

With theta ~ p(theta), y ~ p(y | theta) and L independent draws from the exact posterior p(theta | y), the rank of
theta among the draws is uniform on 0 ... L. This holds for every scalar function of theta and y (Talts et al. 2018,
theorem 1; Modrak et al. 2023 for functions of y).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.optim import LambdaLR  # type: ignore[attr-defined]
from torch import Tensor, nn

from pyro_bnn.diagnostics.checking.prior_checks import proper_priors
from pyro_bnn.diagnostics.checking.ranks import LOG_LIKELIHOOD, SBCResult
from pyro_bnn.diagnostics.checking.training import loss_verdict
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.progress import progress_bar
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.modes import frozen
from pyro_bnn.network import batch_size as count_rows
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import derive_seeds, device_of, seeded, some_seed

#: number of rows of x at which the outputs of a network are ranked
PROBES = 5
#: last learning rate of a guide's training as a share of the first
LAST_LR = 0.01
#: the quantity that holds outputs of the network
FUNCTION = "function"

Latents = dict[str, Tensor]
Factory = Callable[[Callable[..., Any]], Any]
Function = Callable[[Latents, Any, Tensor], Tensor]


@one_at_a_time
def sbc(
    model: Program,
    guide_or_kernel: Factory,
    x: Inputs,
    *,
    simulations: int = 100,
    draws: int = 63,
    sites: str | Sequence[str] | None = None,
    functions: Mapping[str, Function] | None = None,
    steps: int = 1000,
    lr: float = 5e-2,
    warmup: int = 200,
    thinning: int = 1,
    seed: int | None = None,
    progress: bool = True,
) -> SBCResult:
    """Simulation-based calibration of an inference algorithm.

    In every simulation theta and y are drawn from the model, theta is inferred from y, and the true theta is ranked
    among the posterior draws. ``guide_or_kernel(model)`` is called for every simulation. What it returns decides how
    the inference is done::

        AutoNormal, partial(pb.models.Rank1Guide, components=2)     a guide, any torch module: SVI with Trace_ELBO
        NUTS                                                        an MCMCKernel: pyro.infer.MCMC, one chain
        lambda model: lambda x, y: ...                              any other callable: a function of x and y that
                                                                    returns a Posterior, or draws {site: [n, *event]}

    To use a guide that is a plain function, wrap it in a module, or train it in a function of the third kind.

    The ranked quantities are every element of the latent sites; for a model of this package the outputs of the network
    at up to 5 rows of x (``function``), since weights have symmetries; and ``log_likelihood``, log p(y | theta), the
    only one that detects a posterior that ignores the data. Parameters of the model are held fixed, such as the W of a
    rank-1 network or normalisation statistics: the posterior of this one model is calibrated.

    :param model: any Pyro model ``model(x, y=None)`` that samples ``obs``, with continuous latent sites.
    :param guide_or_kernel: called with the model for every simulation; see above.
    :param x: the input of the model; for a model of this package all its ``num_data`` rows.
    :param simulations: number S of simulated data sets, at least 2. 100 detect a posterior scale that is wrong by a
        factor of 2.
    :param draws: number L of (nearly) independent draws from each posterior.
    :param sites: the latent sites to rank; by default all. For large networks use ``sites=()``.
    :param functions: further quantities ``{name: f(latents, x, y) -> tensor}``, called with one draw of all sites.
    :param steps, lr: for guides. Adam's learning rate is ``lr`` for the first half of the steps and decays
        exponentially to a hundredth of it in the second half.
    :param warmup: number of steps in which a kernel adapts.
    :param thinning: every thinning-th state of a chain is used. Ranks among correlated draws pile up at both ends
        although the sampler is right: thin until the draws are nearly independent.
    :param seed: seed from which the seeds of all simulations are derived; ``None`` takes a new one at each call.
    :param progress: whether to show a progress bar.
    :raises TypeError: when ``guide_or_kernel(model)`` returns none of the above.
    :raises ValueError: for counts out of range, x without its ``num_data`` rows, a likelihood with a temperature, a
        model without ``obs``, with an improper prior or with discrete latent sites, a site that does not exist, or two
        quantities of one name.
    :raises FloatingPointError: when a simulation gives values that are not finite; the message has its number and seed.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788; Modrak, Moon, Kim, Buerkner,
    Huurre, Faltejskova, Gelman and Vehtari (2023), Bayesian Analysis.
    """
    for name, count, least in (
        *(("simulations", simulations, 2), ("draws", draws, 1), ("steps", steps, 1)),
        *(("warmup", warmup, 0), ("thinning", thinning, 1)),
    ):
        checks.count(name, count, least)
    checks.positive("lr", lr)
    ranks: dict[str, list[Tensor]] = {}
    seed = some_seed(seed)
    with seeded(device_of(model), seed), progress_bar("SBC", simulations, progress=progress) as bar:
        experiment = _Experiment(model, x, sites, functions or {})
        for i, own in enumerate(derive_seeds(seed, simulations)):
            try:
                with seeded(device_of(model), own), experiment.one():
                    truth, y = experiment.simulate()
                    posterior = experiment.infer(guide_or_kernel(model), y, draws, steps, lr, warmup, thinning)
                    found = experiment.ranks(truth, posterior, draws, y)
            except FloatingPointError as error:
                raise FloatingPointError(f"simulation {i} of {simulations} (seed {own}): {error}") from error
            except Exception as error:
                error.add_note(f"in simulation {i} of {simulations} (seed {own})")
                raise
            for name, rank in found.items():
                ranks.setdefault(name, []).append(rank)
            bar.advance()
    return SBCResult({name: torch.stack(rank) for name, rank in ranks.items()}, draws, experiment.falling)


class _Experiment:
    """Simulates, infers and ranks, for one model and input."""

    def __init__(
        self,
        model: Program,
        x: Inputs,
        sites: str | Sequence[str] | None,
        functions: Mapping[str, Function],
    ) -> None:
        self.model, self.functions = model, functions
        self.falling = 0
        self.network = model if isinstance(model, BayesianNetwork) else None
        x = inputs(x, like_of(model))
        self.obs = self.network.site("obs") if self.network is not None else "obs"
        if self.network is not None and self.network.num_data is not None and count_rows(x) != self.network.num_data:
            raise ValueError(
                f"x has {count_rows(x)} rows, but the model has num_data={self.network.num_data}: give all inputs, as "
                "the posterior is that given data at all of them"
            )
        likelihood = getattr(self.network, "likelihood", None)
        if likelihood is not None and likelihood.temperature != 1:
            raise ValueError(
                f"the likelihood has temperature={likelihood.temperature}: expected 1, as data are simulated without a "
                "temperature and the tempered posterior is not the one they have. Leave temperature= out"
            )
        self.x = x
        store = pyro.get_param_store()
        with frozen(model), store.scope(store.get_state()), torch.no_grad():
            nodes = self._trace()
            parameters = {name for name, site in nodes.items() if site["type"] == "param"}
            self._store: dict[str, dict[str, Any]] = {
                "params": {n: p.detach().clone() for n, p in store._params.items() if n in parameters},
                "constraints": {n: c for n, c in store._constraints.items() if n in parameters},
            }
        self.latents = self._latent_sites(nodes)
        wanted = self.latents if sites is None else checks.names("sites", sites)
        if unknown := [name for name in wanted if name not in self.latents]:
            raise ValueError(
                f"sites: {unknown[0]!r} is not a latent site of the model; expected any of {', '.join(self.latents)}"
            )
        names = [*wanted, *functions, LOG_LIKELIHOOD, *([FUNCTION] if self.network is not None else [])]
        if taken := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two quantities are named {taken[0]!r}: rename the one in functions=, or leave it out of sites="
            )
        self.sites = wanted

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Context for one simulation. Afterwards model and parameters are as they were given."""
        with frozen(self.model), pyro.get_param_store().scope(self._parameters()):
            yield

    def _parameters(self) -> Any:
        """A copy of the model's entries in the parameter store, without gradients, so that nothing trains them."""
        params, constraints = self._store["params"], self._store["constraints"]
        return {"params": {name: p.clone() for name, p in params.items()}, "constraints": dict(constraints)}

    def _trace(self) -> dict[str, Any]:
        with torch.no_grad(), proper_priors():
            nodes: dict[str, Any] = poutine.trace(self.model).get_trace(self.x).nodes
        return nodes

    def _latent_sites(self, nodes: dict[str, Any]) -> list[str]:
        if self.obs not in nodes or nodes[self.obs]["type"] != "sample" or nodes[self.obs]["is_observed"]:
            raise ValueError(
                f"called without y, the model draws no site {self.obs!r}, so no data can be simulated. A model of this "
                "package needs a likelihood, your own needs pyro.sample('obs', ..., obs=y)"
            )
        latents = [
            name
            for name, site in nodes.items()
            if site["type"] == "sample"
            and not site["is_observed"]
            and name != self.obs
            and not poutine.util.site_is_subsample(site)
        ]
        for name in latents:
            if nodes[name]["fn"].support.is_discrete:
                raise ValueError(
                    f"the latent site {name!r} is discrete: expected continuous sites. Sum it out (with a mixture "
                    "distribution), as guides and kernels also require"
                )
        return latents

    def simulate(self) -> tuple[Latents, Tensor]:
        """``{site: [*event]}`` and y, drawn from the model."""
        nodes = self._trace()
        truth, y = {name: nodes[name]["value"] for name in self.latents}, nodes[self.obs]["value"]
        for name, value in (*truth.items(), (self.obs, y)):
            if not bool(value.isfinite().all()):
                raise FloatingPointError(f"the model drew values of {name!r} that are not finite")
        if self.network is not None:
            truth = {site.name: truth[site.name].reshape(site.shape) for site in self.network.sites()}
            y = y.reshape(y.shape[-self.network.members_dim - 1 :])
        return truth, y

    def infer(self, method: Any, y: Tensor, draws: int, steps: int, lr: float, warmup: int, thinning: int) -> Posterior:
        if isinstance(method, MCMCKernel):
            mcmc = MCMC(method, num_samples=draws * thinning, warmup_steps=warmup, disable_progbar=True)
            mcmc.run(self.x, y)
            return Posterior.from_mcmc(mcmc, self.model)
        if isinstance(method, nn.Module):
            self._train(method, y, steps, lr)
            return Posterior(self.model, method, example=self.x)
        result = method(self.x, y) if callable(method) else method
        if isinstance(result, Mapping):
            return Posterior.from_draws(self.model, dict(result))
        if not isinstance(result, Posterior):
            raise TypeError(
                "guide_or_kernel(model) returns a guide that is a torch module, an MCMCKernel, or a function of x and "
                f"y that returns a Posterior or draws {{site: [n, *event]}}; got {type(method).__name__}"
                + (f", which returned {type(result).__name__}" if callable(method) else "")
            )
        return result

    def _train(self, guide: nn.Module, y: Tensor, steps: int, lr: float) -> None:
        half = steps // 2
        adam = LambdaLR(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": lr},
                "lr_lambda": lambda step: LAST_LR ** (max(0, step - half) / (steps - half)),
            }
        )
        svi = SVI(self.model, guide, adam, Trace_ELBO())  # the model's parameters have no gradients here
        guide.train()
        losses = []
        for step in range(steps):
            # Distributions validate their arguments only in the first step, as later steps have the same shapes.
            with pyro.validation_enabled(step == 0):
                loss = svi.step(self.x, y)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} at step {step + 1} of SVI; try a smaller lr")
            losses.append(loss)
            adam.step()
        # judge only the first half: with a small learning rate any loss seems to have converged
        self.falling += half > 0 and loss_verdict(losses[:half]).state == "falling"

    def ranks(self, truth: Latents, posterior: Posterior, draws: int, y: Tensor) -> dict[str, Tensor]:
        drawn = posterior.sample(draws)
        for name, value in truth.items():
            if name not in drawn or drawn[name].shape[1:] != value.shape:
                got = f"has the shape {tuple(drawn[name].shape[1:])}" if name in drawn else "is missing"
                raise ValueError(
                    f"the draws of the posterior do not fit the model: {name!r} {got}, expected {tuple(value.shape)}"
                )
            if not bool(drawn[name].isfinite().all()):
                raise FloatingPointError(f"the posterior gave values of {name!r} that are not finite")
        both = {name: torch.cat((value[None], drawn[name].to(value))) for name, value in truth.items()}
        together = Posterior.from_draws(self.model, both, store=self._parameters())
        quantities = {name: both[name] for name in self.sites}
        if self.network is not None:
            prediction = together.predict(self.x, draws + 1)
            rows = prediction.outputs.shape[2]
            probes = torch.linspace(0, rows - 1, min(rows, PROBES)).round().long()
            quantities[FUNCTION] = prediction.outputs[:, 0, probes.to(prediction.outputs.device)]
            log_likelihood = prediction.log_prob(y)
        else:
            log_likelihood = together.log_likelihood(self.x, y, draws + 1)
        quantities[LOG_LIKELIHOOD] = log_likelihood[:, 0].cpu().double().sum(-1)
        for name, f in self.functions.items():
            each = [f({site: value[i] for site, value in both.items()}, self.x, y) for i in range(draws + 1)]
            quantities[name] = torch.stack(each)
        return {name: _rank(name, values) for name, values in quantities.items()}


def _rank(name: str, values: Tensor) -> Tensor:
    """``[1 + L, ...] -> [...]``: the rank of the first among the last L, with ties broken at random."""
    if values.isnan().any():
        raise FloatingPointError(f"{name!r} is NaN under the posterior")
    values = values.cpu()
    below, equal = (values[1:] < values[:1]).sum(0), (values[1:] == values[:1]).sum(0)
    return below + (torch.rand(below.shape, dtype=torch.float64) * (equal + 1)).long()
