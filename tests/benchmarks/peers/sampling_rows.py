"""Rows of particles and of SGHMC."""

from __future__ import annotations

from tests.benchmarks.peers import particles, sampling
from tests.benchmarks.peers.row import MEMORY, TIME, Row, over_plain

ROWS = (
    Row(
        "bella_encoder",
        "A step of 5 particles of rank 4 over 5 plain steps by Adam: transformer encoder of 6 layers, d = 64, 32 x 32",
        particles.ENCODER_WAYS,
        figures={"time / 5 plain steps": over_plain(5)},
        targets={"time / 5 plain steps": 1.0},
        rounds=12,
    ),
    *(
        Row(
            f"bella_resnet18_{n}",
            f"A step of SVGD, particles of rank 4: {n}, over as many plain steps by Adam. ResNet-18, 64 images",
            particles.resnet_ways(n),
            figures={f"time / {n} plain step{'s' * (n > 1)}": over_plain(n)},
            targets={f"time / {n} plain step{'s' * (n > 1)}": 0.80},
            rounds=3 if n < 20 else 2,
        )
        for n in (1, 5, 20)
    ),
    Row(
        "sghmc_chains",
        "16 SGHMC chains of a 13-50-1 network on all of 400 rows; a plain step is one of SGD on one network",
        sampling.CHAIN_WAYS,
        figures={TIME: over_plain(), "steps a second": sampling.steps_a_second},
        rounds=8,
    ),
    Row(
        "sghmc_resnet18",
        "An SGHMC step of ResNet-18, 64 images; a plain step is one of SGD with momentum",
        sampling.LARGE_WAYS,
        targets={TIME: 1.05, MEMORY: 1.2},
        has_memory=True,
        rounds=6,
    ),
)
