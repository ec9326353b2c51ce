"""What ends a run before its last step: a signal, bad data, non-finite updates."""

from __future__ import annotations

import collections
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType, TracebackType
from typing import Protocol

from mono_jax.training.callbacks.signals import OnSignals
from mono_jax.training.loop import Callback, Progress, Stopped

PREEMPTED = 75  # exit code after SIGTERM, or SIGINT during steps: run again to resume (EX_TEMPFAIL)


class Preempted(Stopped):
    """The run was asked to stop and has saved its state."""


class NonFinite(Stopped):
    """Too many consecutive updates were non-finite. The state is not saved. ``first``: the first step of the streak."""

    def __init__(self, message: str, first: int):
        super().__init__(message)
        self.first = first


class TooManyBadSamples(Stopped):
    """The share of bad samples is above the limit."""


class SampleReport(Protocol):
    """What ``BadSampleLimit`` needs from the data's report (``data_pipelines.loading.report.Report``)."""

    samples: int
    skipped: collections.Counter[str]

    def recent(self) -> tuple[int, int]: ...

    def bad_share(self, samples: int, bad: int) -> float: ...


class BadSampleLimit(Callback):
    """Ends the run when the share of bad samples among the most recent ones is above ``limit``."""

    def __init__(self, report: SampleReport, limit: float):
        self._report, self._limit = report, limit

    def facts(self, progress: Progress) -> Mapping[str, int]:
        """The numbers that decide, and the totals read so far, for the records."""
        own = progress.counted is None or bool(progress.counted.any())  # otherwise another process counts the same rows
        facts = {"samples": self._report.samples * own, "bad_samples": sum(self._report.skipped.values()) * own}
        return facts | dict(zip(("recent_samples", "recent_bad"), self._report.recent()))

    def step(self, progress: Progress) -> None:
        totals = progress.totals.latest(progress.done)
        share = self._report.bad_share(*(totals.get(name, 0) for name in ("recent_samples", "recent_bad")))
        if share > self._limit:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self._report.skipped.most_common(5))
            raise TooManyBadSamples(
                f"{share:.1%} of the last samples are bad, more than the limit of {self._limit:.1%} ({reasons} in "
                "total); saved: check the data (python -m data_pipelines.check), or raise --config.max_bad_share, and "
                "run again"
            )


class StopAtOnce(OnSignals):
    """Ends the process with exit code ``PREEMPTED`` on SIGTERM, for a whole command; ``StopWhenAsked`` takes over while
    steps run.

    Outside them, nothing needs to be saved: the next start makes again what was not complete, as after SIGKILL. Hence
    no exception, which something might catch or delay.

    A thread ends the process, since Python runs a handler only between two instructions of the main thread: during a
    compilation it would come late, and after a signal just before a blocking call, such as the wait for a lock, never.
    """

    signals = (signal.SIGTERM,)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._old:
            os.close(self._arriving)
            self._thread.join()

    def _wakeup_file(self) -> int:
        arrived, self._arriving = os.pipe()
        os.set_blocking(self._arriving, False)
        self._thread = threading.Thread(target=self._watch, args=(arrived,), name="signals", daemon=True)
        self._thread.start()
        return self._arriving

    def _watch(self, arrived: int) -> None:
        with os.fdopen(arrived, "rb", buffering=0) as file:
            while number := file.read(1):
                if number[0] in self.signals:
                    os.write(2, b"stopped as requested: run the same command again to resume\n")
                    os._exit(PREEMPTED)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Nothing: the thread is told of signals that have a handler."""


# Otherwise a forked process would tell the thread of the process that it came from.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


class StopWhenAsked(OnSignals):
    """Ends the run after SIGTERM or SIGINT, caught while this context is active. A second SIGINT interrupts
    immediately.

    ``hurry`` is called when the signal arrives, to end any waiting that delays the step.
    """

    signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, hurry: Callable[[], None] = lambda: None):
        self._hurry, self._requested = hurry, False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        again = "; press Ctrl-C again to stop at once, without saving" if number == signal.SIGINT else ""
        # Not print, because the handler may have interrupted one.
        os.write(2, f"stopping after this step{again}\n".encode())
        self._hurry()

    def facts(self, progress: Progress) -> Mapping[str, int]:
        return {"asked_to_stop": int(self._requested)}

    def step(self, progress: Progress) -> None:
        if progress.totals.latest(progress.done).get("asked_to_stop"):
            raise Preempted(
                f"stopped at step {progress.done} as requested; saved: run the same command again to resume"
            )
