"""Where tensors live. There is no GPU in CI: forward passes run on a fake ``cuda`` device, which refuses to mix with
the CPU; what needs a real one (backward, storage, autocast) is marked ``gpu``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
import torchvision
from launched import together
from pyro import poutine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torchvision.models.resnet import BasicBlock, ResNet

import pyro_bnn as pb
from pyro_bnn.diagnostics import disagreement, ood_scores
from pyro_bnn.diagnostics.arviz.densities import log_densities
from pyro_bnn.inference import IMQ, RBF, SGHMCEM, KeFanSGHMC, KernelSum, LinearKernel
from pyro_bnn.inference.stein.kernels import Kernel
from pyro_bnn.inference.stein.positions import Positions
from pyro_bnn.models import (
    Bella,
    Codebook,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    ParticleGuide,
    Rank1,
    Rank1Guide,
    SharedWeights,
    WeightSharing,
)
from pyro_bnn.models.architectures import resnet18
from pyro_bnn.models.weight_sharing import clustering, merging, plane
from pyro_bnn.models.weight_sharing.codebook import Between, Codes, Outliers
from pyro_bnn.posterior.network_outputs import network_outputs

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)),
    "resnet": lambda: (ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), pictures()),
    "resnet18": lambda: (resnet18(3), torch.randn(4, 3, 16, 16)),
    "vit": lambda: (torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=3), pictures()),
    "vit_b_16": lambda: (torchvision.models.vit_b_16(image_size=32, num_classes=3), pictures()),
}


def pictures() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def fake(mode: FakeTensorMode, module: nn.Module, device: str) -> nn.Module:
    """A copy of a module whose parameters and buffers are fake tensors on ``device``."""
    module = copy.deepcopy(module)
    with mode:
        for owner in module.modules():
            for name, p in list(owner._parameters.items()):
                if p is not None:
                    value = torch.empty(p.shape, dtype=p.dtype, device=device)
                    owner._parameters[name] = nn.Parameter(value, requires_grad=p.requires_grad)
            for name, b in list(owner._buffers.items()):
                if b is not None:
                    owner._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
    return module


def codebook_for(model: WeightSharing) -> Codebook:
    """Eight codes with labels, outliers and pairs at random: what is tested here depends on shapes alone."""
    sites = [(name, p.shape) for name, p in model.core().parameters_by_name().items() if name in model.weights()]
    n = sum(shape.numel() for _, shape in sites)
    special = torch.randint(n, (60,), generator=torch.Generator().manual_seed(0)).unique()[:20]
    outliers, between = special[::2], special[1::2]
    loc, rho, assignment = torch.randn(8), torch.randn(8), torch.randint(8, (n,))
    return Codebook(
        sites,
        assignment,
        Codes(loc, rho, torch.eye(2).expand(8, 2, 2).clone()),
        Outliers(outliers, torch.randn(10), torch.randn(10)),
        Between(between, torch.randint(8, (10, 2)), torch.rand(10)),
    )


@pytest.mark.parametrize(
    "network, method",
    [
        pytest.param(network, method, marks=[pytest.mark.slow] if is_slow else [])
        for method in ("rank1", "dense", "bella", "codebook", "mixture", "shared")
        for network in NETWORKS
        for is_slow in [network in ("resnet18", "vit_b_16")]
    ],
)
def test_every_tensor_of_guide_model_and_prediction_is_on_the_networks_device(network: str, method: str) -> None:
    """Proves that guide trace, replayed model, log densities and prediction need no tensor of another device."""
    net, x = NETWORKS[network]()
    likelihood = pb.likelihoods.Categorical()
    model: Rank1 | Dense | Bella | SharedWeights
    guide: Rank1Guide | MeanFieldGuide | ParticleGuide | CodebookGuide
    if method == "rank1":
        model = Rank1(net, likelihood, 100)
        guide = Rank1Guide(model, components=2, init_stratified=True)
        with torch.no_grad():
            model(x)  # layouts are read off values, once; the shapes are then known
        weights = model.weights
    elif method == "bella":
        head = {"mlp": "2", "resnet": "fc", "resnet18": "fc", "vit": "heads.head", "vit_b_16": "heads.head"}[network]
        affine = network != "mlp"
        model = Bella(net, likelihood, 100, prior=pb.priors.HierarchicalNormal(), head=head, affine=affine)
        guide = ParticleGuide(model, 2)
        with torch.no_grad():
            model(x)
        weights = model.weights
    elif method in ("codebook", "mixture", "shared"):
        own = {".*bias|.*token|.*embedding": pb.priors.Normal(), ".*": pb.priors.CodebookPrior()}
        prior: pb.priors.PriorLike = own if method == "mixture" else pb.priors.HierarchicalNormal()
        model = WeightSharing(net, likelihood, 100, prior=prior)
        guide = CodebookGuide(model, codebook_for(model), sampling="mixture" if method == "mixture" else "codebook")
        weights = model.weights()
        if method == "shared":
            model = SharedWeights(net, likelihood, 100, codebook=guide.book)
            guide = model.shared_guide()
    else:
        model = Dense(net, likelihood, 100, prior=pb.priors.HierarchicalNormal())
        guide = MeanFieldGuide(model)
        weights = model.random
    rows = model.core().activation_elements(x, len(x))
    mode = FakeTensorMode()
    on_gpu, guide_on_gpu = fake(mode, model, "cuda"), fake(mode, guide, "cuda")
    assert isinstance(on_gpu, type(model)) and isinstance(guide_on_gpu, type(guide))
    if isinstance(on_gpu, WeightSharing) and isinstance(guide_on_gpu, CodebookGuide):
        on_gpu.take_codebook(guide_on_gpu.book, method == "mixture")
    with mode, pyro.validation_enabled(False), torch.no_grad(), pyro.get_param_store().scope():
        x_gpu, y_gpu = torch.empty(x.shape, device="cuda"), torch.empty(len(x), dtype=torch.long, device="cuda")
        for train in (True, False):
            guide_on_gpu.train(train)
            on_gpu.train(train)
            guide_trace = poutine.trace(guide_on_gpu).get_trace(x_gpu, y_gpu)
            model_trace = poutine.trace(poutine.replay(on_gpu, trace=guide_trace)).get_trace(x_gpu, y_gpu)
            for trace in (guide_trace, model_trace):
                trace.compute_log_prob()
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and site["value"].numel():
                        assert site["value"].device.type == "cuda", name
                        assert site["log_prob"].device.type == "cuda", name
        posterior = pb.Posterior(on_gpu, guide_on_gpu)
        latents = posterior.draws(3)
        assert {v.device.type for v in latents.values()} == {"cuda"}
        outputs = network_outputs(on_gpu, latents, x_gpu, posterior.num_members)
        prediction = pb.Prediction(outputs, likelihood)
        scores = [disagreement(prediction), *ood_scores(prediction).values()]
        density = likelihood.given(outputs, y_gpu, lead=3)  # prediction.log_prob reads the labels first
        for value in (prediction.probs, prediction.entropy, density.log_prob(y_gpu), *scores):
            assert isinstance(value, FakeTensor) and value.device.type == "cuda"
        for density in log_densities(posterior, 3):
            assert density is None or density.device.type == "cuda"
    assert weights and rows
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_stray_cpu_tensor_fails_on_the_fake_device() -> None:
    """Proves that the test above can fail: a network with a constant of its own on the CPU is caught."""

    class Stray(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.constant = torch.ones(2)  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.constant

    model = Rank1(Stray(), pb.likelihoods.Categorical(), 10)
    guide = Rank1Guide(model, components=2)
    x = torch.randn(4, 3)
    with torch.no_grad():
        model(x)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_gpu, guide_on_gpu = fake(mode, model, "cuda"), fake(mode, guide, "cuda")
    with mode, pyro.validation_enabled(False), torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        x_gpu = torch.empty(x.shape, device="cuda")
        guide_trace = poutine.trace(guide_on_gpu).get_trace(x_gpu)
        poutine.replay(on_gpu, trace=guide_trace)(x_gpu)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("method", ["rank1", "dense"])
def test_training_saving_and_predicting_on_a_gpu(tmp_path, autocast: bool, method: str) -> None:  # type: ignore[no-untyped-def]
    """Proves the whole way on a real device: the loss falls, and a saved posterior predicts bit for bit the same."""
    torch.manual_seed(0)
    net = resnet18(3).cuda()
    x, y = torch.randn(96, 3, 16, 16), torch.randint(3, (96,))
    x += y.view(-1, 1, 1, 1).float()
    model: Rank1 | Dense
    if method == "rank1":
        model = Rank1(net, pb.likelihoods.Categorical(), 96)
        guide: Rank1Guide | MeanFieldGuide = Rank1Guide(model, components=2)
    else:
        model = Dense(net, pb.likelihoods.Categorical(), 96)
        guide = MeanFieldGuide(model, init_scale=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        posterior = pb.inference.fit(
            model, guide, (x, y), epochs=8, batch_size=32, progress=False, seed=0, kl_annealing=8
        )
        before = posterior.predict(x, num_samples=2, seed=1).probs
        posterior.save(tmp_path / "posterior")
        after = pb.load(tmp_path / "posterior", resnet18(3).cuda()).predict(x, num_samples=2, seed=1).probs
    assert before.is_cuda and torch.equal(before, after)
    assert all(p.is_cuda for p in [*model.parameters(), *guide.parameters()])
    assert posterior.log_likelihood(x, y, num_samples=2).is_cuda
    leaves = pytree.tree_leaves(posterior.sample(2))
    assert all(leaf.is_cuda for leaf in leaves)
    assert (before.argmax(-1).cpu() == y).float().mean() > 0.5


def relocate(owner: Any, moved: Callable[[Tensor], Tensor], skipped: tuple[Any, ...]) -> None:
    """Puts every tensor that an object of this package holds, whatever its name, through ``moved``."""
    for name, value in vars(owner).items():
        if any(value is one for one in skipped):
            continue
        if isinstance(value, Tensor):
            setattr(owner, name, moved(value))
        elif isinstance(value, list) and value and all(isinstance(one, Tensor) for one in value):
            setattr(owner, name, [moved(one) for one in value])
        elif isinstance(value, dict) and value and all(isinstance(one, Tensor) for one in value.values()):
            setattr(owner, name, {key: moved(one) for key, one in value.items()})
        elif type(value).__module__.startswith("pyro_bnn") and hasattr(value, "__dict__"):
            relocate(value, moved, (*skipped, owner))


@pytest.mark.parametrize(
    ("kernel_class", "options"), [(SGHMCEM, {"preconditioner": "adaptive"}), (KeFanSGHMC, {})], ids=["em", "ke_fan"]
)
def test_every_tensor_of_a_step_of_sghmc_within_em_is_on_the_networks_device(
    kernel_class: type[SGHMCEM] | type[KeFanSGHMC],
    options: dict[str, Any],
) -> None:
    """Proves that energy, E- and M-step, removal, force and update need no tensor of another device, nor a value."""
    x, y = torch.randn(8, 3, 8, 8), torch.randint(3, (8,))
    variance = pyro.distributions.InverseGamma(2.0, 2.0)
    prior = {
        ".*conv.*": pb.priors.SpikeAndSlab(0.1, 1.0, group="kernel", variance_prior=variance),
        "fc.weight": pb.priors.SpikeAndSlab(0.1, 1.0, group="input", inclusion=0.5),
        ".*": pb.priors.Normal(),
    }
    model = pb.models.SpikeSlab(resnet18(3), pb.likelihoods.Categorical(), 8, prior=prior)
    kernel = kernel_class(
        model,
        (x, y),
        step_size=0.1,
        friction=0.1,
        prune="magnitude_schedule",
        prune_start=0,
        **options,
    )
    kernel.setup(5)
    mode = FakeTensorMode()
    on_gpu = fake(mode, model, "cuda")
    with mode, pyro.validation_enabled(False), torch.no_grad(), pyro.get_param_store().scope():

        def moved(value: Tensor) -> Tensor:
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")

        sites = list(kernel.sites)
        for owner in (kernel, *sites):
            relocate(owner, moved, (model, kernel.streams, kernel.gradient, *sites, *(s.density for s in sites)))
        kernel.potential.model = on_gpu
        views = kernel.potential.split(kernel.theta)
        for site in sites:
            site.weights = views[site.name].view(site.density.event_shape)
            site.renew()
        kernel.mask = moved(kernel.theta)
        kernel.renew_noise()
        energy = kernel.potential(views, moved(x), moved(y))
        kernel.expect(0.5)
        for site in sites:
            site.maximise(0.5)
        assert kernel.prune is not None
        for site, stays in zip(sites, kernel.prune(sites, 0.5), strict=True):
            site.kept &= stays
        kernel.write_mask()
        grad = moved(kernel.theta)
        for site, own in zip(sites, kernel.views(grad), strict=True):
            site.density.add_force_(own, site.weights, site.included)
        kernel.update(grad, 0)
        state = kernel.initial_params
        assert {t.device.type for t in [energy, kernel.theta, *state.values()]} == {"cuda"}
        assert isinstance(energy, FakeTensor) and "conv1.weight_inclusion" in state


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chains", [1, 3])
def test_sampling_and_cutting_on_a_gpu(tmp_path, chains: int) -> None:  # type: ignore[no-untyped-def]
    """Proves that chains, removal, prediction, a cut network and a saved posterior live on a real device."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    x, y = torch.randn(96, 3, 4, 4), torch.randint(3, (96,))
    x += y.view(-1, 1, 1, 1).float()
    prior = pb.priors.SpikeAndSlab(0.02, 1.0, group="output")
    model = pb.models.SpikeSlab(net, pb.likelihoods.Categorical(), 96, prior=prior)
    kernel = pb.inference.SGHMCEM(
        model,
        (x, y),
        step_size=0.05,
        friction=0.1,
        batch_size=32,
        thinning=10,
        prune=pb.inference.pruning.MagnitudeRule(0.4),
    )
    posterior = pb.inference.sample(kernel, 10, 10, chains, seed=0, progress=False)
    assert {value.device.type for value in posterior.draws(10).values()} == {"cuda"}
    reference = posterior.predict(x, 10, seed=0).probs
    assert reference.device.type == "cuda"
    if chains == 1:
        found = posterior.sparsify(0.0, example=x[:1])
        torch.testing.assert_close(found.posterior.predict(x, 10, seed=0).probs, reference, rtol=1e-4, atol=1e-5)
        assert found.after.parameters < found.before.parameters
    posterior.save(tmp_path / "run")
    assert torch.equal(pb.load(tmp_path / "run", net).predict(x, 10, seed=0).probs, reference)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_weight_sharing_on_a_gpu(tmp_path, sampling: str) -> None:  # type: ignore[no-untyped-def]
    """Proves that clustering, training, merging, packing and prediction run on a real device, with the CPU's labels."""
    torch.manual_seed(0)
    net = resnet18(3)
    x, y = torch.randn(96, 3, 16, 16), torch.randint(3, (96,))
    x += y.view(-1, 1, 1, 1).float()
    on_cpu = CodebookGuide(WeightSharing(net, pb.likelihoods.Categorical(), 96), 64, iterations=3)
    model = WeightSharing(net.cuda(), pb.likelihoods.Categorical(), 96)
    guide = CodebookGuide(model, 64, sampling=sampling, init_scale=1e-3, iterations=3)  # type: ignore[arg-type]
    assert all(v.is_cuda for v in [*guide.parameters(), *guide.buffers()])
    torch.testing.assert_close(guide.book.loc.cpu(), on_cpu.book.loc, rtol=1e-3, atol=1e-5)
    posterior = pb.inference.fit(
        model,
        guide,
        (x, y),
        epochs=8,
        batch_size=32,
        progress=False,
        seed=0,
        kl_annealing=8,
        callbacks=[MergeCodes(start=4, every=2)],
    )
    before = posterior.predict(x, num_samples=2, seed=1).probs
    posterior.save(tmp_path / "posterior")
    loaded = pb.load(tmp_path / "posterior", resnet18(3).cuda())
    after = loaded.predict(x, num_samples=2, seed=1).probs
    assert before.is_cuda and torch.equal(before, after)
    assert (before.argmax(-1).cpu() == y).float().mean() > 0.5


@pytest.mark.parametrize("zero", [False, True])
def test_clustering_merging_and_packing_stay_on_the_device(zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the stages whose shapes depend on no value need no tensor of another device; ``meta`` has none.

    What counts, sorts out or searches depends on values, which a fake device has not: densities and distances,
    moments and draws are what is run here, and the rest on a real one, above.
    """
    with FakeTensorMode():
        x = torch.empty(900, 2, device="cuda")
        labels = torch.zeros(900, dtype=torch.int32, device="cuda")
        eye = torch.eye(2, device="cuda").expand(5, 2, 2)
        codes = plane.PlaneMixture(torch.empty(5, device="cuda"), torch.empty(5, 2, device="cuda"), eye)
        floor = clustering.covariance_floor(x, 5)
        index, valid = plane.sort_into_tiles(x)
        half, bias = codes.log_scores()
        near = plane.codes_near_tiles(x[index], codes, half, bias, 1.0)
        table = torch.cat([codes.means.double(), half.flatten(1)[:, [0, 2, 3]], bias[:, None]], 1)
        chosen = torch.zeros(len(index), 3, dtype=torch.long, device="cuda")
        used = torch.ones(len(index), 3, dtype=torch.bool, device="cuda")
        part = plane.score_tiles(x, index, valid, 0, chosen, used, table)
        monkeypatch.setattr(plane, "scored_tiles", lambda *args: [part])
        stepped, likelihood = plane.em_step(x, codes, floor)
        pinned = clustering.pin_first_code(stepped, zero)
        moments = clustering.moments(x, labels, codes, floor)
        distances = plane.mahalanobis(x, labels, codes)
        outliers = clustering.find_outliers(x[:, 0], x[:, 1], cap=0.1)
        merged = merging.merge_pair(codes, codes, "w2")
        cost = merging.merge_distances(codes, slice(0, 2), None, 1.0, 1.0)
        near_codes = merging.neighbour_distance(codes)
        found = [near, part.scores, likelihood, pinned.means, moments.covariances, distances, outliers]
        for value in (*found, merged.covariances, cost, near_codes):
            assert isinstance(value, FakeTensor) and value.device.type == "cuda"


@pytest.mark.parametrize("kernel", [RBF(), IMQ(), LinearKernel(), KernelSum([RBF(), LinearKernel()])])
def test_kernels_stay_on_the_device(kernel: Kernel) -> None:
    """Proves that Gram matrices, bandwidths and repulsion, in coordinates and in products, need no other device."""
    with FakeTensorMode():
        flat = torch.empty(5, 40, device="cuda")
        a, b = torch.empty(5, 2, 7, device="cuda"), torch.empty(5, 6, 2, device="cuda")
        points = Positions([flat], [(a, b, 4.0)])
        values = points.evaluate(kernel)
        for own in (True, False):
            (repulsion,), ((of_a, of_b),) = points.gradients(values, own=own)
            for value, like in ((repulsion, flat), (of_a, a), (of_b, b)):
                assert value.device.type == "cuda" and value.shape == like.shape and value.dtype == like.dtype


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("method", ["svgd", "wgd", "ensemble"])
def test_particles_on_a_gpu(tmp_path, method: str) -> None:  # type: ignore[no-untyped-def]
    """Proves training, storage and prediction of particles on a GPU, with one storage for the frozen weights."""
    net = resnet18(3).cuda()
    x, y = torch.randn(16, 3, 16, 16, device="cuda"), torch.randint(3, (16,), device="cuda")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = Bella(net, pb.likelihoods.Categorical(), 16, head="fc")
    guide = ParticleGuide(model, 3)
    posterior = pb.inference.SVGD(model, guide, method=method, lr=1e-3).fit(  # type: ignore[arg-type]
        (x, y), 3, batch_size=8, progress=False, seed=0
    )
    assert all(p.is_cuda for p in guide.parameters())
    for mine, theirs in zip(model.core().net.parameters(), net.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    probs = posterior.predict(x, num_samples=1).probs
    assert probs.is_cuda and bool(torch.isfinite(probs).all())
    posterior.save(tmp_path / "p")
    torch.testing.assert_close(pb.load(tmp_path / "p", net).predict(x, num_samples=1).probs, probs)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["rank1", "bella"])
def test_mixed_precision_on_a_gpu(engine: str, precision: Any) -> None:
    """Proves that autocast, and for fp16 the factor of the loss, reach the loss of float32 within 5 %."""

    def losses(**options: Any) -> list[float]:
        torch.manual_seed(0)
        net = resnet18(3).cuda()
        x, y = torch.randn(96, 3, 16, 16), torch.arange(96) % 3
        x += y.view(-1, 1, 1, 1).float()
        run: dict[str, Any] = {"batch_size": 32, "progress": False, "seed": 0} | options
        if engine == "rank1":
            model = Rank1(net, pb.likelihoods.Categorical(), 96)
            return pb.inference.fit(model, Rank1Guide(model), (x, y), epochs=8, **run).losses
        bella = Bella(net, pb.likelihoods.Categorical(), 96, head="fc")
        return pb.inference.SVGD(bella, ParticleGuide(bella, 2), lr=1e-2).fit((x, y), 8, **run).losses

    full, half = losses(), losses(precision=precision)
    assert sum(half[-6:]) == pytest.approx(sum(full[-6:]), rel=0.05)


def on_gpus() -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(0)
    model = Dense(nn.Linear(5, 3).cuda(), pb.likelihoods.Categorical(), 64)
    guide = pb.models.PointGuide(model)
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    losses = pb.inference.fit(
        model, guide, (x, (x[:, 0] > 0).long()), epochs=3, batch_size=64, optim="sgd", lr=0.1, progress=False
    ).losses
    return [p.detach().cpu() for p in guide.parameters()], losses


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, one for each process")
def test_two_processes_over_nccl_take_the_steps_of_one(tmp_path: Any) -> None:
    found = together(on_gpus, tmp_path, method="spawn")
    whole = on_gpus()
    for parameters, losses in found:
        assert losses == pytest.approx(whole[1], rel=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(parameters, whole[0], strict=True))


@pytest.mark.gpu
@needs_gpu
def test_a_step_of_the_objective_in_a_cuda_graph() -> None:
    """Proves that the loss and its gradient of a guide without draws can be captured and replayed on new data."""
    torch.manual_seed(0)
    model = Dense(nn.Linear(5, 3).cuda(), pb.likelihoods.Categorical(), 64)
    guide = pb.models.PointGuide(model)
    objective = pb.inference.Objective(model, guide)
    x, y = torch.randn(32, 5, device="cuda"), torch.randint(3, (32,), device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            objective.zero_grad()
            objective(x, y).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    objective.zero_grad()
    with torch.cuda.graph(graph):
        loss = objective.loss(x, y)
        loss.backward()
    other = torch.randn(32, 5, device="cuda")
    x.copy_(other)
    graph.replay()
    captured = [p.grad.clone() for p in objective.trained() if p.grad is not None]
    objective.zero_grad()
    expected = objective(other, y)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, p in zip(captured, objective.trained(), strict=True):
        torch.testing.assert_close(gradient, p.grad)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("method", ["rank1", "dense"])
@pytest.mark.parametrize("how", [True, "reduce-overhead"])
def test_compiled_work_on_a_gpu(how: Any, method: str, precision: Any) -> None:
    """Proves that compiled training, sampling and prediction on a real device are those of the models themselves."""
    x, y = torch.randn(96, 3, 8, 8), torch.randint(3, (96,))
    found = []
    for compile in (how, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).cuda()
        model = (Rank1 if method == "rank1" else Dense)(net, pb.likelihoods.Categorical(), 96)
        guide = Rank1Guide(model, components=2) if isinstance(model, Rank1) else MeanFieldGuide(model)
        options: dict[str, Any] = {"precision": precision, "compile": compile, "kl_annealing": 2}
        posterior = pb.inference.fit(model, guide, (x, y), epochs=4, batch_size=32, progress=False, seed=0, **options)
        if compile:
            posterior.compile("default" if compile is True else compile)
        probs = posterior.predict(x, num_samples=2, seed=1).probs
        chain = pb.inference.SGHMC(
            Dense(copy.deepcopy(net), pb.likelihoods.Categorical(), 96),
            (x, y),
            step_size=0.01,
            friction=0.1,
            compile=compile,
        )
        draws = pb.inference.sample(chain, 3, 1, seed=0, progress=False).draws(3)
        found.append((torch.tensor(posterior.losses), probs, *draws.values()))
    assert found[0][1].is_cuda
    size = 1e-3 if precision is None else 5e-2
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=size, atol=size)
