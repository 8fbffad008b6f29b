"""Threads: many at once give what one gives, and leave the process as they found it."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.entry.threads import one_at_a_time

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CATEGORICAL = pb.likelihoods.Categorical()
SHORT = {"epochs": 1, "batch_size": 12, "progress": False, "seed": 0}


def network(*extra: nn.Module) -> nn.Sequential:
    """The same weights at every call, without torch's generator, which is that of all threads."""
    net = nn.utils.skip_init(nn.Linear, 4, 6), *extra, nn.Tanh(), nn.utils.skip_init(nn.Linear, 6, 3)
    for module in net:
        for parameter in module.parameters() if isinstance(module, nn.Linear) else ():
            parameter.data.copy_(torch.linspace(-1, 1, parameter.numel()).sin().reshape(parameter.shape))
    return nn.Sequential(*net)


def mean_field() -> pb.Posterior:
    model = pb.models.Dense(network(nn.BatchNorm1d(6)), CATEGORICAL, 24)
    return pb.inference.fit(model, pb.models.MeanFieldGuide(model), (X, Y), **SHORT)


def rank_1() -> pb.Posterior:
    model = pb.models.Rank1(network(), CATEGORICAL, 24)
    return pb.inference.fit(model, pb.models.Rank1Guide(model, 2, init_means=torch.ones), (X, Y), **SHORT)


def codebook() -> pb.Posterior:
    model = pb.models.WeightSharing(network(), CATEGORICAL, 24)
    return pb.inference.fit(model, pb.models.CodebookGuide(model, 4), (X, Y), **SHORT)


def ensemble() -> pb.Posterior:
    return pb.inference.DeepEnsemble(network(nn.BatchNorm1d(6)), CATEGORICAL, 24, num_networks=3).fit((X, Y), **SHORT)


def swag() -> pb.Posterior:
    settings = SHORT | {"epochs": 3}
    return pb.inference.SWAG(network(nn.BatchNorm1d(6)), CATEGORICAL, 24, rank=2).fit((X, Y), num_samples=3, **settings)


def sghmc() -> pb.Posterior:
    model = pb.models.Dense(network(), CATEGORICAL, 24)
    kernel = pb.inference.SGHMC(model, (X, Y), step_size=0.1, friction=0.1, batch_size=12, capture=False)
    return pb.inference.sample(kernel, 3, progress=False, seed=0)


def dropout() -> pb.Posterior:
    return pb.inference.MCDropout(network(nn.Dropout(0.3)), CATEGORICAL, 24).fit((X, Y), **SHORT)


def particles() -> pb.Posterior:
    model = pb.models.Bella(network(), CATEGORICAL, 24, rank=1)
    with one_at_a_time, torch.random.fork_rng():
        torch.manual_seed(0)
        guide = pb.models.ParticleGuide(model, 3)
    return pb.inference.SVGD(model, guide).fit((X, Y), **SHORT)


def laplace() -> pb.Posterior:
    return pb.inference.LastLayerLaplace(network(), CATEGORICAL, 24).fit((X, Y), **SHORT)


ENGINES = [mean_field, rank_1, codebook, ensemble, swag, sghmc, dropout, particles, laplace]


def at_once(tasks: list[Callable[[], None]]) -> None:
    """Runs every task in a thread of its own, and raises what any of them raised."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def shared_state() -> dict[str, object]:
    """What all threads share, as it is now."""
    return {
        "store": sorted(pyro.get_param_store().keys()),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "validation of Pyro": pyro.infer.is_validation_enabled(),
        "handlers": len(pyro.poutine.runtime._PYRO_STACK),
        "fused attention": torch.backends.mha.get_fastpath_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


def predict_from_threads(posterior: pb.Posterior, times: int) -> None:
    before, random = shared_state(), torch.get_rng_state()
    alone = {seed: posterior.predict(X, seed=seed).outputs for seed in range(3)}
    given: list[tuple[int, Tensor]] = []

    def work(first: int) -> None:
        for i in range(times):
            given.append(((first + i) % 3, posterior.predict(X, seed=(first + i) % 3).outputs))

    at_once([lambda k=k: work(k) for k in range(8)])
    assert len(given) == 8 * times
    assert all(torch.equal(outputs, alone[seed]) for seed, outputs in given)
    assert shared_state() == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_eight_threads_predict_what_one_predicts(engine: Callable[[], pb.Posterior]) -> None:
    """Eight threads with seeds in another order each give, bit for bit, what one thread gives with the same seed."""
    predict_from_threads(engine(), times=6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_eight_threads_predict_a_hundred_times(engine: Callable[[], pb.Posterior]) -> None:
    """The same, a hundred times in each thread."""
    predict_from_threads(engine(), times=100)


def test_fits_loads_saves_and_predictions_at_once_are_those_of_one_thread(tmp_path: Path) -> None:
    """Training, sampling, saving, loading, drawing and predicting in eight threads give what they give alone."""
    served = mean_field()
    served.save(tmp_path / "served")
    expected = {engine: engine().predict(X, seed=5).outputs for engine in (rank_1, sghmc, particles)}
    drawn, predicted = served.draws(4, seed=2), served.predict(X, seed=2).outputs
    before = shared_state()

    def trains(engine: Callable[[], pb.Posterior]) -> None:
        assert torch.equal(engine().predict(X, seed=5).outputs, expected[engine])

    def loads() -> None:
        for _ in range(5):
            posterior = pb.load(tmp_path / "served", network(nn.BatchNorm1d(6)))
            assert torch.equal(posterior.predict(X, seed=2).outputs, predicted)

    def saves() -> None:
        for i in range(5):
            served.save(tmp_path / f"copy_{i}")

    def predicts() -> None:
        for _ in range(10):
            assert torch.equal(served.predict(X, seed=2).outputs, predicted)
            assert all(torch.equal(value, drawn[name]) for name, value in served.draws(4, seed=2).items())

    at_once([lambda e=e: trains(e) for e in expected] + [loads, saves, predicts, predicts, predicts])
    assert shared_state() == before
    for i in range(5):
        copy = pb.load(tmp_path / f"copy_{i}", network(nn.BatchNorm1d(6)))
        assert torch.equal(copy.predict(X, seed=2).outputs, predicted)


def test_what_fails_in_a_thread_leaves_the_others_right() -> None:
    """Predictions that raise, between others that do not, break neither the posterior nor what the process shares."""
    posterior, before = mean_field(), shared_state()
    alone = posterior.predict(X, seed=0).outputs

    def fails() -> None:
        for _ in range(5):
            with pytest.raises(RuntimeError):
                posterior.predict(torch.zeros(3, 7), seed=0)

    def predicts() -> None:
        for _ in range(5):
            assert torch.equal(posterior.predict(X, seed=0).outputs, alone)

    at_once([fails, predicts] * 3)
    assert shared_state() == before


def test_a_fit_that_fails_leaves_everything_as_it_was() -> None:
    """After an exception in the middle of training: store, flags, random state and the modes of model and guide."""
    model = pb.models.Dense(network(nn.BatchNorm1d(6)), CATEGORICAL, 24)
    guide = pb.models.MeanFieldGuide(model)
    model.eval()
    before, random = shared_state(), torch.get_rng_state()

    def interrupt(state: pb.inference.FitState) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pb.inference.fit(model, guide, (X, Y), callbacks=[interrupt], **SHORT)
    assert shared_state() == before
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert guide.training


def test_a_callback_predicts_with_the_posterior_in_training() -> None:
    """The thread that trains may predict in between: neither does it wait for itself nor does training notice."""
    model = pb.models.Dense(network(nn.BatchNorm1d(6)), CATEGORICAL, 24)
    guide = pb.models.MeanFieldGuide(model)
    seen: list[bool] = []

    def look(state: pb.inference.FitState) -> None:
        pb.Posterior(model, guide).predict(X, seed=0)
        seen.append(model.training and guide.training)

    watched = pb.inference.fit(model, guide, (X, Y), callbacks=[look], **(SHORT | {"epochs": 3}))
    model = pb.models.Dense(network(nn.BatchNorm1d(6)), CATEGORICAL, 24)
    alone = pb.inference.fit(model, pb.models.MeanFieldGuide(model), (X, Y), **(SHORT | {"epochs": 3}))
    assert seen == [True] * 3
    assert watched.losses == alone.losses


def test_making_a_posterior_leaves_the_modes_of_its_programs() -> None:
    """A posterior of a model and guide that are still in training leaves both in train mode."""
    model = pb.models.Dense(network(), CATEGORICAL, 24)
    guide = pb.models.MeanFieldGuide(model)
    posterior = pb.Posterior(model, guide)
    draws = posterior.draws(2, seed=0)
    pb.Posterior.from_draws(model, {name: value[:, 0] for name, value in draws.items()}).predict(X)
    posterior.log_likelihood(X, Y, seed=0)
    posterior.networks(1, seed=0)
    assert all(module.training for module in (*model.modules(), *guide.modules()))


def test_what_an_engine_returns_is_in_eval_mode() -> None:
    """Model and guide of a finished posterior are ready for ``pyro.infer.Predictive``."""
    for engine in (mean_field, sghmc, dropout, particles, laplace):
        posterior = engine()
        assert not posterior.model.training
        assert not posterior.guide.training or posterior.num_stored is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_forked_while_another_thread_predicts_can_predict() -> None:
    """A forked process, such as a worker of a loader, does not wait for a thread that it does not have."""
    posterior = mean_field()
    waiting, over = threading.Event(), threading.Event()

    def hold(state: pb.inference.FitState) -> None:
        waiting.set()
        over.wait()

    model = pb.models.Dense(network(), CATEGORICAL, 24)
    guide = pb.models.MeanFieldGuide(model)
    options = SHORT | {"callbacks": [hold]}
    trainer = threading.Thread(target=lambda: pb.inference.fit(model, guide, (X, Y), **options))
    trainer.start()
    waiting.wait()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            threading.Timer(20, os._exit, args=(2,)).start()
            posterior.draws(1, seed=0)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    over.set()
    trainer.join()
    assert os.waitstatus_to_exitcode(status) == 0
