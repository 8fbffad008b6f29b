"""Rows of training steps of mean-field and rank-1 networks."""

from __future__ import annotations

from tests.benchmarks.peers import mean_field
from tests.benchmarks.peers.row import TIME, Row
from tests.benchmarks.peers.tasks import RESNET, WIDE

ROWS = (
    Row(
        "mean_field_resnet18",
        "Mean-field step, ResNet-18 (32 x 32 stem), 64 images, SGD",
        mean_field.ways(RESNET),
        targets={TIME: 1.10},
        facts=mean_field.divergences,
        rounds=6,
    ),
    Row(
        "mean_field_mlp",
        "Mean-field step, 784-400-400-10, 128 rows, AdamW",
        mean_field.ways(WIDE),
        facts=mean_field.divergences,
        rounds=40,
        burst=5,
    ),
)
