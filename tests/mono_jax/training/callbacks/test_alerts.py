"""Alerts reach a webhook, and a failing webhook does not affect the run."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mono_jax.training.callbacks import alerts
from mono_jax.training.callbacks.alerts import Alerts, webhook_url
from mono_jax.training.callbacks.stalls import Stalls
from mono_jax.training.callbacks.stopping import NonFinite, Preempted, TooManyBadSamples
from mono_jax.training.loop import Progress


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook, and what was posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://localhost:{found.server_port}/hook", got
    found.shutdown()
    found.server_close()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def progress(done: int = 7, error: Exception | None = None) -> Progress:
    return Progress(None, {}, 0, done, 9, error=error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFinite("3 consecutive updates were non-finite", 5), "nonfinite"),
        (TooManyBadSamples("7.0% of the last samples are bad"), "bad_share"),
        (OSError("disk"), "error"),
        (Preempted("as asked"), None),
        (None, None),
    ],
)
def test_the_end_of_a_run_is_told(server, error: Exception | None, kind: str | None):
    url, got = server
    callback = Alerts(url, {"stage": "S2", "workdir": "runs/a"}, print)
    callback.begin(progress(0))
    callback.step(progress())
    callback.finish(progress(error=error))
    assert [entry["kind"] for entry in got] == ([] if kind is None else [kind])
    for entry in got:
        assert entry["text"] == f"{type(error).__name__}: {error}" and entry["step"] == 7
        assert (entry["stage"], entry["workdir"], entry["host"]) == ("S2", "runs/a", socket.gethostname())


def test_an_alert_of_a_kind_is_not_repeated_for_a_while(server):
    url, got = server
    clock = [0.0]
    callback = Alerts(url, {}, print, now=lambda: clock[0])
    callback.begin(progress(0))
    for step, now in ((1, 0.0), (2, 10.0), (3, alerts.REPEAT_S + 1)):
        clock[0] = now
        callback.alert("nonfinite", step, "x")
        callback.alert("other", step, "y")
    callback.finish(progress())
    assert [(entry["kind"], entry["step"]) for entry in got] == [
        ("nonfinite", 1), ("other", 1), ("nonfinite", 3), ("other", 3)
    ]  # fmt: skip


def test_a_stall_is_told_while_the_loop_hangs(server):
    url, got = server
    callback = Alerts(url, {}, print)
    with Stalls(2.0, print, shortest=0.3, look_every=0.01, alert=callback.alert) as stalls:
        run = progress(0)
        callback.begin(run)
        stalls.begin(run)
        for run.done in range(1, 8):
            stalls.step(run)
        wait_for(lambda: got)  # no step comes
        callback.finish(run)
    [entry] = got
    assert entry["kind"] == "stall" and entry["text"].startswith("step 8 has taken") and "Thread" not in entry["text"]


def test_without_a_webhook_nothing_runs():
    callback = Alerts(None, {}, print)
    callback.begin(progress(0))
    callback.alert("nonfinite", 1, "x")
    callback.finish(progress(error=OSError("disk")))
    assert not callback._thread.is_alive()


@pytest.mark.parametrize("kind", ["silent", "closed", "no_url"])
def test_a_server_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, kind: str):
    monkeypatch.setattr(alerts, "TIMEOUT_S", 0.3)
    said: list[str] = []
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        if kind == "silent":
            listening.listen()  # accepts the connection but never answers
        url = f"http://localhost:{listening.getsockname()[1]}/" if kind != "no_url" else "http://"
        callback = Alerts(url, {}, said.append)
        callback.begin(progress(0))
        began = time.monotonic()
        for number in range(50):
            callback.alert(f"kind {number}", number, "x")
            callback.step(progress(number))
        assert time.monotonic() - began < 0.3, "the loop waits for nothing"
        callback.finish(progress(error=OSError("disk")))
        wait_for(lambda: said)
    assert len([line for line in said if "could not be sent" in line]) == 1


def test_a_secret_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOOK", "https://hooks.example/secret")
    assert webhook_url("$HOOK") == "https://hooks.example/secret"
    assert webhook_url("http://a") == "http://a" and webhook_url(None) is None
    monkeypatch.delenv("HOOK")
    assert webhook_url("$HOOK") is None
