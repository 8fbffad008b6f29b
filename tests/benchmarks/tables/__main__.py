"""Writes the page: ``python -m tests.benchmarks.tables``, see the text of the package."""

from __future__ import annotations

import argparse

import tests.benchmarks.tables as package
from tests.benchmarks.tables import uci
from tests.benchmarks.tables.page import PAGE, PICTURE, README, page, readme


def main() -> None:
    argparse.ArgumentParser(description=package.__doc__).parse_args()
    PAGE.write_text(page())
    README.write_text(readme(README.read_text()))
    uci.draw(PICTURE)
    print(f"written to {PAGE} and {README}")


if __name__ == "__main__":
    main()
