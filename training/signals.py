"""Turns stop signals into a flag that the training loop reads between steps."""

from __future__ import annotations

import contextlib
import signal
from typing import Any


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag; a second signal has its usual effect."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
                    self._old[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _receive(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(number, self._old.get(number, signal.SIG_DFL))
