"""Token counts of every sample of a source: computed once, exactly, without decoding images, and kept in a file."""

from __future__ import annotations

import functools
import io
import json
import logging
import shutil
import zlib
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
from data_pipelines.io.digests import with_checksum, without_checksum
from data_pipelines.io.processes import ahead, end_with_parent
from data_pipelines.io.storage import Patience, set_patience, storage

if TYPE_CHECKING:
    from data_pipelines.records.raw_sample import RawSample
    from data_pipelines.sources.source import Source

_VERSION = 3  # of the files
CHUNK = 65_536  # samples counted at a time; also what is lost when counting is interrupted
_FETCHES = 16  # texts fetched at a time from remote shards, which is mostly waiting
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
        """Counts the tokens, or loads earlier counts from ``cache_dir`` (an interrupted count resumes).

        Raises StorageError if a source does not answer, or the cache cannot be written to.
        """
        if cache_dir is None:
            joined = _Joined(count(source, config.prompts, builder, chunk) for chunk in _chunks(source))
            counts = np.concatenate([np.zeros((0, 2), np.int32), *joined])
            return cls(counts, joined.meta())
        name = f"{source.fingerprint()[:24]}-{length_digest(config, builder)}-{_VERSION}"
        file = cache_dir / "lengths" / f"{name}.npy"
        with storage(str(file), "free some space, remove what is in its place, or use another cache_dir"):
            if (found := kept(file, len(source))) is not None:
                return cls(*found)
            try:
                _count_into(file, source, config, builder, workers)
            except FileNotFoundError:  # another process has counted too, finished earlier, and removed the parts
                if not file.is_file():
                    raise
            if (found := kept(file, len(source))) is None:
                raise DataError(f"{file}: cannot be kept; use another cache_dir")
            return cls(*found)


def length_digest(config: SourceConfig, builder: SampleBuilder) -> str:
    """Hash of everything that determines the counts, except the source's content."""
    size = f"{builder.geometry.tile_size} {builder.geometry.token_pixels}{' native' * builder.geometry.native}"
    extra = "\n".join([size, builder.tokenizer.digest + builder.chat.template.digest, *config.prompts])
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
    """Token counts of the samples in ``chunk``, as in ``Lengths``: counts and reasons."""
    indices = np.arange(chunk.start, chunk.stop)
    images, sizes = source.image_sizes(indices)
    limits = source.most_tiles(indices), source.frame_tiles(indices)
    visual, codes = builder.visual_tokens(images, sizes, *limits)
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
        except Exception as error:  # a bug in this program; one sample must not end a run
            _log.warning("sample %d cannot be counted: %s: %s", index, type(error).__name__, error)
            counts[at] = -1 - reasons.setdefault("unexpected_error", len(reasons)), 0
    return counts, list(reasons)


def _texts(source: Source, indices: list[int]) -> Iterator[Callable[[], RawSample]]:
    """For each sample a function that returns its text or raises; remote texts are fetched several at a time."""
    if not source.is_remote:
        yield from (functools.partial(source.read_text, index) for index in indices)
    else:
        futures = ahead(source.read_text, ((index,) for index in indices), _FETCHES)
        yield from (future.result for future in futures)


class _Joined:
    """The counts of consecutive chunks with a common list of reasons, chunk by chunk; then their metadata."""

    def __init__(self, chunks: Iterable[tuple[np.ndarray, list[str]]]):
        self._chunks = chunks
        self._reasons: dict[str, int] = {}
        self._bad: Counter[int] = Counter()
        self._plain = False

    def __iter__(self) -> Iterator[np.ndarray]:
        for counts, names in self._chunks:
            counts = np.array(counts, np.int32)
            table = np.array([self._reasons.setdefault(name, len(self._reasons)) for name in names] or [0])
            at = np.flatnonzero(counts[:, 0] < 0)
            codes = table[-1 - counts[at, 0]]
            counts[at, 0] = -1 - codes
            self._bad.update(codes.tolist())
            self._plain = self._plain or bool((counts[:, 1] < 0).any())
            yield counts

    def meta(self) -> dict[str, Any]:
        names = list(self._reasons)
        return {"reasons": names, "bad": {names[c]: n for c, n in self._bad.items()}, "plain": self._plain}


def kept(file: Path, samples: int) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Earlier counts; None if there is no intact file. Raises OSError."""
    try:
        meta = json.loads(without_checksum(file.with_suffix(".json").read_bytes()))
        counts = np.load(file, mmap_mode="r", allow_pickle=False)
        if counts.dtype != np.int32 or counts.shape != (samples, 2) or _checksum(counts) != meta["checksum"]:
            raise ValueError("the checksum does not match")
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, KeyError, TypeError) as error:
        _log.warning("%s: damaged (%s); its samples are counted again", file, error)
        return None
    return counts, meta


def _checksum(counts: np.ndarray, start: int = 0) -> int:
    """CRC-32 of counts, continued from ``start``, using little memory."""
    for at in range(0, len(counts), CHUNK):
        start = zlib.crc32(np.ascontiguousarray(counts[at : at + CHUNK]).tobytes(), start)
    return start


def _count_into(file: Path, source: Source, config: SourceConfig, builder: SampleBuilder, workers: int) -> None:
    parts = file.with_suffix(".part")
    parts.mkdir(parents=True, exist_ok=True)
    chunks = _chunks(source)
    files = [parts / f"{chunk.start}-{chunk.stop}.npz" for chunk in chunks]
    todo = [(chunk, part) for chunk, part in zip(chunks, files) if not _is_whole(part, len(chunk))]
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
    write(file, len(source), map(_load, files))
    shutil.rmtree(parts, ignore_errors=True)


def write(file: Path, samples: int, chunks: Iterable[tuple[np.ndarray, list[str]]]) -> None:
    """Writes what ``kept`` reads: counts and reasons of consecutive samples, as ``count`` returns them. Raises OSError.

    It writes piece by piece: the whole may not fit in memory, and mapping a file on a full disk would kill the process.
    """
    joined, checksum = _Joined(chunks), 0
    with publish.new_file(file) as new, new.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (samples, 2)})
        for counts in joined:
            stream.write(counts.tobytes())
            checksum = _checksum(counts, checksum)
        meta = {**joined.meta(), "checksum": checksum}
        publish.write_bytes(file.with_suffix(".json"), with_checksum(json.dumps(meta).encode()))


def _save(file: Path, counts: np.ndarray, reasons: list[str]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, counts=counts, reasons=np.array(reasons, str))
    publish.write_bytes(file, with_checksum(buffer.getvalue()))


def _load(file: Path) -> tuple[np.ndarray, list[str]]:
    with np.load(io.BytesIO(without_checksum(file.read_bytes()))) as arrays:
        return arrays["counts"], arrays["reasons"].tolist()


def _is_whole(file: Path, samples: int) -> bool:
    """Whether a part has been written and is intact. Raises OSError."""
    try:
        return len(_load(file)[0]) == samples
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, EOFError) as error:
        _log.warning("%s: damaged (%s); its samples are counted again", file, error)
        return False


_here: tuple[Source, tuple[str, ...], SampleBuilder] | None = None  # of a worker process


def _start(config: SourceConfig, data: DataConfig, geometry: TileGeometry) -> None:
    global _here
    end_with_parent()
    set_patience(Patience(data.retries, data.storage_wait_s))
    from data_pipelines.sources.source import open_source

    _here = open_source(config.spec, ask_again=False), config.prompts, SampleBuilder(data, geometry=geometry)


def _count_there(chunk: range) -> tuple[np.ndarray, list[str]]:
    assert _here is not None
    return count(*_here, chunk)
