"""Rows of training steps of mean-field and rank-1 networks."""

from __future__ import annotations

from tests.benchmarks import training_step
from tests.benchmarks.peers import layers, mean_field, rank1
from tests.benchmarks.peers.row import MEMORY, OURS, PLAIN, TIME, Row
from tests.benchmarks.peers.tasks import LENET, RESNET, WIDE

MEMBERS = "32 in each of 4 members; a plain step sees all 128"

ROWS = (
    Row(
        "mean_field_resnet18",
        "Mean-field step, ResNet-18 (32 x 32 stem), 64 images, SGD",
        mean_field.ways(RESNET),
        targets={TIME: 1.10},
        fact="KL / closed form",
        facts=mean_field.divergences,
        rounds=6,
    ),
    Row(
        "mean_field_mlp",
        "Mean-field step, 784-400-400-10, 128 rows, AdamW",
        mean_field.ways(WIDE, compiles=True),
        targets={TIME: 2.5},
        fact="KL / closed form",
        facts=mean_field.divergences,
        rounds=40,
        burst=5,
    ),
    Row(
        "dense_function",
        "The function of 16 members, forward and backward in train mode: 40 layers of 16 units, 64 rows",
        layers.FUNCTION_WAYS,
        rounds=40,
        burst=5,
    ),
    Row(
        "rank1_mlp",
        f"Rank-1 step, 784-400-400-10, 128 rows, {MEMBERS}. AdamW",
        rank1.ways(WIDE, compiles=True),
        targets={TIME: 2.2},
        rounds=25,
        burst=2,
    ),
    Row(
        "rank1_lenet5",
        f"Rank-1 step, LeNet-5, 128 images of 28 x 28, {MEMBERS}. AdamW",
        rank1.ways(LENET, compiles=True),
        targets={TIME: 1.6},
        rounds=12,
    ),
    Row(
        "layer",
        "Python's cost of one layer: the step of 11 layers of 16 units less that of one, by 10, SGD, 64 rows",
        layers.layer_ways(),
        figures={"ms a layer": layers.milliseconds_a_layer},
        targets={"ms a layer": 0.4},
        rounds=40,
        burst=10,
    ),
    Row(
        "rank1_resnet18",
        "Rank-1 step, ResNet-18, 16 images in each of 4 members; a plain step sees 64 images. Prior Normal(1, .1)",
        {
            PLAIN: training_step.plain,
            OURS: training_step.rank1_row,
            f"{OURS}, one draw a member": training_step.rank1_member,
            "by hand": training_step.hand_rank1_row,
            "by hand, one draw a member": training_step.hand_rank1_member,
        },
        targets={TIME: 1.25, MEMORY: 1.6},
        has_memory=True,
        rounds=6,
    ),
)
