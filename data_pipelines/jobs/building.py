"""Rewriting shards of any kind as ArrayRecord files that hold only the samples in use, with an Apache Beam pipeline."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.encoding.captions import clean_caption
from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import blobs, copies, paths
from data_pipelines.io.digests import digest
from data_pipelines.io.storage import set_patience
from data_pipelines.jobs.arguments import patience
from data_pipelines.jobs.pipelines import run_pipeline
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.records.video.frames import RAW_FRAME
from data_pipelines.sources.containers.array_record import pack
from data_pipelines.sources.finding import shards_of
from data_pipelines.sources.source import Source, open_source

_log = logging.getLogger(__name__)

_GROUP_SIZE = 1  # records per chunk: with more, each random access would also decompress the neighbours


@dataclasses.dataclass(frozen=True)
class Task:
    """One output file: samples ``start`` to ``stop`` - 1 of the source that ``spec`` (JSON) describes."""

    spec: str
    start: int
    stop: int
    output: str
    tokenizer: str | None = None


def plan(spec: Mapping[str, Any], output: str, samples_per_file: int, tokenizer: str | None = None) -> list[Task]:
    """Cuts a source into output files PART-00000-of-00012.array_record, ... Raises DataError like ``open_source``."""
    if samples_per_file < 1:
        raise DataError(f"--samples_per_file must be at least 1, got {samples_per_file}")
    if tokenizer:
        Tokenizer(tokenizer)  # its errors are raised before any work begins
    text = json.dumps(spec, sort_keys=True)
    count = len(_source(text))
    files = -(-count // samples_per_file)
    return [
        Task(
            text,
            i * samples_per_file,
            min((i + 1) * samples_per_file, count),
            paths.join(output, f"part-{i:05d}-of-{files:05d}.array_record"),
            tokenizer,
        )
        for i in range(files)
    ]


@functools.lru_cache(maxsize=2)
def _source(spec: str) -> Source:
    """One for each process."""
    return open_source(json.loads(spec))


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer(path)


def convert(sample: RawSample, tokenizer: Tokenizer | None = None, limits: ImageLimits | None = None) -> bytes:
    """The record of a sample, whose images are decoded once to check that they can be.

    With a tokenizer, "tokens" holds the ids of the cleaned caption, of the text, or of each turn of the conversation,
    without any template. Raises BadSample.
    """
    try:
        for image in sample.images:
            decode(image, limits or ImageLimits())
        sample = dataclasses.replace(sample, images=tuple(map(_encoded, sample.images)))
        texts = [text for _, text in sample.conversations]
        if sample.caption is not None:
            texts = [clean_caption(sample.caption)]
        elif sample.text is not None:
            texts = [sample.text]
    except BadSample as error:
        raise BadSample(error.reason, sample.key, error.detail) from None
    if tokenizer is None:
        return pack(sample)
    tokens = [list(tokenizer.encode(text)) for text in texts]
    return pack(sample, {"tokens": tokens if sample.conversations else tokens[0]})


def _encoded(image: bytes) -> bytes:
    """The image unchanged; as PNG if it is a video frame, which comes as raw pixels."""
    if not image.startswith(RAW_FRAME):
        return image
    out = io.BytesIO()
    Image.open(io.BytesIO(image)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def build_file(task: Task) -> dict[str, int]:
    """Writes one output file and finally its counts beside it; returns the counts: "samples", "written" and reasons.

    A file that already has counts from the same task is left unchanged.
    """
    stats_file = task.output.removesuffix(".array_record") + "_stats.json"
    source = _source(task.spec)
    identity = digest(source.fingerprint(), json.dumps([task.start, task.stop, task.tokenizer]))
    if paths.exists(stats_file):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # damaged: built again
            done = json.loads(blobs.read_bytes(stats_file))
            if done["identity"] == identity:
                return done["counts"]
    tokenizer = _tokenizer(task.tokenizer) if task.tokenizer else None
    counts: Counter[str] = Counter(samples=task.stop - task.start)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "records"
        _write_records(str(local), _records(source, task, tokenizer, counts))
        copies.copy_to(str(local), task.output)
    stats = {"successes": counts["written"], "identity": identity, "counts": dict(counts)}
    copies.write_bytes(stats_file, json.dumps(stats).encode())
    return dict(counts)


def _records(source: Source, task: Task, tokenizer: Tokenizer | None, counts: Counter[str]) -> Iterator[bytes]:
    for index in range(task.start, task.stop):
        try:
            record = convert(source.read(index), tokenizer)
        except BadSample as error:
            counts[error.reason] += 1
            continue
        except DataError:
            raise
        except Exception as error:  # a fault of this program or of a decoder; one sample must not end the run
            _log.warning("sample %d: %s: %s", index, type(error).__name__, error)
            counts["unexpected_error"] += 1
            continue
        counts["written"] += 1
        yield record


def _write_records(path: str, records: Iterator[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(path, f"group_size:{_GROUP_SIZE},uncompressed")  # images are compressed already
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, key by key; associative, as Beam's combiners require."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def source_spec(patterns: Sequence[str], kind: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``open_source`` takes, from the arguments of the command. Raises DataError if the shards' kinds differ."""
    shards = shards_of(patterns, kind, options)
    kinds = sorted({shard.kind for shard in shards})
    if len(kinds) > 1:
        raise DataError(f"shards of several kinds ({', '.join(kinds)}): build one kind at a time, see --kind")
    if any(shard.encoding for shard in shards):
        raise DataError("max_dynamic_patch and data_augment of a meta file cannot be stored: build its sets separately")
    same = len({shard.options for shard in shards}) == 1  # not so where a meta file gives each annotation its own root
    spec = {"kind": kinds[0], "paths": [shard.source for shard in shards] if same else list(patterns)}
    spec |= shards[0].options.given() if same else {}
    given = {name: options[name] for name in ("captions", "scores", "filters", "index_dir") if options.get(name)}
    return {**spec, **given}


def run(options: argparse.Namespace, beam_arguments: Sequence[str]) -> dict[str, Any]:
    """Builds what the command line names and prints a summary; returns what ``--json`` prints. Raises DataError."""
    start = time.monotonic()
    set_patience(patience(options))
    spec = source_spec(options.shards, options.kind, vars(options))
    tasks = plan(spec, options.output, options.samples_per_file, options.tokenizer)
    dropped = dict(_source(tasks[0].spec).dropped())
    summary = paths.join(options.output, "build_stats.json")
    counts = run_pipeline(tasks, build_file, add_counts, summary, beam_arguments)
    written, samples = counts.pop("written", 0), counts.pop("samples", 0)
    skipped = add_counts([dropped, counts])
    seconds = round(time.monotonic() - start, 3)
    print(f"{len(tasks)} files with {written} samples in {seconds} s; skipped: {skipped or 'none'}")
    total = samples + sum(dropped.values())
    return {"files": len(tasks), "samples": total, "written": written, "skipped": skipped, "seconds": seconds}
