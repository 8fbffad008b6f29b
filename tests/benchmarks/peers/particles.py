"""Low-rank particles beside the same number of LoRA models of PEFT."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD
from pyro_bnn.models import Bella, ParticleGuide
from tests.benchmarks import particles
from tests.benchmarks.peers.row import COMPILED, OURS, PLAIN, Build
from tests.benchmarks.peers.tasks import Task
from tests.benchmarks.peers.tasks import plain as plain_step
from tests.benchmarks.training_step import COMPARED, NUM_DATA, Step, stepper

PARTICLES, RANK = 5, 4


class Encoder(nn.Module):
    """Six layers of a transformer encoder, their mean over 32 places, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x).mean(1))
        return y


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(32, 32, 64), torch.randint(10, (32,))


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in parameters if p.requires_grad], 1e-3)


TASK = Task(Encoder, batch, adam)


def ours(sequential: Any) -> Step:
    x, y = batch()
    model = Bella(Encoder(), pb.likelihoods.Categorical(), NUM_DATA, rank=RANK, head="head")
    engine = SVGD(model, ParticleGuide(model, PARTICLES), sequential=sequential)
    return lambda: engine.step(x, y)


def ours_compiled(sequential: bool) -> Step:
    """A step of ``SVGD.fit(..., compile=True)`` between two comparisons with the model."""
    from pyro_bnn.inference.training.options import checked  # which an older checkout does not have

    x, y = batch()
    model = Bella(Encoder(), pb.likelihoods.Categorical(), NUM_DATA, rank=RANK, head="head")
    engine: Any = SVGD(model, ParticleGuide(model, PARTICLES), sequential=sequential)
    engine.step(x, y)
    particles, _, _ = engine._parts_there
    engine._compile(checked({"compile": True}, "SVGD.fit"), particles)
    for _ in range(COMPARED):
        engine.step(x, y)
    if not len(engine._compiled):
        raise RuntimeError("the step was not compiled")
    return lambda: engine.step(x, y)


def of_peft() -> Step:
    """One step of each model, one after the other: no repulsion between them."""
    from peft import LoraConfig, get_peft_model

    x, y = batch()
    net = Encoder()
    config = LoraConfig(r=RANK, target_modules=["self_attn", "linear1", "linear2"], modules_to_save=["head"])
    models = [get_peft_model(copy.deepcopy(net), config) for _ in range(PARTICLES)]
    steps = [stepper(adam(m.parameters()), partial(_loss, m, x, y)) for m in models]

    def every() -> None:
        for step in steps:
            step()

    return every


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x), y)


ENCODER_WAYS: dict[str, Build] = {
    PLAIN: partial(plain_step, TASK),
    OURS: partial(ours, "auto"),
    f"{OURS}, sequential=True": partial(ours, True),
    f"{OURS}, sequential=False": partial(ours, False),
    f"{OURS}, sequential=True, {COMPILED}": partial(ours_compiled, True),
    f"{OURS}, sequential=False, {COMPILED}": partial(ours_compiled, False),
    f"PEFT, {PARTICLES} LoRA models in turn": of_peft,
}


def resnet_ways(n: int) -> dict[str, Build]:
    return {PLAIN: partial(particles.plain, "ResNet-18"), OURS: partial(particles.particles, "ResNet-18", n)}
