"""The progress bar of all engines. Its final line remains visible in a terminal, a log or a saved notebook."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
from collections.abc import Iterator

import rich
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A bar that :func:`progress_bar` shows."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(label, total=total, completed=done, text="")

    def advance(self, text: str | None = None) -> None:
        """One more is done; ``text`` takes the place of what stands beside the bar, where it is given."""
        if text is None:
            self._progress.advance(self._task)
        else:
            self._progress.update(self._task, advance=1, text=text)

    def move(self, completed: float, text: str) -> None:
        """So many are done, with the part of the one that is being done; ``text`` stands beside the bar."""
        self._progress.update(self._task, completed=completed, text=text)

    @property
    def line(self) -> str:
        """What the bar says, without the bar: ``"SVI 3/10 ELBO -1.2345 nats/datum 0:00:07"``."""
        task = self._progress.tasks[self._task]
        elapsed = datetime.timedelta(seconds=int(task.elapsed or 0))
        parts = (task.description, f"{task.completed:.0f}/{task.total:.0f}", task.fields["text"], str(elapsed))
        return " ".join(part for part in parts if part)


@contextlib.contextmanager
def progress_bar(
    label: str, total: int, *, done: int = 0, progress: bool = True, console: Console | None = None
) -> Iterator[Bar]:
    """A bar from ``done`` to ``total``, with times and a text of the engine's own.

    In a notebook the live bar is a widget, which a saved notebook does not hold: it goes at the end, and a line of
    plain text takes its place. Without ``ipywidgets`` there is that line alone.

    :param progress: ``False`` shows nothing.
    :param console: where to show it; that of ``rich`` by default.
    """
    console = rich.get_console() if console is None else console
    notebook = console.is_jupyter
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    live = progress and (not notebook or importlib.util.find_spec("ipywidgets") is not None)
    shown = Progress(*columns, console=console, transient=notebook, disable=not live)
    bar = Bar(shown, label, total, done)
    try:
        with shown:
            yield bar
    finally:
        if progress and notebook:
            print(bar.line)
