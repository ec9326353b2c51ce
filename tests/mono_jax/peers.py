"""Processes of a run as threads of this one, with JAX's runtime store in memory, for code that uses no devices."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import jax
import pytest

from mono_jax.parallel import agreement


class Store:
    """The runtime's store, in memory; ``away``: it does not respond."""

    def __init__(self, processes: int = 1) -> None:
        self.values: dict[str, str] = {}
        self.away = False
        self._processes, self._barriers = processes, {}
        self._changed = threading.Condition()

    def _ask(self) -> None:
        if self.away:
            raise RuntimeError("UNAVAILABLE")

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self._ask()
        assert allow_overwrite or key not in self.values
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        self._ask()
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            came = self._changed.wait_for(lambda: key in self.values, min(timeout_in_ms / 1000, 20))
        assert came, f"{key} never came"
        return self.values[key]

    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None:
        self._ask()
        with self._changed:
            barrier = self._barriers.setdefault(barrier_id, threading.Barrier(self._processes))
        barrier.wait(min(timeout_in_ms / 1000, 20))


class Peers:
    """``count`` processes; a module that asks JAX for its process index gets the thread's number."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch):
        self.count, self.store, self._local = count, Store(count), threading.local()
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: self._local.index)
        monkeypatch.setattr(agreement, "store", lambda: self.store)
        monkeypatch.setattr(agreement, "_number", self)

    def __next__(self) -> int:
        return next(self._local.numbers)

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """What ``function`` returns or raises in each process, called with the process number."""
        results: list[Any] = [None] * self.count

        def process(index: int) -> None:
            self._local.index, self._local.numbers = index, itertools.count()
            try:
                results[index] = function(index)
            except BaseException as error:
                results[index] = error

        threads = [threading.Thread(target=process, args=(index,), daemon=True) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "hangs"
        return results
