"""Callbacks that handle signals."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

from mono_jax.training.loop import Callback


class OnSignals(Callback):
    """Handles ``signals`` while its context is active; outside the main thread, Python allows no handlers."""

    signals: ClassVar[tuple[int, ...]]

    def __enter__(self) -> Self:
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._old[number] = signal.signal(number, self._handle)
            self._old_wakeup_file = signal.set_wakeup_fd(self._wakeup_file(), warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_wakeup_file)  # first, so that no signal is lost between the two
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _wakeup_file(self) -> int:
        """The file that is told of signals while this context is active; -1: none."""
        return -1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError
