"""The page of results, and the table of the README, as texts."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.tables import compression, few_digits, finetune, images, reference, sequences, uci
from tests.benchmarks.uci import published

DOCS = Path(__file__).parents[3] / "docs"
PAGE, README, PICTURE = DOCS / "results.md", DOCS.parent / "README.md", DOCS / "uci.png"
#: between these lines of the README stands what is made of results
BEGIN, END = "<!-- results: made by python -m tests.benchmarks.tables -->", "<!-- end of results -->"
#: what the README shows
SHORT = ("one network", "ensemble of 5", "MC dropout", "rank-1", "SGHMC, predicted noise", "SGHMC")

START = """\
# What the methods reach

This page is made of the results of the benchmarks; do not edit it by hand.

```
python -m tests.benchmarks.uci
python -m tests.benchmarks.uci --gaps
python -m tests.benchmarks.images
python -m tests.benchmarks.reference
python -m tests.benchmarks.sequences
python -m tests.benchmarks.few_digits
python -m tests.benchmarks.finetune
python -m tests.benchmarks.compression --network lenet5
python -m tests.benchmarks.tables
```

Settings are chosen within the training rows, never on test rows, and a rival has as many of them as ours. A figure is
the mean over splits or seeds, with its standard error; the best of a column is bold, and so are those within a standard
error of it; none is where methods were measured on different splits.
"""


def page() -> str:
    parts = (uci, images, sequences, few_digits, finetune, compression, reference)
    sections = [text for part in parts for text in part.section()]
    return "\n\n".join(text.strip() for text in [START, *sections]) + "\n"


def readme(text: str) -> str:
    """The README with the present table between its two lines."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    rivals = {name: published.NLL[name] for name in published.RIVALS}
    shown = uci.uci_table("nll", "split", rivals, (*SHORT, uci.BEST))
    return f"{before}{BEGIN}\n{uci.progress()}\n\n{shown}\n{END}{after}"
