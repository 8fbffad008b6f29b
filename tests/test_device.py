"""Where tensors live. There is no GPU in CI: forward passes run on a fake ``cuda`` device, which refuses to mix with
the CPU; what needs a real one (backward, storage, autocast) is marked ``gpu``."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pytest
import torch
import torchvision
from pyro import poutine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import pyro_bnn as pb
from pyro_bnn.models import Dense, MeanFieldGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import resnet18

NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5)),
    "resnet18": lambda: (resnet18(3), torch.randn(4, 3, 16, 16)),
    "vit_b_16": lambda: (torchvision.models.vit_b_16(image_size=32, num_classes=3), torch.randn(4, 3, 32, 32)),
}


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


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["rank1", "dense"])
def test_every_tensor_of_guide_model_and_prediction_is_on_the_networks_device(network: str, method: str) -> None:
    """Proves that guide trace, replayed model, log densities and prediction need no tensor of another device."""
    net, x = NETWORKS[network]()
    likelihood = pb.likelihoods.Categorical()
    model: Rank1 | Dense
    guide: Rank1Guide | MeanFieldGuide
    if method == "rank1":
        model = Rank1(net, likelihood, 100)
        guide = Rank1Guide(model, components=2)
        with torch.no_grad():
            model(x)  # layouts are read off values, once; the shapes are then known
        weights = model._perturbed()
    else:
        model = Dense(net, likelihood, 100, prior=pb.priors.HierarchicalNormal())
        guide = MeanFieldGuide(model)
        weights = model.random
    rows = model.core().activation_elements(x, len(x))
    mode = FakeTensorMode()
    on_gpu, guide_on_gpu = fake(mode, model, "cuda"), fake(mode, guide, "cuda")
    assert isinstance(on_gpu, (Rank1, Dense)) and isinstance(guide_on_gpu, (Rank1Guide, MeanFieldGuide))
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
        outputs = posterior._outputs(on_gpu, latents, x_gpu, None)
        prediction = pb.Prediction(outputs, likelihood)
        for value in (prediction.probs, prediction.entropy, prediction.log_prob(y_gpu)):
            assert isinstance(value, FakeTensor) and value.device.type == "cuda"
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
