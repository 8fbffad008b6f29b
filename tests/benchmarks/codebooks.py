"""Cost of codebooks: ``python -m tests.benchmarks.codebooks``.

Seconds to make K = 2048 codes of all weights of ResNet-18, ResNet-101 and ViT-B/16 (untrained, with deviations as a
mean field has them), and what they take in numbers and bytes; a training step of ResNet-18 (32 x 32 stem, batch 128)
with a codebook against the plain network's; prediction from the packed form against that of a mean field, and its
memory.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import MixtureELBO
from pyro_bnn.models import Codebook, CodebookGuide, Dense, MeanFieldGuide, WeightSharing
from pyro_bnn.models.architectures import resnet18
from tests.benchmarks.measure import interleaved, peak_memory, report
from tests.benchmarks.training_step import NUM_DATA, Step, images, pyro_step, sgd, stepper

CODES, BATCH, DRAWS = 2048, 128, 10
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-101": torchvision.models.resnet101,
    "ViT-B/16": torchvision.models.vit_b_16,
}


def mean_field(net: nn.Module) -> tuple[WeightSharing, MeanFieldGuide]:
    """Deviations around 0.007 that differ by a factor of 1.35 from weight to weight."""
    model = WeightSharing(net, pb.likelihoods.Categorical(), NUM_DATA)
    field = MeanFieldGuide(model)
    with torch.no_grad():
        for rho in field.widths().values():
            rho.copy_(-5 + 0.3 * torch.randn_like(rho))
    return model, field


def sizes(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, field = mean_field(NETWORKS[name]())
    start = time.perf_counter()
    guide = CodebookGuide.from_mean_field(model, field, CODES, seed=0)
    seconds = time.perf_counter() - start
    found = guide.compression_report()
    return {
        "step": f"{found['weights'] / 1e6:.1f} M weights of {name} into {found['codes']} codes",
        "seconds": seconds,
        "target": 120.0 if name == "ResNet-18" else None,
        "per_trainable": found["per_trainable"],
        "per_trainable_target": 50.0,
        "of_mean_field": found["of_mean_field"],
        "of_mean_field_target": 0.2,
        "of_network": found["of_network"],
        "of_network_target": 0.4,
    }


def plain() -> Step:
    x, y = images(BATCH)
    net = resnet18(10)
    return stepper(sgd(net.parameters()), lambda: F.cross_entropy(net(x), y))


def elbo_step(model: Any, guide: Any, elbo: Any) -> Step:
    return pyro_step(model, guide, *images(BATCH), elbo)


@cache
def fitted() -> Codebook:
    torch.manual_seed(0)
    return CodebookGuide.from_mean_field(*mean_field(resnet18(10)), CODES, iterations=1, seed=0).book


def codebook(sampling: Any = "codebook") -> Step:
    torch.manual_seed(0)
    model, _ = mean_field(resnet18(10))
    guide = CodebookGuide(model, copy.deepcopy(fitted()), sampling=sampling)
    return elbo_step(model, guide, MixtureELBO())


def mixture() -> Step:
    return codebook("mixture")


def dense() -> Step:
    return elbo_step(*mean_field(resnet18(10)), MixtureELBO())


def autonormal() -> Step:
    model = Dense(resnet18(10), pb.likelihoods.Categorical(), NUM_DATA)
    return elbo_step(model, AutoNormal(model), TraceMeanField_ELBO())


def save_both(folder: Path) -> None:
    torch.manual_seed(0)
    model, field = mean_field(resnet18(10))
    pb.Posterior(model, field).save(folder / "field")
    pb.Posterior(model, CodebookGuide(model, copy.deepcopy(fitted()))).save(folder / "codes")


def prediction(path: Path) -> Step:
    posterior = pb.load(path, resnet18(10))
    x, _ = images(64)
    return lambda: posterior.predict(x, DRAWS, seed=0).probs


def expanded(path: Path) -> Step:
    """What prediction must not do: the weights of all draws first."""
    posterior = pb.load(path, resnet18(10))
    x, _ = images(64)

    def run() -> Tensor:
        every = list(posterior.draw_source.groups(DRAWS))
        draws = {name: torch.cat([group[name] for group in every]) for name in every[0]}
        return pb.Posterior.from_draws(posterior.model, draws).predict(x, DRAWS).probs

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    alternatives = {"codebook": codebook(), "mixture": mixture(), "dense": dense(), "autonormal": autonormal()}
    seconds = interleaved({"plain": plain()} | alternatives, rounds, 1)
    for name in alternatives:
        row = {"step": f"training step, {name}", "reference": "plain", "ratio": seconds[name] / seconds["plain"]}
        rows.append(row | {"target": 1.10 if name == "codebook" else None, "seconds": seconds[name]})
    report("codebooks", rows)
    with tempfile.TemporaryDirectory() as name:
        codes, field = Path(name) / "codes", Path(name) / "field"
        save_both(Path(name))
        predictions = interleaved({"codes": prediction(codes), "field": prediction(field)}, 2, 1)
        memory = peak_memory(partial(prediction, codes), 1)
        rows.append(
            {
                "step": f"{DRAWS} draws of ResNet-18 for 64 images, from the packed file",
                "reference": "mean field",
                "ratio": predictions["codes"] / predictions["field"],
                "seconds": predictions["codes"],
                "peak_mb": memory,
                "memory_ratio": memory / peak_memory(partial(prediction, field), 1),
                "memory_ratio_to_all_draws": memory / peak_memory(partial(expanded, codes), 1),
            }
        )
    report("codebooks", rows)
    for network in NETWORKS:
        rows.append(sizes(network))
        report("codebooks", rows)


if __name__ == "__main__":
    main()
