"""Rows of prediction, evaluation, ``fit`` and new processes."""

from __future__ import annotations

from tests.benchmarks.peers import prediction
from tests.benchmarks.peers.prediction import DRAWS, deep_chain, few_rows, many_rows
from tests.benchmarks.peers.row import Row, over_part, over_plain
from tests.benchmarks.peers.tasks import wide

PASS = "time / plain pass"

ROWS = (
    *(
        Row(
            f"predict_{draws}",
            f"predict with {draws} draw{'s' * (draws > 1)}: 160 layers of 16 units, 64 rows; over one plain pass",
            prediction.ways(deep_chain, few_rows, draws),
            figures={PASS: over_plain()},
            rounds=8,
        )
        for draws in (100, 1)
    ),
    Row(
        "predict_mlp",
        f"predict with {DRAWS} draws: 784-400-400-10, 1,000 rows; over one plain pass",
        prediction.ways(wide, many_rows, DRAWS),
        figures={PASS: over_plain()},
        has_memory=True,
        rounds=8,
    ),
    Row(
        "evaluate",
        "evaluate and check over predict: 784-400-400-10, 16 draws, 2,560 rows",
        prediction.EVALUATION_WAYS,
        figures={
            "evaluate / predict": over_part("evaluate", "predict"),
            "check / predict": over_part("check", "predict"),
        },
        targets={"evaluate / predict": 1.1, "check / predict": 1.3},
        rounds=4,
    ),
    Row(
        "fit",
        "One step within fit, without its start: mean field of 16-50-10, 64 rows; a plain step is that of a loop",
        prediction.FIT_WAYS,
        figures={"time / plain step": prediction.fit_over_plain, "ms a step": prediction.milliseconds_a_step},
        rounds=7,
    ),
    Row(
        "fit_start",
        "What fit does before its first step, and by which that is slower than the second: rank-1 ResNet-50, "
        "16 images of 64 x 64",
        prediction.START_WAYS,
        figures={"start / plain step": prediction.start_over_plain, "seconds": prediction.start_in_seconds},
        targets={"start / plain step": 2.0},
        rounds=2,
    ),
    Row(
        "process",
        "A new process; over one that imports torch",
        prediction.PROCESS_WAYS,
        figures={"time / import torch": over_plain(), "seconds": prediction.seconds},
        rounds=4,
    ),
)
