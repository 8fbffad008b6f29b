"""What a cut network saves: ``python -m tests.benchmarks.sparsify``.

LeNet-5 and ResNet-18 (32 x 32 stem) with random weights, of which half of the outputs of every layer but the last are
removed. Sizes, time of a forward pass, and by how much predictions of the posterior differ before and after.
"""

from __future__ import annotations

import argparse
import copy
import functools
from typing import Any

import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.models.architectures import LeNet5, resnet18
from tests.benchmarks.measure import interleaved, report


def halved(net: nn.Module, shift: float) -> pb.Posterior:
    """Two draws, without half of the outputs of every layer; biases and shifts are ``shift`` times a normal."""
    torch.manual_seed(0)
    prior = pb.priors.SpikeAndSlab(0.001, 0.1, inclusion=0.5, group="output")
    model = pb.models.SpikeSlab(net, pb.likelihoods.Categorical(), 100, prior=prior)
    draws = {}
    for site in model.sites():
        assert isinstance(site.center, torch.Tensor)
        value = site.center + 0.01 * torch.randn(2, *site.shape)
        if len(site.shape) == 1 and site.name.endswith("bias"):
            value = shift * torch.randn(2, *site.shape)
        elif len(site.shape) > 1 and site.shape[0] != 10:
            value[:, torch.randperm(site.shape[0])[: site.shape[0] // 2]] = 0
        draws[site.name] = value
    return pb.Posterior.from_draws(model, draws)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    # without shifts in the ResNet: its convolutions have padding, which a constant channel would not survive
    for name, net, shape, shift in (
        ("LeNet-5", LeNet5(), (1, 28, 28), 0.1),
        ("ResNet-18", resnet18(10), (3, 32, 32), 0.0),
    ):
        before, x = halved(net, shift), torch.randn(64, *shape)
        found = before.sparsify(0.0, example=x[:1])
        difference = (found.posterior.predict(x, 2).probs - before.predict(x, 2).probs).abs().max()
        full, small = copy.deepcopy(net).eval(), found.network(0)
        with torch.no_grad():
            runs = {"full": functools.partial(full, x), "small": functools.partial(small, x)}
            seconds = interleaved(runs, rounds)
        rows.append(
            {
                "network": name,
                "reference": "the network as it was",
                "parameters": f"{found.before.parameters:,} -> {found.after.parameters:,}",
                "bytes": f"{found.before.bytes:,} -> {found.after.bytes:,}",
                "multiply_adds": f"{found.before.multiply_adds:,} -> {found.after.multiply_adds:,}",
                "ratio": seconds["small"] / seconds["full"],
                "seconds": seconds["small"],
                "largest_difference": float(difference),
                "difference_target": 1e-5,
            }
        )
    report("sparsify", rows)


if __name__ == "__main__":
    main()
