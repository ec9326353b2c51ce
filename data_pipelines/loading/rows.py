"""Packed rows as a random-access source for grain, which batches them, prefetches batches and runs the workers."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.io.processes import end_with_parent
from data_pipelines.io.storage import give_up, impatient
from data_pipelines.loading.report import BadSamples
from data_pipelines.packing.plan import Plan

MAX_DEATHS = 3  # consecutive deaths of worker processes without a batch in between
_ENDLESS = 2**48  # rows; the end of the last epoch is known only once all its blocks are counted
_WORKER = "grain-process-prefetch"  # prefix of the names of grain's worker processes
_HURRY = signal.SIGUSR1
_log = logging.getLogger(__name__)

Place = tuple[int, int] | None  # of a row: (block, row within it); None after the last epoch


class Made(NamedTuple):
    """An element of the dataset: a batch and the arguments of ``Report.add``, the end (None), or an error."""

    batch: Batch | None
    samples: int = 0
    bad: BadSamples = []  # noqa: RUF012  never changed
    found: int = 0  # bad samples that were not known to be bad from the index
    error: Exception | None = None


class Data(Protocol):
    """What rows are made from, see ``packed_data.PackedData``."""

    config: DataConfig
    batch_size: int
    plan: Plan

    def assemble(self, places: Sequence[Place]) -> tuple[Batch, int, BadSamples, int]:
        """The rows at these places: a batch, and the arguments of ``Report.add``."""
        ...


class Rows:
    """Source whose element r is the place of global row r, which is row r % B of step r // B.

    Elements are places, not pixels: ``PackedData.assemble`` writes the samples of a whole batch directly to their
    positions, while stacking finished rows in grain would copy every pixel once more.
    """

    def __init__(self, data: Data):
        self._data = data

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, row: int) -> Place:
        return self._data.plan.locate(row)


class Assemble:
    """Turns the places of a step's rows into the batch of one process.

    Never raises: elements that grain has prefetched would be lost, and an error that cannot be pickled hangs a worker.
    """

    def __init__(self, data: Data, rows: Sequence[int]):
        self._data, self._rows = data, rows

    def __call__(self, places: Sequence[Place]) -> Made:
        if places[0] is None:
            return Made(None)
        try:
            return Made(*self._data.assemble([places[row] for row in self._rows]))
        except Exception as error:
            return Made(None, error=_portable(error))


def _portable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # the content of another library's exception need not be picklable
        return DataError(f"{type(error).__name__}: {error}")


def made_ahead(data: Data, step: int, rows: Sequence[int]) -> Iterator[Made]:
    """Rows ``rows`` of the batches from ``step`` on, prefetched by a thread or by worker processes.

    If a worker is killed, all are restarted at the missing step: grain cannot replace a single one.

    Raises DataError if workers are killed repeatedly; StorageError; and the other errors of ``PackedData.assemble``.
    """
    deaths = 0
    iterator = _iterator(data, step, rows)
    try:
        while True:
            try:
                made = next(iterator)
            except RuntimeError as error:  # what grain raises when a worker was killed
                if not data.config.workers:
                    raise
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise DataError(
                        f"data workers die repeatedly at step {step} ({error}); "
                        "if memory is short, lower data.workers or data.prefetch"
                    ) from None
                _log.warning("a data worker died at step %d; restarting the workers", step)
                iterator.close()
                iterator = _iterator(data, step, rows)
                continue
            if made.error is not None:
                raise made.error
            if made.batch is None:
                return
            yield made
            step, deaths = step + 1, 0
    finally:
        with impatient():
            hurry_workers()
            iterator.close()


def hurry_workers(*_: object) -> None:
    """Ends all waiting for storage in the worker processes; may be called by a signal handler."""
    for process in multiprocessing.active_children():
        if process.name.startswith(_WORKER) and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, _HURRY)


def _start_worker(*_: object) -> None:
    signal.signal(_HURRY, give_up)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # sent to the whole group to profile the trainer
    end_with_parent()


def _iterator(data: Data, step: int, rows: Sequence[int]) -> Any:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags, which fails before they are parsed
    workers, prefetch = data.config.workers, data.config.prefetch
    source = grain.MapDataset.source(Rows(data)).slice(slice(step * data.batch_size, None))
    batches = source.batch(data.batch_size, batch_fn=Assemble(data, rows))
    # One thread each: batches are large, and prefetched ones are held in memory.
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1 if workers else prefetch)
    processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=prefetch)
    return iter(batches.to_iter_dataset(reading).mp_prefetch(processes, _start_worker))
