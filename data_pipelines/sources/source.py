"""Sources of samples: random access to everything the trainer can read, behind one small interface.

``open_source({"kind": "tar", "paths": "shards/*.tar"})`` finds the shards, loads (or builds) their indices, joins
captions and applies the metadata filters; the result is the list of usable samples, in a fixed order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import DataError, check_keys, did_you_mean
from data_pipelines.io import chunk_cache, paths, publish
from data_pipelines.io.digests import Digest, json_digest
from data_pipelines.io.processes import ahead
from data_pipelines.io.storage import storage
from data_pipelines.records.extra_formats import now_readable
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.sources.captions import CaptionedSource, open_captions
from data_pipelines.sources.finding import shard_names
from data_pipelines.sources.formats.registry import FORMATS
from data_pipelines.sources.indexed import IndexedSource
from data_pipelines.sources.indexing import load_or_make, shard_stamp, with_mark
from data_pipelines.sources.indices.columns import Columns
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.shard_index import UNASKED, ShardIndex
from data_pipelines.sources.scores import open_scores
from data_pipelines.sources.selection import table
from data_pipelines.sources.selection.filters import Filters
from data_pipelines.sources.selection.select import CONTRADICTION, Joined, Selection, repeat, select, settle, unique
from data_pipelines.sources.selection.share import Share

_log = logging.getLogger(__name__)
_PROBLEMS_LOGGED = 20  # per source, at most
_COMMON_OPTIONS = ("kind", "name", "paths", "index_dir", "captions", "scores", "filters", "remote_cache_gb")
_MOST_CONTRADICTED = 0.01  # maximum share of the joined captions
_THREADS = 16  # shards whose stamps and indices are fetched at a time, mostly waiting for remote storage


class Source(Protocol):
    """Random access to n usable samples; thread-safe, and safe to fork or pickle into other processes.

    ``is_remote``: whether reading is mostly waiting, so that several reads at a time are faster.
    """

    name: str
    is_remote: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample:
        """Sample ``index`` (0 <= index < n). Raises BadSample, StorageError if it cannot be read, IndexError."""
        ...

    def read_text(self, index: int) -> RawSample:
        """The same sample with ``images=()``: cheap, for counting tokens."""
        ...

    def read_images(self, index: int) -> RawSample:
        """The same sample with only key and images."""
        ...

    def key(self, index: int) -> str:
        """The key of sample ``index``; if it is offered for the second time, the key ends in "#2", and so on."""
        ...

    def image_sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Upright sizes from the index: (counts int32 [k], sizes int32 [sum(counts), 2] width and height)."""
        ...

    def most_tiles(self, indices: np.ndarray) -> np.ndarray:
        """int32 [k]: maximum tiles per image of each sample; 0 = as in the config."""
        ...

    def frame_tiles(self, indices: np.ndarray) -> np.ndarray:
        """int32 [sum of the samples' images]: maximum tiles of each image that is a video frame; 0 = not a frame."""
        ...

    def fingerprint(self) -> str:
        """Identity of the content: the same on every host and under every absolute path."""
        ...

    def dropped(self) -> dict[str, int]:
        """Number of samples that are not offered, by reason, including those that filters drop."""
        ...

    def filtered(self) -> dict[str, int]:
        """Number of samples that filters drop, by filter."""
        ...

    def counts(self) -> dict[str, int]:
        """ "samples" in the shards; with captions also "captions", and those that belong to no sample ("unused")."""
        ...

    def check_unchanged(self, index: int) -> None:
        """Raises StorageError if the shard of sample ``index`` has changed since indexing: its samples are not bad."""
        ...

    def problems(self) -> dict[str, list[str]]:
        """Descriptions of what is wrong with shards as a whole (truncated, unfinished, ...), by path."""
        ...


def open_source(spec: Mapping[str, Any], ask_again: bool = True) -> Source:
    """Opens a source; missing or stale indices are built.

    Args:
      ask_again: whether files that did not answer when they were indexed are requested again; an answer changes what is
        offered.
      spec: "kind" (tar, files, parquet, jsonl, text, array_record, tfds) and "paths" (a path, URL or glob, or a list of
        them). Optional: "name"; "index_dir" (where indices are kept, if not beside the shards); "captions" (files of
        key -> caption that replace the samples' own; samples without one are dropped as "no_joined_caption"); "scores"
        (files of key -> numbers, for filters); "filters" (see ``selection.filters.check_filters``); "remote_cache_gb"
        (read remote shards in pieces of 8 MiB that are kept on the local disk, up to this number of GB: for few hosts
        and shuffle "local"); and the options of the kind (see its module in ``formats``).

    Shards that are damaged or unfinished as a whole are logged as warnings; ``problems`` lists them all.

    Raises DataError: unknown kind or key (with the nearest valid one), paths that match nothing, nothing usable;
    StorageError if storage does not answer.
    """
    kind = spec.get("kind")
    if kind not in FORMATS:
        raise DataError(f"source: unknown kind {kind!r}; {did_you_mean(kind, FORMATS)}")
    format = FORMATS[kind]
    name = str(spec.get("name") or kind)
    what = f"source {name!r} of kind {kind!r}"
    check_keys(spec, (*_COMMON_OPTIONS, *(field.name for field in dataclasses.fields(format.options))), what)
    if not spec.get("paths"):
        raise DataError(f"{what}: no paths; set 'paths' to a file, a glob or a list of them")
    if size := spec.get("remote_cache_gb"):
        if isinstance(size, bool) or not isinstance(size, int | float) or size < 0:
            raise DataError(f"{what}: remote_cache_gb must be a number of gigabytes, got {size!r}")
        chunk_cache.enable(size)
    captions = open_captions(spec["captions"]) if spec.get("captions") else None
    scores = open_scores(spec["scores"]) if spec.get("scores") else None
    filters = Filters(spec.get("filters"), what, scores.names if scores else ())
    joined = Joined(captions, scores, format.key_separator)
    options = {**spec, "hash_images": True} if "unique_images" in filters.options else spec
    found = list(format.find(paths.expand(spec["paths"]), options))
    names = shard_names([shard.source for shard, _ in found])
    shards = [dataclasses.replace(shard, name=shard_name) for (shard, _), shard_name in zip(found, names)]
    offer = _Offer(shards, [share for _, share in found], filters, joined, spec.get("index_dir"), ask_again)
    columns, header = offer.table()
    shards = [
        dataclasses.replace(shard, mark=mark, content=content)
        for shard, mark, content in zip(shards, offer.marks, header.pop("contents"))
    ]
    _log_problems(header["problems"])
    _check_captions(what, header["dropped"].get(CONTRADICTION, 0), len(columns["row"]))
    if not len(columns["row"]):
        raise DataError(f"{what}: no usable sample in {len(shards)} shard(s); {_losses(header)}")
    source = IndexedSource(name, format, shards, columns, **header)
    return source if captions is None else CaptionedSource(source, captions, columns)


def _check_captions(what: str, contradicted: int, joined: int) -> None:
    """Logs joined captions that belong to other images. Raises DataError if there are more than a few."""
    if contradicted:
        _log.warning("%s: %d joined captions name another url or sha256 than their samples", what, contradicted)
    if contradicted > _MOST_CONTRADICTED * (contradicted + joined):
        raise DataError(
            f"{what}: {contradicted} of {contradicted + joined} joined captions name another url or sha256 than the "
            "samples with the same key: they were made for other shards; to join them by url, leave out their key"
        )


def _losses(header: Mapping[str, Any]) -> str:
    """What was dropped, by reason, with an example of each."""
    lost = {**header["dropped"], **header["filtered"]}
    examples = "; ".join(f"{reason}: {example}" for reason, example in header["examples"].items())
    problems = "; ".join(f"{path}: {found[0]}" for path, found in list(header["problems"].items())[:3])
    return f"dropped: {lost}" + "".join(f"; {part}" for part in (examples, problems) if part)


def _log_problems(problems: Mapping[str, Sequence[str]]) -> None:
    """Logs what is wrong with shards, one line each up to a limit."""
    lines = [(path, problem) for path, found in problems.items() for problem in found]
    for path, problem in lines[:_PROBLEMS_LOGGED]:
        _log.warning("%s: %s", path, problem)
    if len(lines) > _PROBLEMS_LOGGED:
        _log.warning("%d more problems: python -m data_pipelines.index lists all", len(lines) - _PROBLEMS_LOGGED)


@dataclasses.dataclass(frozen=True)
class _Offer:
    """What determines the samples that a source offers; ``shares``: how much of each shard is offered."""

    shards: Sequence[Shard]
    shares: Sequence[Share]
    filters: Filters
    joined: Joined
    index_dir: str | None
    ask_again: bool = True

    @functools.cached_property
    def stamps(self) -> list[str]:
        """The stamps of the shards."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(shard_stamp, self.shards))

    @functools.cached_property
    def marks(self) -> list[str]:
        """``Shard.mark`` of the shards, taken before their indices are loaded."""
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return [shard.mark for shard in pool.map(with_mark, self.shards)]

    def table(self) -> tuple[Columns, dict[str, Any]]:
        """(columns of the offered samples, the header from ``_build``), from the cache if it exists."""
        _ = self.marks
        kept = paths.cache_dir() / "sources" / self._identity()
        found = Columns.load_whole(kept)
        lost = [] if found is None else found[1]["dropped"]
        if found is not None and not (self.ask_again and (UNASKED in lost or now_readable(lost))):
            return found
        with storage(str(kept), "free some space, or set MONO_JAX_CACHE"):
            publish.remove_stale(kept.parent)
            try:
                with contextlib.ExitStack() as stack:  # a large table is published at the end
                    make_folder = functools.partial(publish.new_folder, kept, replace=True)
                    columns, header = self._build(lambda: stack.enter_context(make_folder()))
            except FileExistsError:  # another process was faster
                columns = None
        if columns is not None:
            return columns, header
        if (found := Columns.load_whole(kept)) is None:
            raise DataError(f"{kept}: cannot be kept there; remove it, or set MONO_JAX_CACHE")
        return found

    def _identity(self) -> str:
        shards = [
            [shard.path, shard.name, shard.options.given(), shard.encoding, dataclasses.astuple(share), stamp]
            for shard, share, stamp in zip(self.shards, self.shares, self.stamps)
        ]
        return json_digest([shards, self.shards[0].kind, self.filters.options, self.joined.digest, table.VERSION])

    def _build(self, make_folder: Callable[[], Path]) -> tuple[Columns | None, dict[str, Any]]:
        """(the columns, None if they are in the folder; the header)."""
        dropped: Counter[str] = Counter()
        problems: dict[str, list[str]] = {}
        contents: list[str] = []
        examples: dict[str, str] = {}
        captions, separator = self.joined.captions, self.joined.separator
        samples, used = 0, np.zeros(0 if captions is None else len(captions), bool)
        content = Digest()
        content.add("" if captions is None else captions.digest)
        builder = table.TableBuilder(make_folder)
        for shard, index, selection in self._selections(dropped):
            if index.problems:
                problems[shard.source] = index.problems
            for part in (shard.name, index.meta["digest"], selection.rows.tobytes()):
                content.add(part)
            if shard.encoding:
                content.add(shard.encoding)
            builder.add(selection)
            for reason, (key, detail) in index.examples().items():
                examples.setdefault(reason, f"{shard.name}{separator}{key}" + (f" ({detail})" if detail else ""))
            contents.append(next(iter(index.meta["contents"]), ""))
            samples += len(index)
            if selection.captions is not None:
                used[selection.captions] = True
        counts = {"samples": samples}
        if captions is not None:
            counts |= {"captions": len(captions), "unused": len(used) - int(np.count_nonzero(used))}
        header = {
            "fingerprint": content.hex(),
            "dropped": dict(+dropped),
            "filtered": dict(+self.filters.dropped),
            "problems": problems,
            "examples": examples,
            "contents": contents,
            "counts": counts,
        }
        return builder.finish(header), header

    def _selections(self, dropped: Counter[str]) -> Iterator[tuple[Shard, ShardIndex, Selection]]:
        """The offered samples of each shard; unusable samples are added to ``dropped``."""
        names = [shard.name for shard in self.shards]
        if self.filters.shared:
            settle(self._indices(), names, self.filters, self.joined)
        masks = unique(self._indices(), names, self.filters, self.joined) if self.filters.wants_unique else None
        for shard, share, index in zip(self.shards, self.shares, self._indices()):
            selection, _, lost = select(index, shard.name, self.filters, self.joined)
            dropped.update(lost)
            if masks is not None:
                selection = selection.where(next(masks))
            yield shard, index, repeat(selection, share)

    def _indices(self) -> Iterator[ShardIndex]:
        """The shards' indices in order, a few prefetched, so that memory does not grow with their number."""
        calls = ((shard, self.index_dir, False, self.ask_again) for shard in self.shards)
        for future in ahead(load_or_make, calls, _THREADS):
            yield future.result()[0]
