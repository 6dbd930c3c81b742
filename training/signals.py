"""Converts stop signals into a flag that the training loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint; `--resume auto` continues


class StopSignal:
    """Sets `received` to the name of the first SIGTERM, SIGINT or SIGUSR1; the second one has its usual effect."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._previous.get(number, signal.SIG_DFL))
