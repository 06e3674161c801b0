"""Ctrl-C and SIGTERM as a polite request: finish safely, save, and say how to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from typing_extensions import Self

from chatfine.console import warn
from chatfine.i18n import t


class StopSignal:
    """Inside `with`, SIGINT and SIGTERM only set `requested`; a second Ctrl-C interrupts at
    once."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
            warn(t("stopping after this micro-batch and saving (Ctrl-C again: at once)"))
