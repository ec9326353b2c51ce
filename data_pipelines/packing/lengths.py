"""Tokens of every sample of a source: counted once, exactly, without decoding an image, and kept in a file."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.batch import TileGeometry
from data_pipelines.config import LENGTH_FIELDS, DataConfig, SourceConfig
from data_pipelines.encoding.decoding import SIZE_REASONS
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from data_pipelines.io.processes import ahead

if TYPE_CHECKING:
    from data_pipelines.records.raw_sample import RawSample
    from data_pipelines.sources.source import Source

CHUNK = 65_536  # samples counted at a time; also what is lost when counting is interrupted
_FETCHES = 16  # texts fetched at a time from remote shards: mostly waiting
_log = logging.getLogger(__name__)


class Lengths:
    """Token counts of the samples of one source.

    Attributes:
      counts: int32 [n, 2] (visual, text). A bad sample has visual = -1 - r, r an index of ``reasons``; plain text,
        which may be cut, has text = -(number of tokens).
      reasons: why samples are bad.
      bad: number of bad samples by reason.
      plain: whether there is plain text.
    """

    def __init__(self, counts: np.ndarray, meta: Mapping[str, Any]):
        self.counts = counts
        self.reasons: list[str] = list(meta["reasons"])
        self.bad: dict[str, int] = dict(meta["bad"])
        self.plain: bool = bool(meta["plain"])

    @classmethod
    def of(
        cls, source: Source, config: SourceConfig, builder: SampleBuilder, cache_dir: Path | None, workers: int = 0
    ) -> Lengths:
        """Counts, or takes from ``cache_dir`` what was counted earlier (an interrupted count resumes)."""
        if cache_dir is None:
            chunks = (count(source, config.prompts, builder, chunk) for chunk in _chunks(source))
            counts = np.zeros((len(source), 2), np.int32)
            return cls(counts, _join(chunks, counts))
        name = f"{source.fingerprint()[:24]}-{length_digest(config, builder)}"
        file = cache_dir / "lengths" / f"{name}.npy"
        if not file.is_file():
            try:
                _count_into(file, source, config, builder, workers)
            except FileNotFoundError:  # another process has counted too, was sooner, and removed the parts
                if not file.is_file():
                    raise
        return cls(np.load(file, mmap_mode="r"), json.loads(file.with_suffix(".json").read_text("utf-8")))


def length_digest(config: SourceConfig, builder: SampleBuilder) -> str:
    """Hash of all that decides the counts but the source's content."""
    size = f"{builder.geometry.tile_size} {builder.geometry.token_pixels}"
    extra = "\n".join([size, builder.tokenizer.digest, *config.prompts])
    return builder.config.digest(*LENGTH_FIELDS, extra=extra)


def pick_prompt(prompts: tuple[str, ...], index: int) -> str:
    """The prompt that goes with sample ``index``: always the same."""
    if len(prompts) == 1:
        return prompts[0]
    mixed = (index * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & (2**64 - 1)
    return prompts[(mixed >> 33) % len(prompts)]


def _chunks(source: Source) -> list[range]:
    return [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]


def count(
    source: Source, prompts: tuple[str, ...], builder: SampleBuilder, chunk: range
) -> tuple[np.ndarray, list[str]]:
    """Token counts of the samples of ``chunk``, as in ``Lengths``: counts and reasons."""
    indices = np.arange(chunk.start, chunk.stop)
    images, sizes = source.image_sizes(indices)
    visual, codes = builder.visual_tokens(images, sizes)
    reasons: dict[str, int] = {}
    counts = np.stack([visual, np.zeros_like(visual)], axis=1).astype(np.int32)
    for at, (index, text) in enumerate(zip(indices.tolist(), _texts(source, indices.tolist()))):
        try:
            if codes[at]:
                raise BadSample(SIZE_REASONS[codes[at]])
            tokens, plain = builder.text_tokens(text(), int(images[at]), pick_prompt(prompts, index))
            counts[at, 1] = -tokens if plain else tokens
        except BadSample as error:
            counts[at] = -1 - reasons.setdefault(error.reason, len(reasons)), 0
        except DataError:
            raise
        except Exception as error:  # a fault of this program; one sample must not end a run
            _log.warning("sample %d cannot be counted: %s: %s", index, type(error).__name__, error)
            counts[at] = -1 - reasons.setdefault("unexpected_error", len(reasons)), 0
    return counts, list(reasons)


def _texts(source: Source, indices: list[int]) -> Iterator[Callable[[], RawSample]]:
    """For each sample a function that returns its text or raises; of remote shards, several are fetched at a time."""
    if not source.is_remote:
        yield from (functools.partial(source.read_text, index) for index in indices)
    else:
        futures = ahead(source.read_text, ((index,) for index in indices), _FETCHES)
        yield from (future.result for future in futures)


def _join(chunks: Iterable[tuple[np.ndarray, list[str]]], joined: np.ndarray) -> dict[str, Any]:
    """Fills ``joined`` with the counts of consecutive chunks, under one list of reasons; returns what goes with it."""
    reasons: dict[str, int] = {}
    bad: Counter[int] = Counter()
    start, plain = 0, False
    for counts, names in chunks:
        counts = np.array(counts)
        table = np.array([reasons.setdefault(name, len(reasons)) for name in names] or [0])
        at = np.flatnonzero(counts[:, 0] < 0)
        codes = table[-1 - counts[at, 0]]
        counts[at, 0] = -1 - codes
        bad.update(codes.tolist())
        plain = plain or bool((counts[:, 1] < 0).any())
        joined[start : start + len(counts)] = counts
        start += len(counts)
    names = list(reasons)
    return {"reasons": names, "bad": {names[code]: count for code, count in bad.items()}, "plain": plain}


def _count_into(file: Path, source: Source, config: SourceConfig, builder: SampleBuilder, workers: int) -> None:
    parts = file.with_suffix(".part")
    parts.mkdir(parents=True, exist_ok=True)
    chunks = _chunks(source)
    files = [parts / f"{chunk.start}-{chunk.stop}.npz" for chunk in chunks]
    todo = [(chunk, part) for chunk, part in zip(chunks, files) if not part.is_file()]
    _log.info("source %s: tokens of %d samples, %d of %d chunks", config.name, len(source), len(todo), len(chunks))
    if workers and len(todo) > 1:
        with ProcessPoolExecutor(
            workers, get_context("spawn"), _start, (config, builder.config, builder.geometry)
        ) as pool:
            for (_, part), counted in zip(todo, pool.map(_count_there, [chunk for chunk, _ in todo])):
                _save(part, *counted)
    else:
        for chunk, part in todo:
            _save(part, *count(source, config.prompts, builder, chunk))
    with publish.new_file(file) as new:
        joined = np.lib.format.open_memmap(new, "w+", np.int32, (len(source), 2))  # it may not fit in memory
        meta = _join(map(_load, files), joined)
        joined.flush()
        publish.write_text(file.with_suffix(".json"), json.dumps(meta))
    shutil.rmtree(parts, ignore_errors=True)


def _save(file: Path, counts: np.ndarray, reasons: list[str]) -> None:
    with publish.new_file(file) as new, new.open("wb") as stream:
        np.savez(stream, counts=counts, reasons=np.array(reasons, str))


def _load(file: Path) -> tuple[np.ndarray, list[str]]:
    with np.load(file) as arrays:
        return arrays["counts"], arrays["reasons"].tolist()


_here: tuple[Source, tuple[str, ...], SampleBuilder] | None = None  # of a worker process


def _start(config: SourceConfig, data: DataConfig, geometry: TileGeometry) -> None:
    global _here
    from data_pipelines.sources.source import open_source

    _here = open_source(config.spec), config.prompts, SampleBuilder(data, geometry=geometry)


def _count_there(chunk: range) -> tuple[np.ndarray, list[str]]:
    assert _here is not None
    return count(*_here, chunk)
