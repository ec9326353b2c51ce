"""The lease of a workdir in a bucket: one holder at a time, whatever happens to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time

import pytest

from data_pipelines.errors import StorageError
from mono_jax.errors import CheckpointError
from mono_jax.storage import lease
from mono_jax.storage.lease import Lease, held


def eventually(condition) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "STALE", 0.4)


def left(file, **changes):
    """A lock as left by a killed run."""
    values = {"id": "x", "pid": os.getpid(), "host": socket.gethostname(), "since": "then", "beat": time.time()}
    file.write_text(json.dumps(values | changes))


def test_a_second_run_is_refused_and_the_lock_goes_with_the_first(bucket):
    file, said = bucket / ".lock", []
    with held(file, said.append) as first:
        with pytest.raises(CheckpointError, match=f"{bucket}: in use by pid {os.getpid()} on host") as caught:
            Lease(file).take(said.append)
        assert "\n" not in str(caught.value)
        beat = file.read_bytes()
        assert eventually(lambda: file.read_bytes() != beat)  # it is renewed
        first.check()
    assert not file.is_file()
    assert said == []


@pytest.mark.parametrize("text", ["{", '{"pid": 1}', "[]", ""])
def test_a_lock_that_says_nothing_becomes_stale(bucket, text):
    (bucket / ".lock").write_text(text)
    said: list[str] = []
    with held(bucket / ".lock", said.append):
        assert "taken over from another process" in said[-1]


def test_one_whose_process_is_gone_is_taken_over_at_once(bucket):
    gone = subprocess.Popen(["true"])
    gone.wait()
    left(bucket / ".lock", pid=gone.pid)
    said: list[str] = []
    with held(bucket / ".lock", said.append):
        pass
    assert said == [
        f"{bucket}: taken over from pid {gone.pid} on host {socket.gethostname()} since then, which is gone"
    ]


@pytest.mark.parametrize("clock", [-1e6, 0.0, 1e6])
@pytest.mark.parametrize("alive", [True, False])
def test_on_another_host_only_a_sign_of_life_counts(bucket, monkeypatch, clock: float, alive: bool):
    """Its clock may be wrong by days."""
    monkeypatch.setattr(lease, "STALE", 20.0 if alive else 0.3)
    file, ended, said = bucket / ".lock", threading.Event(), []
    left(file, host="elsewhere", beat=time.time() + clock)

    def live() -> None:
        while alive and not ended.wait(0.05):
            left(file, host="elsewhere", beat=time.time() + clock)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        if alive:
            with pytest.raises(CheckpointError, match=r"in use by pid .* on host elsewhere since then"):
                Lease(file).take(said.append)
        else:
            Lease(file).take(said.append)
            assert "taken over from" in said[-1]
    finally:
        ended.set()
        thread.join()
    assert "waiting up to" in said[0]


def test_who_lost_it_writes_nothing_more_and_leaves_the_lock_alone(bucket):
    file = bucket / ".lock"
    with held(file, print) as lost:
        left(file, host="elsewhere")  # as if it had been stopped for a while and assumed dead
        assert eventually(lambda: lost.is_lost)
        with pytest.raises(CheckpointError, match=r"taken over by pid .* on host elsewhere since then"):
            lost.check()
    assert json.loads(file.read_text())["host"] == "elsewhere"


def test_one_of_many_gets_it(bucket):
    """A conditional create instead of a check beforehand."""
    file, taken, refused = bucket / ".lock", [], []

    def take() -> None:
        try:
            one = Lease(file)
            one.take(lambda line: None)
            taken.append(one)
        except CheckpointError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 5)


def test_an_answer_that_is_lost_does_not_lose_the_lock(bucket, stores):
    """The write succeeded but its response was lost: when retried, the condition no longer holds."""
    file, said, write_if = bucket / ".lock", [], type(bucket).write_if
    one = Lease(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bucket), "write_if", lambda self, data, mark: write_if(self, data, mark) and None)
        one.take(said.append)
        one.renew()
    one.check()
    one.renew()
    one.check()
    one.release()
    assert not file.is_file() and said == []


def test_storage_that_is_away_for_a_while_loses_nothing(bucket, stores):
    with held(bucket / ".lock", print) as one:
        stores(bucket.scheme).fault = lambda method, path: 503
        time.sleep(0.2)
        with pytest.raises(StorageError):
            one.renew()
        stores(bucket.scheme).fault = lambda method, path: None
        time.sleep(0.2)
        one.check()
