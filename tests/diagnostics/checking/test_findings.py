"""Findings as a person sees them: lines in a console, a table in a notebook, a list for a program."""

from __future__ import annotations

from html_page import Reader

from pyro_bnn.diagnostics import Finding, Findings
from pyro_bnn.diagnostics.checking.findings import gravest_first

LONG = "a sentence that is longer than what tables of pandas show of a column, which is fifty characters"


def some() -> Findings:
    return gravest_first(
        [
            Finding("good", "accuracy", "It is <b>high</b>."),
            Finding("problem", "training", LONG, "Lower the learning rate."),
            Finding("good", "spread", "It is there."),
        ]
    )


def test_findings_are_a_list_of_which_the_gravest_comes_first() -> None:
    found = some()
    assert isinstance(found, list) and [finding.topic for finding in found] == ["training", "accuracy", "spread"]
    assert found == [found[0], found[1], found[2]] and found[-1].message == "It is there."


def test_findings_print_as_one_line_for_each() -> None:
    lines = [
        f"[problem] training: {LONG} Lower the learning rate.",
        "[good] accuracy: It is <b>high</b>.",
        "[good] spread: It is there.",
    ]
    assert str(some()) == repr(some()) == "\n".join(lines)
    assert str(Findings()) == "Nothing was checked."


def test_a_notebook_shows_a_table_of_whole_sentences_that_are_escaped() -> None:
    reader = Reader(some()._repr_html_())
    assert len(reader.all("tr")) == 4 and len(reader.all("td")) == 12 and not reader.all("b")
    words = [text.strip() for text in reader.texts if text.strip()]
    assert words[:4] == ["severity", "topic", "message", "remedy"]
    assert LONG in words and "It is <b>high</b>." in words
    assert list(some().to_dataframe()["severity"]) == ["problem", "good", "good"]
    assert list(Findings().to_dataframe().columns) == words[:4]
