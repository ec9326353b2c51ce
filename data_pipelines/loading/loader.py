"""Packed batches, each a pure function of the step: random access, any rows, on any number of hosts and workers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipelines.batch import Batch, BatchSpec, ragged
from data_pipelines.config import BATCH_FIELDS, PLAN_FIELDS, DataConfig
from data_pipelines.encoding.samples import Sample, SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io.paths import cache_dir as default_cache_dir
from data_pipelines.packing.lengths import Lengths, length_digest, pick_prompt
from data_pipelines.packing.plan import Block, Plan, Units, fold
from data_pipelines.sources.source import Source, open_source

_log = logging.getLogger(__name__)
MAX_DEATHS = 3  # of worker processes in a row without a batch in between
COUNT_ALONE = 4_000_000  # samples that are planned sooner than worker processes start
_VERSION = 2  # of the rules by which batches are made; goes into the identity


BadSamples = list[tuple[str, str, str]]  # (key, reason, detail)
Made = tuple[Batch, int, BadSamples]  # a batch, the number of its samples, and the bad ones


@dataclasses.dataclass
class Report:
    """What has been read, and what was bad.

    Attributes:
      file: every bad sample is appended here as a line of JSON; None = nowhere.
      samples: samples delivered.
      skipped: number of bad samples by reason.
      bad: (key, reason, detail) of the first `LISTED` bad ones.
      wait_seconds: time that `iterate` spent waiting for data.
    """

    LISTED: ClassVar[int] = 10_000

    file: Path | None = None
    samples: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: BadSamples = dataclasses.field(default_factory=list)
    wait_seconds: float = 0.0

    def add(self, samples: int, bad: BadSamples) -> None:
        self.samples += samples
        self.skipped.update(reason for _, reason, _ in bad)
        self.bad.extend(bad[: self.LISTED - len(self.bad)])
        if bad and self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"key": key, "reason": reason, "detail": detail}) for key, reason, detail in bad)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write("".join(line + "\n" for line in lines))


class PackedData:
    """The batches of a configuration.

    Attributes:
      spec: static sizes of a batch.
      batch_size: packed rows of the global batch.
      identity: hash of everything that decides the batches.
      tokenizer: of the text slots.
      report: what `batch` and `iterate` of this object have read so far.
    """

    def __init__(self, config: DataConfig, cache_dir: str | os.PathLike | None = None):
        """Opens the sources and counts their tokens, unless that is cached.

        Args:
          cache_dir: for token counts and plans; None = `io.paths.cache_dir`.

        Raises:
          DataError: something in the configuration or the sources cannot be used.
        """
        self.config = config
        self.cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
        self.spec: BatchSpec = config.spec
        self.batch_size = config.batch_size
        self.builder = SampleBuilder(config)
        self.tokenizer = self.builder.tokenizer
        self.sources: list[Source] = [open_source(source.spec) for source in config.sources]
        units, facts = [], []
        for source, settings in zip(self.sources, config.sources):
            lengths = Lengths.of(source, settings, self.builder, self.cache_dir, config.workers)
            units.append(Units(lengths, self.builder.longest_piece, self.builder.chat.begin_length))
            facts.append((settings.name, settings.weight, source.fingerprint(), length_digest(settings, self.builder)))
        extra = f"{_VERSION} {facts}"
        self.identity = config.digest(*BATCH_FIELDS, extra=extra)
        self.report = Report(self.cache_dir / "skipped" / f"{self.identity}.jsonl")
        self.plan = Plan(config, units, self.cache_dir / "plans" / f"{config.digest(*PLAN_FIELDS, extra=extra)}.npy")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedData, (self.config, self.cache_dir)

    def steps_per_epoch(self) -> int:
        """Steps until the first epoch's last row has been seen. Counts the epoch's blocks, unless that is cached."""
        return -(-self._count_epochs(1) // self.batch_size)

    def total_steps(self) -> int | None:
        """Steps of all epochs, the last of which may be part empty; None = for ever."""
        if self.config.epochs is None:
            return None
        return -(-self._count_epochs(self.config.epochs) // self.batch_size)

    def _count_epochs(self, epochs: int) -> int:
        """Rows of the first epochs; the worker processes help if there is much to count."""
        todo = epochs * self.plan.blocks_per_epoch - len(self.plan.counts)
        if self.config.workers and todo * self.config.block_samples > COUNT_ALONE:
            with ProcessPoolExecutor(self.config.workers, get_context("spawn"), _set_data, (self,)) as pool:
                rows = [self.plan.epoch_rows(epoch, lambda r: list(pool.map(_rows_of, r))) for epoch in range(epochs)]
        else:
            rows = [self.plan.epoch_rows(epoch) for epoch in range(epochs)]
        self.plan.save()
        return sum(rows)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Rows `rows` (None = all) of global step `step`. Reads the samples; what is bad leaves an empty segment."""
        batch, samples, bad = self.make(step, rows)
        self.report.add(samples, bad)
        return batch

    def make(self, step: int, rows: slice | None = None) -> Made:
        """As `batch`, without touching the report: the batch, its number of samples, and the bad ones."""
        chosen = range(self.batch_size)[rows if rows is not None else slice(None)]
        # Zeroing all pixels first would take a tenth of the time; what the samples leave over is zeroed below.
        static = dataclasses.replace(self.spec, boundary_block=0)
        patches = np.empty((len(chosen), *static.fields()["patches"][0]), np.uint8)
        batch, bad, samples = static.empty(len(chosen), patches), [], 0
        for to, row in enumerate(chosen):
            built, used = [], 0
            if (place := self.plan.locate(step * self.batch_size + row)) is not None:
                block, number = self.plan.block(place[0]), place[1]
                if number == 0:
                    bad.extend((self._key(source, sample), reason, "") for source, sample, reason in block.dropped)
                for unit in range(block.starts[number], block.starts[number + 1]):
                    built.append(self._build(block, unit, patches[to, used:], bad))
                    used += 0 if built[-1] is None else len(built[-1].patches)
            patches[to, used:] = 0
            _fill(batch, to, built, self.spec.visual_tokens, self.config.loss_weighting)
            samples += sum(sample is not None for sample in built)
        if self.spec.boundary_block:
            batch = ragged(batch, self.spec.sequence, self.spec.boundary_block)
        return batch, samples, bad

    def _key(self, source: int, sample: int) -> str:
        try:
            return self.sources[source].read_text(sample).key
        except BadSample as error:
            return error.key or f"{self.config.sources[source].name}:{sample}"

    def _build(self, block: Block, unit: int, out: np.ndarray, bad: BadSamples) -> Sample | None:
        """One sample of a block, its patches in the front of `out`; None if it is bad, which is then added to `bad`."""
        source, index, piece = int(block.source[unit]), int(block.sample[unit]), int(block.piece[unit])
        settings = self.config.sources[source]
        try:
            raw = self.sources[source].read(index)
            seed = fold(self.config.seed, block.epoch, source, index) if self.config.jpeg_augment else 0
            planned = int(block.visual[unit]), int(block.text[unit])
            sample = self.builder.build(raw, seed, pick_prompt(settings.prompts, index), piece, out[: planned[0]])
            if sample.lengths != planned:
                detail = f"(visual, text) = {sample.lengths}, the index said {planned}"
                raise BadSample("length_mismatch", raw.key, detail)
            return sample
        except BadSample as error:
            bad.append((error.key or f"{settings.name}:{index}", error.reason, error.detail))
        except DataError:
            raise
        except Exception as error:  # a fault of this program or of a decoder; one sample must not end a run of weeks
            bad.append((self._key(source, index), "unexpected_error", f"{type(error).__name__}: {error}"))
        return None

    def sample_keys(self, step: int) -> list[str]:
        """Keys of the samples of a global step, row by row, bad ones included."""
        keys = []
        for row in range(self.batch_size):
            if (place := self.plan.locate(step * self.batch_size + row)) is not None:
                block, number = self.plan.block(place[0]), place[1]
                for unit in range(block.starts[number], block.starts[number + 1]):
                    keys.append(self._key(int(block.source[unit]), int(block.sample[unit])))
        return keys

    def host_rows(self, process_index: int, process_count: int) -> slice:
        """The contiguous rows of the global batch that are one process's."""
        return slice(
            self.batch_size * process_index // process_count, self.batch_size * (process_index + 1) // process_count
        )

    def iterate(
        self, start_step: int = 0, process_index: int = 0, process_count: int = 1
    ) -> Iterator[tuple[int, Batch]]:
        """This process's rows of every step from `start_step` on, made ahead; ends with the last epoch.

        Raises:
          DataError: `process_count` exceeds the rows of the global batch.
        """
        if not 0 <= process_index < process_count <= self.batch_size:
            raise DataError(
                f"data.batch_size is {self.batch_size}; it must be at least the number of processes, {process_count}"
            )
        maker = self._made_by_workers if self.config.workers else self._made_by_thread
        made = maker(start_step, self.host_rows(process_index, process_count))
        try:
            for step in itertools.count(start_step):
                started = time.perf_counter()
                item = next(made, None)
                self.report.wait_seconds += time.perf_counter() - started
                if item is None:
                    return
                batch, samples, bad = item
                self.report.add(samples, bad)
                self.plan.locate(
                    step * self.batch_size
                )  # so that this process knows the counts, whichever made the batch
                yield step, batch
        finally:
            made.close()
            self.plan.save()

    def _made_by_thread(self, step: int, rows: slice) -> Iterator[Made]:
        """Batches from `step` on, made by a thread of this process."""
        ready: queue.Queue = queue.Queue(self.config.prefetch)
        stop = threading.Event()

        def put(item: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    pass

        def work() -> None:
            try:
                for at in itertools.count(step):
                    if stop.is_set() or self.plan.locate(at * self.batch_size) is None:
                        break
                    put(self.make(at, rows))
                put(None)
            except BaseException as error:  # raised again where the batches are taken
                put(error)

        thread = threading.Thread(target=work, daemon=True, name="packed-data")
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _made_by_workers(self, step: int, rows: slice) -> Iterator[Made]:
        """Batches from `step` on, made by processes of grain; if one of them dies, all are started anew."""
        self.plan.locate(step * self.batch_size)
        self.plan.save()  # the workers read it, and need not count anew
        deaths = 0
        while True:
            iterator = _grain_iterator(self, step, rows)
            try:
                for item in iterator:
                    if "error" in item:
                        raise DataError(item["error"].tobytes().decode())
                    if "end" in item:
                        return
                    extra = json.loads(item.pop("extra").tobytes())
                    yield item, extra["samples"], [tuple(bad) for bad in extra["bad"]]
                    step, deaths = step + 1, 0
            except RuntimeError as error:  # grain's word for a worker that was killed
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise DataError(
                        f"data workers die again and again at step {step} ({error}); "
                        "if memory is short, lower data.workers or data.prefetch"
                    ) from None
                _log.warning("a data worker died at step %d; starting the workers anew", step)
            finally:
                iterator.close()


def _grain_iterator(data: PackedData, step: int, rows: slice) -> Any:
    """A grain iterator over the steps from `step` on, whose elements are made by `_Maker`."""
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads flags, and refuses to before they are parsed
    options = grain.MultiprocessingOptions(data.config.workers, per_worker_buffer_size=data.config.prefetch)
    dataset = grain.MapDataset.range(step, step + 2**40).map(_Maker(data, rows))
    # One thread a worker: a step's batch is one element, and what is prefetched is held in memory.
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    return iter(dataset.to_iter_dataset(reading).mp_prefetch(options))


class _Maker:
    """Makes a step's batch as an element for grain. Never raises: a worker's other elements would be lost."""

    def __init__(self, data: PackedData, rows: slice):
        self._data, self._rows = data, rows

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        data = self._data
        try:
            if data.plan.locate(int(step) * data.batch_size) is None:
                return {"end": np.zeros(1, np.uint8)}
            batch, samples, bad = data.make(int(step), self._rows)
            return {**batch, "extra": _as_bytes(json.dumps({"samples": samples, "bad": bad}))}
        except Exception as error:
            text = str(error) if isinstance(error, DataError) else f"step {step}: {type(error).__name__}: {error}"
            return {"error": _as_bytes(text)}


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


_data: PackedData | None = None  # of a counting process


def _set_data(data: PackedData) -> None:
    global _data
    _data = data


def _rows_of(block: int) -> int:
    assert _data is not None
    return _data.plan.block(block).rows


def _fill(batch: Batch, row: int, samples: list[Sample | None], visual_slots: int, weighting: str) -> None:
    """Writes samples, whose patches are there already, into a row, one behind the other.

    A None keeps its segment number and takes no slot.
    """
    there = [(segment, sample) for segment, sample in enumerate(samples, 1) if sample is not None]
    if not there:
        return
    lengths = np.array([len(sample.input_ids) for _, sample in there])
    ids, visual = (np.concatenate([getattr(sample, name) for _, sample in there]) for name in ("input_ids", "visual"))
    n, text = len(ids), ~visual
    v, t = np.count_nonzero(visual), np.count_nonzero(text)

    targets, weights = _targets(ids, [sample for _, sample in there], weighting)
    batch["patch_cells"][row, :v] = np.concatenate([sample.patch_cells for _, sample in there])
    batch["tokens"][row, :t] = ids[text]
    batch["targets"][row, :t] = targets[text]
    batch["loss_weights"][row, :t] = weights[text]

    order = batch["order"][row]
    unused = np.concatenate([np.arange(v, visual_slots), np.arange(visual_slots + t, len(order))])
    order[:n][visual] = np.arange(v)
    order[:n][text] = visual_slots + np.arange(t)
    order[n:] = unused
    batch["positions"][row, :n] = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    batch["segments"][row, :n] = np.repeat([segment for segment, _ in there], lengths)


def _targets(ids: np.ndarray, samples: list[Sample], weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """Next token and its weight at every position of a row: int32 [n], float32 [n]; 0 where nothing is learnt."""
    learnt = []  # for each position: the weight of the token that follows
    for sample in samples:
        mask = sample.loss_mask
        trained = max(1, np.count_nonzero(mask[1:]))
        learnt += [mask[1:] * {"token": 1.0, "sample": 1 / trained, "sqrt": trained**-0.5}[weighting], mask[:1] * 0]
    weights = np.concatenate(learnt).astype(np.float32)
    return np.where(weights > 0, np.roll(ids, -1), 0), weights
