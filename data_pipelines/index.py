"""Makes the indices of shards: ``python -m data_pipelines.index SHARDS... --json``.

An index lies beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that place cannot
be written to. It is made again when its shard has changed. Shards are indexed in parallel; an interrupted run goes on
where it stopped, since finished indices are kept.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType
from typing import Any, TypeVar

from data_pipelines import cli as command
from data_pipelines.errors import DataError
from data_pipelines.io import storage
from data_pipelines.sources import shard_index
from data_pipelines.sources.shard_index import ShardIndex

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of source: its module in ``sources.formats``, the options of its ``scan``, its shards' suffixes."""

    module: str
    options: tuple[str, ...]
    suffixes: tuple[str, ...] = ()


# Every module has ``scan(path, meta, **options) -> ShardIndex`` and a class ``Source``; and where shards are not plain
# files ``stamp(path, options)``, and where paths are not shards themselves ``find(paths, options)``.
FORMATS: dict[str, Format] = {
    "tar": Format("tar", ("caption_key", "hash_images"), (".tar",)),
    "files": Format("files", ("caption_key", "hash_images")),
    "parquet": Format("parquet", ("image_key", "caption_key", "hash_images"), (".parquet",)),
    "jsonl": Format("jsonl", ("image_root", "caption_key", "hash_images"), (".jsonl", ".json")),
    "array_record": Format("array_record", ("hash_images",), (".array_record", ".arrayrecord")),
    "tfds": Format("tfds", ("split", "image_key", "caption_key", "hash_images")),
    "text": Format("plain", ("chunk_bytes",), (".txt", ".text", ".md")),
}


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """A shard to be indexed: its kind, its place, and the options that decide the index's content."""

    kind: str
    path: str
    options: tuple[tuple[str, Any], ...] = ()


def format_module(kind: str) -> ModuleType:
    return importlib.import_module(f"data_pipelines.sources.formats.{FORMATS[kind].module}")


def kind_of(path: str) -> str:
    """The kind of source that a path's name suggests. Raises DataError."""
    if storage.is_dir(path):
        return "tfds" if storage.exists(storage.join(path, "dataset_info.json")) else "files"
    name = re.sub(r"-\d+-of-\d+$", "", path.lower())
    for kind, form in FORMATS.items():
        if name.endswith(form.suffixes) and form.suffixes:
            return kind
    known = ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)
    raise DataError(f"{path}: unknown kind of shard; give a folder or one of {known}, or say which with --kind")


def source_shards(kind: str, paths: Sequence[str], options: Mapping[str, Any]) -> list[tuple[ShardSpec, float]]:
    """(shard, how often it is offered) for paths of one kind; options that are None or False count as not given."""

    def spec(path: str, options: Mapping[str, Any]) -> ShardSpec:
        given = {k: v for k, v in options.items() if k in FORMATS[kind].options and v not in (None, False)}
        return ShardSpec(kind, path, tuple(sorted(given.items())))

    module = format_module(kind)
    if not hasattr(module, "find"):
        return [(spec(path, options), 1.0) for path in paths]
    return [(spec(path, {**options, **more}), times) for path, more, times in module.find(paths)]


def shard_stamp(spec: ShardSpec) -> str:
    """Changes when the shard does. Raises DataError if it is not there."""
    module = format_module(spec.kind)
    try:
        return module.stamp(spec.path, dict(spec.options)) if hasattr(module, "stamp") else storage.stamp(spec.path)
    except OSError as error:
        raise DataError(f"{spec.path}: cannot be read ({error})") from None


def load_or_make(spec: ShardSpec, index_dir: str | None = None, force: bool = False) -> tuple[ShardIndex, bool]:
    """(the shard's index, whether it was made now because it was missing, stale or ``force``).

    Raises DataError if the shard cannot be opened.
    """
    options = dict(spec.options)
    places = shard_index.index_path(spec.path, {"kind": spec.kind, **options} if options else {}, index_dir)
    stamp = shard_stamp(spec)
    if not force and (index := shard_index.load_fresh(places, spec.kind, stamp)):
        return index, False
    index = make_index(spec, stamp)
    shard_index.save(index, places)
    return index, True


def make_index(spec: ShardSpec, stamp: str = "") -> ShardIndex:
    """Looks through the shard. Raises DataError if it cannot be opened."""
    try:
        return format_module(spec.kind).scan(spec.path, {"kind": spec.kind, "stamp": stamp}, **dict(spec.options))
    except OSError as error:
        raise DataError(f"{spec.path}: cannot be read ({error})") from None


@dataclasses.dataclass
class ShardReport:
    """What indexing a shard found; ``problems`` concern the shard as a whole."""

    path: str
    samples: int = 0
    usable: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    made: bool = False


def report_shard(spec: ShardSpec, index_dir: str | None = None, force: bool = False) -> ShardReport:
    """Indexes one shard; one that cannot be opened is reported, not raised."""
    try:
        index, made = load_or_make(spec, index_dir, force)
    except DataError as error:
        return ShardReport(spec.path, problems=[f"unreadable: {error}"])
    return ShardReport(spec.path, len(index), len(index.usable), index.dropped(), index.problems, made)


def index_shards(
    specs: Sequence[ShardSpec], workers: int = 1, index_dir: str | None = None, force: bool = False
) -> Iterator[ShardReport]:
    """Reports of all shards in order, made by ``workers`` processes."""
    if workers <= 1 or len(specs) <= 1:
        yield from (report_shard(spec, index_dir, force) for spec in specs)
        return
    reports = in_processes(report_shard, [(spec, index_dir, force) for spec in specs], workers)
    for spec, report in zip(specs, reports):
        yield report or ShardReport(spec.path, problems=["unreadable: the indexing process died (out of memory?)"])


def in_processes(function: Callable[..., T], calls: Sequence[tuple], workers: int) -> Iterator[T | None]:
    """``function(*call)`` of every call in order, by ``workers`` processes; None for a call that kills its process.

    Raises what the function raises.
    """
    ready: dict[int, T | None] = {}
    turn = 0
    for number, result in _as_they_come(function, calls, workers):
        ready[number] = result
        while turn in ready:
            yield ready.pop(turn)
            turn += 1


def _as_they_come(function: Callable[..., T], calls: Sequence[tuple], workers: int) -> Iterator[tuple[int, T | None]]:
    """(number, result) of every call. A process that dies takes all calls of its pool with it that are not done.

    Calls begin in order, so the guilty one is among the first of these, at most ``workers`` of them: they are tried
    again one by one, the others in a new pool.
    """
    context = multiprocessing.get_context("spawn")  # threads of the parent do not survive a fork
    left = list(range(len(calls)))
    while left:
        lost = []
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(left)), context) as pool:
            futures = [_submitted(pool, function, calls[number]) for number in left]
            for number, future in zip(left, futures):
                try:
                    yield number, future.result()
                except BrokenProcessPool:
                    lost.append(number)
        for number in lost[:workers]:
            with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                try:
                    yield number, pool.submit(function, *calls[number]).result()
                except BrokenProcessPool:
                    yield number, None
        left = lost[workers:]


def _submitted(
    pool: concurrent.futures.Executor, function: Callable[..., T], call: tuple
) -> concurrent.futures.Future[T]:
    """A call's future, also where the pool is broken already."""
    try:
        return pool.submit(function, *call)
    except BrokenProcessPool as error:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        future.set_exception(error)
        return future


def shards_of(paths: Iterable[str], kind: str | None, options: Mapping[str, Any]) -> list[ShardSpec]:
    """Shards in order of ``paths`` (globs allowed), the kind of each told from its name unless given.

    A folder stands for the shards in it and below; where it holds loose files it is a shard itself. Files of unknown
    kind that a glob matches beside shards (statistics, indices) are left out. Raises DataError if nothing is found.
    """
    specs: dict[ShardSpec, None] = {}
    for pattern in paths:
        found = storage.expand(pattern)
        for path in found:
            try:
                for each, its_kind in [(path, kind)] if kind else _shards_in(path):
                    specs.update((spec, None) for spec, _ in source_shards(its_kind, [each], options))
            except DataError:
                if len(found) == 1:
                    raise
    if not specs:
        raise DataError(f"{', '.join(map(str, paths))}: no shards found; say what it is with --kind")
    return list(specs)


def _shards_in(path: str) -> list[tuple[str, str]]:
    """(path, kind) of the shards that a path stands for."""
    kind = kind_of(path)
    if kind != "files":
        return [(path, kind)]
    folders = storage.walk(path)
    files = [storage.join(folder, name) for folder in folders for name, _, _ in storage.list_dir(folder)]
    # img2dataset puts a table of metadata beside each shard: 00000.parquet beside 00000.tar or the folder 00000.
    stems = {file.removesuffix(".tar") for file in files if file.endswith(".tar")} | set(folders)
    shards = [(f, kind_of(f)) for f in files if f.endswith((".tar", ".jsonl", ".array_record"))]
    shards += [(f, "parquet") for f in files if f.endswith(".parquet") and f.removesuffix(".parquet") not in stems]
    loose = format_module("files").folders_of_samples(folders)
    return sorted([*shards, *((folder, "files") for folder in loose)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(
        "index", __doc__, "example: python -m data_pipelines.index 'laion/*.tar' --workers=16 --json"
    )
    add_shard_arguments(parser)
    parser.add_argument("--index_dir", help="where indices lie (default: beside the shards, else the cache folder)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="make indices again even if they are fresh")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    specs = shards_of(options.shards, options.kind, vars(options))
    samples, usable, made, skipped, problems = 0, 0, 0, Counter(), {}
    for report in index_shards(specs, options.workers, options.index_dir, options.force):
        samples, usable, made = samples + report.samples, usable + report.usable, made + report.made
        skipped.update(report.skipped)
        if report.problems:
            problems[report.path] = report.problems
        for problem in report.problems:
            print(f"{report.path}: {problem}")
    seconds = round(time.monotonic() - start, 3)
    print(f"{len(specs)} shards ({made} indexed now): {usable} of {samples} samples usable, {seconds} s")
    for reason, count in skipped.most_common():
        print(f"  {reason}: {count}")
    if options.json:
        summary = {"shards": len(specs), "samples": samples, "usable": usable, "skipped": dict(skipped)}
        command.json_line({**summary, "seconds": seconds, "indexed": made, "problems": problems})


def add_shard_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which shards and how they are to be understood."""
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="path, URL or glob; {00000..00127} counts")
    parser.add_argument("--kind", choices=sorted(FORMATS), help="kind of source (default: by the name of each path)")
    parser.add_argument("--image_root", help="jsonl: folder of the images (default: that of the file)")
    parser.add_argument("--caption_key", help="field of the JSON or column that holds the caption")
    parser.add_argument("--image_key", help="parquet, tfds: column that holds the image")
    parser.add_argument("--split", help="tfds: split (default: train)")
    parser.add_argument("--chunk_bytes", type=int, help="text: greatest length of a piece")
    parser.add_argument("--hash_images", action="store_true", help="hash images, for the filter unique_images")


if __name__ == "__main__":
    command.run(main)
