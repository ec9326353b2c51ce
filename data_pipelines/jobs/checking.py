"""Reading every sample of shards through the code that training uses, to find the bad ones."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.encoding.tokenizer import Spans
from data_pipelines.errors import BadSample, DataError, StorageError
from data_pipelines.io.processes import in_processes
from data_pipelines.io.storage import Patience, set_patience
from data_pipelines.jobs.arguments import Faults, patience
from data_pipelines.jobs.check_table import Table
from data_pipelines.records.raw_sample import Form, RawSample
from data_pipelines.sources.containers.members import IGNORED
from data_pipelines.sources.finding import shard_names, shards_of
from data_pipelines.sources.formats.registry import FORMATS
from data_pipelines.sources.indexed import IndexedSource
from data_pipelines.sources.indexing import make_index, with_mark
from data_pipelines.sources.indices.index_builder import NOTED
from data_pipelines.sources.indices.shard import Shard
from data_pipelines.sources.indices.shard_index import ShardIndex
from data_pipelines.sources.selection.select import Selection
from data_pipelines.sources.selection.table import TableBuilder
from data_pipelines.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

_TOKENS = {IMAGE_START: 256, IMAGE_END: 257, IMAGE_CONTEXT: 258}


class _Bytes:
    """Replaces a tokenizer where none is given: every byte is a token. It accepts whatever real tokenizers accept."""

    added = _TOKENS
    bos = eos = None
    digest = "bytes"

    def id(self, token: str) -> int:
        return self.added[token]

    def has(self, token: str) -> bool:
        return True

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def marked(self, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
        # Byte offsets of each character and of the end of the text.
        starts = list(itertools.accumulate((len(character.encode()) for character in text), initial=0))
        marks = [False] * starts[-1]
        for first, last in spans:
            begin, end = (starts[min(max(place, 0), len(text))] for place in (first, last))
            marks[begin:end] = [True] * (end - begin)
        return self.encode(text), marks


class Bad(NamedTuple):
    """A bad sample; ``line`` in the shard (or number of the list element), 0 = none; ``id``: the record's own."""

    key: str
    reason: str
    detail: str
    line: int = 0
    id: str = ""

    def to_dict(self, path: str) -> dict[str, Any]:
        """The report line; ``path``: of the shard."""
        found = {"key": self.key, "reason": self.reason, "detail": self.detail, "path": path}
        return found | {name: value for name, value in (("line", self.line), ("id", self.id)) if value}


@dataclasses.dataclass
class ShardCheck:
    """What was found in one shard; ``fault``: why storage did not deliver it."""

    path: str
    kind: str = ""
    samples: int = 0
    bad: list[Bad] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    fault: StorageError | None = None


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    """How samples are built while they are checked.

    Attributes:
      tokenizer: folder or file; None = every byte is a token.
      visual, text: slots of a row.
      max_tiles: of an image.
      patience: with storage that does not answer.
    """

    tokenizer: str | None
    visual: int
    text: int
    max_tiles: int
    patience: Patience = dataclasses.field(default_factory=lambda: Patience(retries=0))


@functools.cache
def _builder(settings: CheckSettings) -> SampleBuilder:
    config = DataConfig(
        (SourceConfig("check", {"kind": "tar"}),),
        settings.tokenizer or "bytes",
        visual_tokens=settings.visual,
        text_tokens=settings.text,
        max_tiles=settings.max_tiles,
    )
    return SampleBuilder(config, tokenizer=None if settings.tokenizer else _Bytes())


def check_shard(shard: Shard, settings: CheckSettings) -> ShardCheck:
    """Reads every sample of a shard; whatever goes wrong is part of the result, and every sample counts as good or bad.

    For a shard that storage does not deliver only ``fault`` is set. Raises DataError if the tokenizer cannot be loaded.
    """
    builder = _builder(settings)
    set_patience(settings.patience)
    try:
        return _checked(shard, builder)
    except StorageError as error:
        return ShardCheck(shard.source, shard.kind, fault=error)


def _checked(shard: Shard, builder: SampleBuilder) -> ShardCheck:
    """Like ``check_shard``, but raises StorageError."""
    result = ShardCheck(shard.source, shard.kind)
    try:
        shard = with_mark(shard)
        index = make_index(shard)
        shard = dataclasses.replace(shard, content=next(iter(index.meta["contents"]), ""))
    except StorageError:
        raise
    except DataError as error:
        result.problems.append(str(error))
        return result
    result.samples, result.problems = len(index), list(index.problems)
    only_images = shard.kind == "files" and not np.any(index.columns["text_form"] != Form.NONE)
    rows = np.arange(len(index)) if only_images else index.usable
    if only_images and len(rows):
        result.kind = f"{shard.kind}, images only"
    result.bad = list(_unusable(shard, index, rows))
    if len(rows):
        table = TableBuilder()
        table.add(Selection(index, rows))
        source = IndexedSource(shard.name, FORMATS[shard.kind], [shard], table.finish({}))
        result.bad.extend(_bad_samples(source, builder, index if only_images else None))
    return result


def _unusable(shard: Shard, index: ShardIndex, rows: np.ndarray) -> Iterator[Bad]:
    """The samples that are not among ``rows``."""
    left = np.ones(len(index), bool)
    left[rows] = False
    separator = FORMATS[shard.kind].key_separator
    for row in map(int, np.flatnonzero(left)):
        key, detail = index.keys[row], index.detail[row] if len(index.detail) else ""
        own = index.record_id[row] if len(index.record_id) else ""
        reason = index.reasons[int(index.columns["reason"][row]) - 1]
        yield Bad(f"{shard.name}{separator}{key}", reason, detail, _line(separator, key), own)


def _line(separator: str, key: str) -> int:
    """A sample's line in files of lines or list elements, whose keys are FILE:LINE; 0 for other files."""
    return int(key) if separator == ":" and key.isdigit() else 0


def _bad_samples(source: IndexedSource, builder: SampleBuilder, only_images: ShardIndex | None) -> Iterator[Bad]:
    """Every sample that cannot be built; with ``only_images``, every image."""
    for i in range(len(source)):
        key, raw = source.key(i), RawSample()
        line = _line(*key.rpartition(":")[1:])
        try:
            if only_images is None:
                raw = source.read(i)
                builder.build(raw)
            else:
                _build_image(source, builder, only_images, i)
        except BadSample as error:
            source.check_unchanged(i)
            yield Bad(key, error.reason, error.detail, line, raw.id)
        except StorageError:
            raise
        except Exception as error:  # a bug in the reading code is reported as such, and the rest is still read
            yield Bad(key, "unexpected_error", f"{type(error).__name__}: {error}"[:500], line, raw.id)


def _build_image(source: IndexedSource, builder: SampleBuilder, index: ShardIndex, row: int) -> None:
    """Checks an image without a caption. Raises BadSample."""
    reason = index.columns["reason"][row]
    if reason and index.reasons[reason - 1] != "no_caption":
        raise BadSample(index.reasons[reason - 1], detail=index.detail[row])
    builder.build(dataclasses.replace(source.read_images(row), caption="an image"))


def check_shards(shards: Sequence[Shard], settings: CheckSettings, workers: int = 1) -> Iterator[ShardCheck]:
    """Results of all shards in order, computed by ``workers`` processes."""
    names = shard_names([shard.source for shard in shards])
    shards = [dataclasses.replace(shard, name=name) for shard, name in zip(shards, names)]
    if workers <= 1 or len(shards) <= 1:
        yield from (check_shard(shard, settings) for shard in shards)
        return
    results = in_processes(check_shard, [(shard, settings) for shard in shards], workers)
    for shard, result in zip(shards, results):
        died = ["unreadable: the reading process died (out of memory?)"]
        yield result or ShardCheck(shard.source, shard.kind, problems=died)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Checks what the command line asks for and writes the report; returns what ``--json`` prints.

    "unread" lists the shards that storage did not deliver. Raises DataError; StorageError if it delivers none at all.
    """
    set_patience(patience(options))
    shards = shards_of(options.shards, options.kind, vars(options))
    settings = CheckSettings(options.tokenizer, options.visual, options.text, options.max_tiles, patience(options))
    table, faults = Table(), Faults()
    with open(options.report, "w", encoding="utf-8", errors="backslashreplace") as report:
        for result in check_shards(shards, settings, options.workers):
            faults.add(result.path, result.fault)
            row = table.row(result.path, result.kind)
            row.shards, row.samples = row.shards + 1, row.samples + result.samples
            for problem in result.problems:
                row.problems += not problem.startswith((IGNORED, NOTED))
                print(problem if problem.startswith(result.path) else f"{result.path}: {problem}")
                report.write(json.dumps({"shard": result.path, "problem": problem}) + "\n")
            for sample in result.bad:
                row.bad[sample.reason] += 1
                row.examples.setdefault(sample.reason, f"{sample.key} ({sample.detail})".removesuffix(" ()"))
                report.write(json.dumps(sample.to_dict(result.path)) + "\n")
    print("\n".join(table.lines()))
    found = table.to_list()
    samples, fine, problems = (sum(row[name] for row in found) for name in ("samples", "fine", "problems"))
    print(f"{len(shards)} shards, {problems} problems: {fine} of {samples} samples are fine")
    bad: Counter[str] = sum((Counter(row["bad"]) for row in found), Counter())
    for reason, count in bad.most_common():
        print(f"  {reason}: {count}")
    print(f"report: {Path(options.report).resolve()}")
    result = {
        "samples": samples,
        "ok": fine,
        "bad": dict(bad.most_common()),
        "report": str(Path(options.report).resolve()),
        "shards": len(shards),
        "problems": problems,
        "folders": found,
    }
    return {**result, "unread": faults.found} if faults.found else result
