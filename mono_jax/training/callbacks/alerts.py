"""Alerts: when a run needs attention, a JSON object is sent to a webhook by a thread that the run never waits for."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from mono_jax.files import reason
from mono_jax.training.appender import Say
from mono_jax.training.callbacks.stopping import NonFinite, Preempted, TooManyBadSamples
from mono_jax.training.loop import Callback, DataEnded, Progress
from mono_jax.training.sinks.mailbox import Mailbox

TIMEOUT_S = 10.0  # per request
REPEAT_S = 600.0  # within which an alert of the same kind is not sent again
_ENDS: dict[type[Exception], str | None] = {
    NonFinite: "nonfinite",
    TooManyBadSamples: "bad_share",
    Preempted: None,
    DataEnded: "ended",
}


def webhook_url(setting: str | None) -> str | None:
    """``setting``, or the value of the environment variable that it names as "$NAME", which keeps secrets out of
    configs."""
    return os.environ.get(setting[1:]) if setting and setting.startswith("$") else setting


@dataclasses.dataclass
class Alerts(Callback):
    """Posts {"kind", "text", "step", ...``about``} to ``url`` (None = nowhere): the arguments of ``alert``, and an
    error that ends the run.

    Never blocks or ends the run: if a server does not accept an alert within ``TIMEOUT_S``, one line reports it.
    """

    url: str | None
    about: Mapping[str, Any]
    say: Say
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._waiting: Mailbox[dict[str, Any]] = Mailbox(most=100)
        self._sent: dict[str, float] = {}
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="alerts", daemon=True)

    def alert(self, kind: str, step: int, text: str) -> None:
        """Sends an alert, unless one of this kind was sent recently."""
        if self.url is None or self.now() - self._sent.get(kind, -REPEAT_S) < REPEAT_S:
            return
        self._sent[kind] = self.now()
        host = {"host": socket.gethostname(), "time": round(time.time(), 3)}
        self._waiting.put({"kind": kind, "text": text, "step": step, **self.about, **host})

    def begin(self, progress: Progress) -> None:
        if self.url is not None:
            self._thread.start()

    def finish(self, progress: Progress) -> None:
        error = progress.error
        if error is not None and (kind := _ENDS.get(type(error), "error")) is not None:
            self._sent.pop(kind, None)  # the end is always reported
            self.alert(kind, progress.done, f"{type(error).__name__}: {reason(error)}")
        self._waiting.end()
        if self._thread.is_alive():
            self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        while (entry := self._waiting.take()) is not None:
            self._post(entry)

    def _post(self, entry: Mapping[str, Any]) -> None:
        assert self.url is not None
        data = json.dumps(entry).encode()
        try:
            request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"}, method="POST")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                pass
        except Exception as error:  # whatever a URL or a server does, the run continues
            if not self._failed:
                self.say(f"an alert could not be sent: {reason(error)}; training continues")
            self._failed = True
