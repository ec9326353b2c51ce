"""Packed batches, each a pure function of the step: random access to any rows, on any number of hosts and workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.batch import DEFAULT_GEOMETRY, Batch, TileGeometry, ragged
from data_pipelines.config import BATCH_FIELDS, PLAN_FIELDS, DataConfig
from data_pipelines.encoding.crops import Crops
from data_pipelines.encoding.samples import Sample, SampleBuilder
from data_pipelines.errors import BadSample, DataError, StorageError
from data_pipelines.io import paths
from data_pipelines.io.processes import ahead, end_with_parent
from data_pipelines.io.storage import Patience, give_up, patiently, set_patience
from data_pipelines.loading.assembly import fill_row
from data_pipelines.loading.report import BadSamples, Report
from data_pipelines.loading.rows import Place, hurry_workers, made_ahead
from data_pipelines.loading.summary import summarize
from data_pipelines.packing.lengths import Lengths, length_digest, pick_prompt
from data_pipelines.packing.permutation import fold
from data_pipelines.packing.plan import Block, Plan
from data_pipelines.packing.standing import Begin
from data_pipelines.packing.units import Units
from data_pipelines.sources.source import Source, open_source

if TYPE_CHECKING:
    from data_pipelines.records.raw_sample import RawSample

COUNT_ALONE = 4_000_000  # up to this many samples, planning takes less time than starting worker processes
_FETCHES = 16  # samples read at a time from remote shards: mostly waiting
_VERSION = 3  # of the rules for making batches; part of the identity


class PackedData:
    """The batches of a configuration.

    Attributes:
      spec: static sizes of a batch.
      geometry: of the model's tiles.
      batch_size: packed rows of the global batch.
      identity: hash of everything that determines the batches.
      tokenizer: of the text slots.
      report: what ``batch`` and ``iterate`` of this object have read so far.
      begin: where another mixture left off; None = these are the batches of a run from step 0 on.
      before: that mixture, if its steps may be requested. changes: what became of its sources, one line each.
    """

    def __init__(
        self,
        config: DataConfig,
        cache_dir: str | os.PathLike | None = None,
        geometry: TileGeometry = DEFAULT_GEOMETRY,
        ask_again: bool = True,
        begin: Begin | None = None,
    ):
        """Opens the sources and counts their tokens, unless that is cached.

        Args:
          ask_again: see ``open_source``; False keeps the identity that a run began with.
          cache_dir: for token counts and plans; None = ``io.paths.cache_dir()``.
          geometry: how the model that reads the batches cuts tiles.
          begin: see ``loading.changing``.

        Raises:
          DataError: something in the configuration or the sources cannot be used.
          StorageError: storage does not answer, or is full.
        """
        set_patience(Patience(config.retries, config.storage_wait_s))
        self.config, self.geometry = config, geometry
        self.cache_dir = Path(cache_dir) if cache_dir else paths.cache_dir()
        self.spec = config.batch_spec(geometry)
        self.batch_size = config.batch_size
        self.builder = SampleBuilder(config, geometry=geometry)
        self.tokenizer = self.builder.tokenizer
        self.sources: list[Source] = [open_source(source.spec, ask_again) for source in config.sources]
        self.begin: Begin | None = begin
        self.before: PackedData | None = None
        self.changes: list[str] = []
        units, facts = [], []
        for source, settings in zip(self.sources, config.sources):
            lengths = Lengths.of(source, settings, self.builder, self.cache_dir, config.workers)
            units.append(Units(lengths, self.builder.longest_piece, self.builder.chat.begin_length))
            facts.append((settings.name, settings.weight, source.fingerprint(), length_digest(settings, self.builder)))
        self.contents = [(content, lengths) for _, _, content, lengths in facts]  # what each source holds
        extra = f"{_VERSION} {facts}" + (f" {begin}" if begin else "")
        self.identity = config.digest(*BATCH_FIELDS, extra=f"{extra} {geometry}")
        self.report = Report(self.cache_dir / "skipped" / f"{self.identity}.jsonl")
        file = self.cache_dir / "plans" / f"{config.digest(*PLAN_FIELDS, extra=extra)}-3.npy"
        self.plan = Plan(config, units, file, geometry, begin, self._describe)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self.config, self.cache_dir, self.geometry, self.identity, self.begin)

    def at(self, step: int) -> PackedData:
        """The object that makes the batch of ``step``: this one, or an earlier one."""
        return self.before.at(step) if self.before is not None and step < self.plan.begin.step else self

    def sources_summary(self) -> list[dict[str, Any]]:
        """What each source offers, see ``summary.summarize``."""
        settings, lengths = self.config.sources, [units.lengths for units in self.plan.units]
        return [
            summarize(each.name, source, counted, self.plan.refused(number))
            for number, (each, source, counted) in enumerate(zip(settings, self.sources, lengths))
        ]

    def steps_per_epoch(self) -> int:
        """Steps until the last row of the first epoch. Counts the epoch's blocks, unless that is cached."""
        return -(-self._count_epochs(1) // self.batch_size)

    def total_steps(self) -> int | None:
        """Steps of all epochs, the last of which may be partly empty; None = endless."""
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

    def iterate(self, start_step: int = 0, rows: Sequence[int] | None = None) -> Iterator[tuple[int, Batch]]:
        """(step, batch) of every step from ``start_step`` on, prefetched; ends with the last epoch.

        Args:
          rows: those of the global batch that this process makes; None = all.

        Raises:
          DataError: the global batch has no such rows.
        """
        chosen = range(self.batch_size) if rows is None else rows
        if not chosen or not set(chosen) <= set(range(self.batch_size)):
            raise DataError(f"rows {list(chosen)} requested, but data.batch_size is {self.batch_size}")
        if self.at(start_step) is not self:
            with contextlib.closing(self.before.iterate(start_step, rows)) as earlier:
                for start_step, batch in earlier:
                    yield start_step, batch
                    if (start_step := start_step + 1) == self.plan.begin.step:
                        break
                else:
                    return
        if self.config.workers:
            self.plan.locate(start_step * self.batch_size)
            self.plan.save()  # the workers read it and need not count again
        made_batches = made_ahead(self, start_step, chosen)
        try:
            for step in itertools.count(start_step):
                started = time.perf_counter()
                made = next(made_batches, None)
                self.report.wait_seconds += time.perf_counter() - started
                if made is None:
                    return
                self.report.add(made.samples, made.bad, made.found)
                self.plan.locate(step * self.batch_size)  # so that this process knows the counts, whoever made it
                yield step, made.batch
        finally:
            made_batches.close()
            self.plan.save()

    def stop_waiting(self, *_: object) -> None:
        """Ends all waiting for storage, here and in the workers: ``iterate`` and ``batch`` raise StorageError at once.

        May be called by a signal handler, so that a waiting run can be saved before it is killed.
        """
        give_up()
        hurry_workers()

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Rows ``rows`` (None = all) of global step ``step``. Reads the samples; bad samples leave empty segments.

        Raises StorageError if storage does not answer.
        """
        if self.at(step) is not self:
            return self.at(step).batch(step, rows)
        chosen = range(self.batch_size)[slice(None) if rows is None else rows]
        batch, *counts = self.assemble(self._places(step, chosen))
        self.report.add(*counts)
        return batch

    def _places(self, step: int, rows: Sequence[int]) -> list[Place]:
        return [self.plan.locate(step * self.batch_size + row) for row in rows]

    def assemble(self, places: Sequence[Place]) -> tuple[Batch, int, BadSamples, int]:
        """The rows at these places, without updating the report: a batch, and the arguments of ``Report.add``."""
        static = dataclasses.replace(self.spec, boundary_block=0)
        # Zeroing all pixels first would take a tenth of the time; what the samples leave unused is zeroed below.
        patches, crops = np.empty((len(places), *static.fields()["patches"][0]), np.uint8), {}
        if self.config.pixel_path == "device":
            crops = Crops.fields(len(places), self.spec.visual_tokens, self.config.crop_size, self.geometry)
        batch, bad, count, planned = static.empty(len(places), patches), [], 0, 0
        with contextlib.closing(self._reads(places)) as reads:
            for row, place in enumerate(places):
                samples, sources, used = [], [], 0
                room = Crops.of(crops, row) if crops else patches[row]
                if place is not None:
                    block, number = self.plan.block(place[0]), place[1]
                    if number == 0:
                        drops = self.plan.drops(place[0])
                        bad.extend(
                            (self._key(source, i), reason, self._detail(source, i)) for source, i, reason in drops
                        )
                        planned += len(drops)
                    for unit in range(block.starts[number], block.starts[number + 1]):
                        samples.append(self._build(block, unit, next(reads), room[used:], bad))
                        sources.append(int(block.source[unit]))
                        used += 0 if samples[-1] is None else len(samples[-1].patches)
                if crops:
                    room[used:].weights[:] = 0
                else:
                    patches[row, used:] = 0
                fill_row(batch, row, samples, self.spec.visual_tokens, self.config.loss_weighting, sources)
                count += sum(sample is not None for sample in samples)
        if crops:
            batch = crops | {name: array for name, array in batch.items() if name != "patches"}
        if self.spec.boundary_block:
            batch = ragged(batch, self.spec.sequence, self.spec.boundary_block)
        return batch, count, bad, len(bad) - planned

    def _reads(self, places: Sequence[Place]) -> Iterator[Callable[[], RawSample]]:
        """For each sample of the rows, in order, a function that reads it.

        Remote samples are prefetched, several at a time: reading them one by one would cost a round trip per sample.
        """
        blocks = ((self.plan.block(place[0]), place[1]) for place in places if place is not None)
        units = (
            (block, unit) for block, number in blocks for unit in range(block.starts[number], block.starts[number + 1])
        )
        calls = ((int(block.source[unit]), int(block.sample[unit])) for block, unit in units)
        if any(source.is_remote for source in self.sources):
            yield from (future.result for future in ahead(self._read, calls, _FETCHES))
        else:
            yield from (functools.partial(self._read, *call) for call in calls)

    def _read(self, source: int, index: int) -> RawSample:
        return self.sources[source].read(index)

    def sample_keys(self, step: int) -> list[str]:
        """Keys of the samples of a global step, row by row, including bad samples."""
        return [key for keys in self.row_keys(step) for key in keys]

    def row_keys(self, step: int) -> list[list[str]]:
        """The same as a list per row: the sample of segment s is number s - 1 of its row."""
        if self.at(step) is not self:
            return self.at(step).row_keys(step)
        rows: list[list[str]] = []
        for place in self._places(step, range(self.batch_size)):
            keys = []
            if place is not None:
                block, number = self.plan.block(place[0]), place[1]
                units = range(block.starts[number], block.starts[number + 1])
                keys = [self._key(int(block.source[unit]), int(block.sample[unit])) for unit in units]
            rows.append(keys)
        return rows

    def _key(self, source: int, sample: int) -> str:
        return self.sources[source].key(sample)

    def _describe(self, source: int, sample: int) -> str:
        """The key of a sample that is in no row, and why."""
        key, why = self._key(source, sample), self._why(source, sample)
        return f"{key} ({why})" if why else key

    def _why(self, source: int, sample: int) -> str:
        """The number of its tokens, or what is found when they are counted again. Raises StorageError."""
        visual, text = self.plan.units[source].lengths.counts[sample].tolist()
        if visual >= 0:
            room = f"{self.config.visual_tokens} and {self.config.text_tokens}"
            return f"{visual} visual and {abs(text)} text tokens, but a row has room for {room}"
        try:
            images = int(self.sources[source].image_sizes(np.array([sample]))[0][0])
            self.builder.text_tokens(self.sources[source].read_text(sample), images)
        except BadSample as error:
            return error.detail
        return ""

    def _detail(self, source: int, sample: int) -> str:
        """``_why``, if it costs no request and storage delivers it: nothing else of such a sample is needed."""
        if self.sources[source].is_remote:
            return ""
        with contextlib.suppress(StorageError):
            return self._why(source, sample)
        return ""

    def _build(
        self, block: Block, unit: int, read: Callable[[], RawSample], out: np.ndarray, bad: BadSamples
    ) -> Sample | None:
        """The sample that ``read`` returns, its patches at the start of ``out``; None if bad, then added to ``bad``.

        Raises StorageError if it cannot be read, or if its shard is not the one that was indexed.
        """
        source, index, piece = int(block.source[unit]), int(block.sample[unit]), int(block.piece[unit])
        settings = self.config.sources[source]
        try:
            raw = read()
            augment = self.config.jpeg_augment or raw.jpeg_augment
            seed = fold(self.config.seed, block.epoch, source, index) if augment else 0
            planned = int(block.visual[unit]), int(block.text[unit])
            sample = self.builder.build(raw, seed, pick_prompt(settings.prompts, index), piece, out[: planned[0]])
            if sample.lengths != planned:
                detail = f"(visual, text) = {sample.lengths}, the index said {planned}"
                raise BadSample("length_mismatch", raw.key, detail)
            return sample
        except BadSample as error:
            self.sources[source].check_unchanged(index)
            bad.append((error.key or f"{settings.name}:{index}", error.reason, error.detail))
        except DataError:
            raise
        except Exception as error:  # a bug here or in a decoder; one sample must not end a run of weeks
            self.sources[source].check_unchanged(index)
            bad.append((self._key(source, index), "unexpected_error", f"{type(error).__name__}: {error}"))
        return None


def _opened_again(
    config: DataConfig, cache_dir: Path, geometry: TileGeometry, identity: str, begin: Begin | None
) -> PackedData:
    """Opens the data in another process. Raises StorageError if the files are not those the first process opened."""
    names = ", ".join(source.name for source in config.sources)

    def attempt() -> PackedData:
        try:
            data = PackedData(config, cache_dir, geometry, ask_again=False, begin=begin)
        except StorageError:
            raise
        except DataError as error:  # the first process could open them
            raise StorageError(names, str(error)) from None
        if data.identity != identity:
            raise StorageError(names, "the files of these sources changed while they were in use; start the run again")
        return data

    set_patience(Patience(config.retries, config.storage_wait_s))
    return patiently(attempt, missing=True)


_data: PackedData | None = None  # of a counting process


def _set_data(data: PackedData) -> None:
    global _data
    end_with_parent()
    _data = data


def _rows_of(block: int) -> int:
    assert _data is not None
    return _data.plan.block(block).rows
