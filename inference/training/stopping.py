"""Ctrl-C and SIGTERM while a run has a checkpoint: the state is saved before the process ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any


class StopRequest:
    """Whether somebody asked the process to end.

    :param path: of the checkpoint; ``None`` for a run without one, which signals interrupt as usual.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._number = path, 0

    def __bool__(self) -> bool:
        return bool(self._number)

    def obey(self, step: int) -> None:
        """Ends the process as the signal would have, once the checkpoint is written.

        :raises KeyboardInterrupt: after Ctrl-C.
        :raises SystemExit: after SIGTERM, with 143.
        """
        if not self._number:
            return
        text = f"stopped after step {step}: {str(self.path)!r} has the state, and the same call resumes from it"
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt(text)
        print(text, file=sys.stderr)
        raise SystemExit(128 + self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number:  # the second time: at once
            raise KeyboardInterrupt
        self._number = number


@contextlib.contextmanager
def stop_requests(path: Path | None) -> Iterator[StopRequest]:
    """Inside, the first Ctrl-C or SIGTERM is noted, and the second interrupts at once.

    Without a checkpoint, or outside of the main thread, where Python takes no signals, both do what they always do.
    """
    request = StopRequest(path)
    if path is None or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before: list[tuple[signal.Signals, Any]] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                before.append((number, signal.signal(number, request._note)))
        yield request
    finally:
        for number, handler in before:
            signal.signal(number, handler)
