"""The page about costs is what its generator makes of the committed results, and says what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks import performance_page
from tests.benchmarks.measure import read_results
from tests.benchmarks.peers import running
from tests.benchmarks.peers.row import MEMORY, OURS, PLAIN, TIME, Cannot, Row
from tests.benchmarks.peers.running import gathered, measure


def idle() -> Callable[[], Any]:
    return lambda: None


def working() -> Callable[[], Any]:
    return lambda: sum(range(100))


def absent() -> Callable[[], Any]:
    raise ModuleNotFoundError("No module named 'torchbnn'", name="torchbnn")


def unable() -> Callable[[], Any]:
    raise Cannot("it has no such method")


def broken() -> Callable[[], Any]:
    raise RuntimeError("sizes do not match\nand more")


WAYS = {PLAIN: idle, OURS: idle, "torchbnn": absent, "NumPyro": unable, "blitz": broken}


def run(ways: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """One row of results."""
    row = {"row": "some", "title": "Some step", "threads": 1, "processes": 2, "rounds": 1, "load average": [0.0]}
    return row | {"before": None, "targets": {}, "ways": ways, "fact": "", "facts": {}} | changes


def way(*values: float) -> dict[str, Any]:
    """An alternative with these ratios in as many processes."""
    processes = [{"some": {"figures": {TIME: value}, "seconds": {"step": 0.001}}} for value in values]
    return gathered(processes)["some"]


def test_the_committed_page_is_what_the_generator_makes_of_the_committed_results() -> None:
    made = performance_page.page(read_results("peers"), read_results("growth"))
    hint = "run: python -m tests.benchmarks.performance_page"
    assert performance_page.PAGE.read_text(encoding="utf-8") == made, hint


def test_a_peer_that_is_missing_or_cannot_do_the_work_says_so_in_its_row() -> None:
    found = gathered([measure(Row("some", "Some step", WAYS), rounds=1)])
    assert found["torchbnn"] == {"reason": "not installed"}
    assert found["NumPyro"] == {"reason": "it has no such method"}
    assert found["blitz"] == {"reason": "fails: RuntimeError: sizes do not match"}
    text = performance_page.of_row([run(found)])
    assert "| torchbnn | not installed |" in text and "| NumPyro | it has no such method |" in text


def test_what_fails_of_ours_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="sizes"):
        measure(Row("some", "Some step", {PLAIN: idle, OURS: broken}), rounds=1)
    with pytest.raises(ModuleNotFoundError):
        measure(Row("some", "Some step", {PLAIN: absent}), rounds=1)


def test_another_checkout_may_lack_what_a_row_needs() -> None:
    found = measure(Row("some", "Some step", {PLAIN: idle, OURS: broken}), rounds=1, may_fail=True)
    assert found[OURS] == {"reason": "fails: RuntimeError: sizes do not match"}


def test_the_page_has_median_and_range_and_whether_a_target_is_met() -> None:
    one = {PLAIN: way(1.0), OURS: way(1.3, 1.0, 1.1), "blitz": way(4.0, 4.0), f"{OURS} (before)": way(2.0)}
    two = {PLAIN: way(1.0), OURS: way(1.25), "blitz": way(4.0)}
    rows = [run(one, targets={TIME: 1.2}, before="abcdef0123"), run(two, targets={TIME: 1.2}, threads=2)]
    lines = performance_page.of_row(rows).splitlines()
    target = f"{TIME} at most 1.2: met on 1 thread, missed on 2 threads"
    assert f"| ours | 1.1 (1 to 1.3) | 1.25 | {target} |" in lines
    assert (
        lines.index("| ours (before) | 2 | not measured |  |")
        == lines.index(f"| ours | 1.1 (1 to 1.3) | 1.25 | {target} |") + 1
    )
    assert "| blitz | 4 | 4 |  |" in lines
    assert any("commit abcdef0" in line for line in lines)


def test_memory_is_measured_beside_time(monkeypatch: pytest.MonkeyPatch) -> None:
    megabytes = {idle: 64.0, working: 128.0}
    monkeypatch.setattr(running, "peak_memory", lambda build, *_: megabytes[build])
    found = measure(Row("some", "Some step", {PLAIN: idle, OURS: working}, has_memory=True), rounds=1)
    assert found[OURS]["figures"][MEMORY] == 2.0
