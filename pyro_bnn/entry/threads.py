"""Threads: what belongs to the whole process is used by one of them at a time.

Pyro's handlers and parameter store, the flags of validation, torch's global random state, and the modes and buffers of
a network that predicts are the same for all threads. Two that use them at once give wrong numbers without an error.
"""

from __future__ import annotations

import contextlib
import os
import threading


class _OneAtATime(contextlib.ContextDecorator):
    """A lock that a thread may take again while it holds it, as a context and as a decorator."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
        self._lock.release()

    def after_fork(self) -> None:
        """In a forked process only the thread that forked goes on: what another one held would stay held for ever."""
        if self._holder not in (None, threading.get_ident()):
            self._lock, self._holder, self._depth = threading.RLock(), None, 0


#: Around every call that runs Pyro or changes what the whole process shares; a second thread waits until it is over.
one_at_a_time = _OneAtATime()
if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=one_at_a_time.after_fork)
