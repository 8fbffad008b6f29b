"""All rows, in the order in which they are measured and shown."""

from tests.benchmarks.peers import prediction_rows, sampling_rows, training_rows
from tests.benchmarks.peers.row import Row

ROWS: dict[str, Row] = {row.name: row for row in (*training_rows.ROWS, *sampling_rows.ROWS, *prediction_rows.ROWS)}
