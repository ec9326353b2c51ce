"""Reads every sample of shards, folders of images or JSONL through the code that training uses, and names what is bad.

Images are decoded, turned upright and cut into tiles; captions are cleaned; conversations are put through the chat
template. In a folder without any captions the images alone are judged. Nothing is written but the report: one JSON
object a line for each bad sample ("key", "reason", "detail") and each shard that is damaged as a whole ("shard",
"problem").
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import cli as command
from data_pipelines.config import DataConfig, SourceConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import ShardSpec, add_shard_arguments, format_module, in_processes, make_index, shards_of
from data_pipelines.records.text_record import Form
from data_pipelines.sources.indexed import IndexedSource, RawSample, Selection, Shard, Table
from data_pipelines.sources.shard_index import ShardIndex
from data_pipelines.sources.source import shard_names
from data_pipelines.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START

_UNBOUNDED = 1 << 30
_TOKENS = {IMAGE_START: 256, IMAGE_END: 257, IMAGE_CONTEXT: 258}


class _Bytes:
    """Stands in for a tokenizer where none is given: every byte is a token. It refuses nothing that others take."""

    added = _TOKENS
    bos = eos = None
    digest = "bytes"

    def id(self, token: str) -> int:
        return self.added[token]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@dataclasses.dataclass
class ShardCheck:
    """What was found in one shard: ``bad`` holds (key, reason, detail)."""

    path: str
    samples: int = 0
    bad: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


@functools.cache
def _builder(tokenizer: str | None, visual: int, text: int, max_tiles: int) -> SampleBuilder:
    source = SourceConfig("check", {"kind": "tar"})
    config = DataConfig((source,), tokenizer or "bytes", visual_tokens=visual, text_tokens=text, max_tiles=max_tiles)
    return SampleBuilder(config, None if tokenizer else _Bytes())


def check_shard(spec: ShardSpec, name: str, settings: tuple[str | None, int, int, int]) -> ShardCheck:
    """Reads every sample of a shard; whatever goes wrong is part of the result, whose bad and good ones add up.

    Args:
      name: of the shard in keys.
      settings: tokenizer (None = bytes), capacities of a row (visual, text), max_tiles.

    Raises DataError if the tokenizer cannot be had.
    """
    builder = _builder(*settings)
    result = ShardCheck(spec.path)
    try:
        index = make_index(spec)
    except DataError as error:
        result.problems.append(str(error))
        return result
    result.samples, result.problems = len(index), list(index.problems)
    alone = _without_captions(spec, index)
    rows = np.arange(len(index)) if alone else index.usable
    result.bad = [(f"{name}/{key}", reason, "") for key, reason in _unusable(index, rows)]
    if len(rows):
        shard = Shard(spec.path, name, dict(spec.options))
        source = format_module(spec.kind).Source(name, [shard], Table.build([Selection(index, rows)]), "", {})
        result.bad.extend(_bad_samples(source, builder, index if alone else None))
    return result


def _without_captions(spec: ShardSpec, index: ShardIndex) -> bool:
    """Whether this is a folder of nothing but images."""
    return spec.kind == "files" and not np.any(index.columns["text_form"] != Form.NONE)


def _unusable(index: ShardIndex, rows: np.ndarray) -> Iterator[tuple[str, str]]:
    """(key, reason) of the samples that are not among ``rows``."""
    left = np.ones(len(index), bool)
    left[rows] = False
    for row in np.flatnonzero(left):
        yield index.keys[int(row)], index.reasons[int(index.columns["reason"][row]) - 1]


def _bad_samples(
    source: IndexedSource, builder: SampleBuilder, alone: ShardIndex | None
) -> Iterator[tuple[str, str, str]]:
    """(key, reason, detail) of every sample that cannot be built; with ``alone``, of every image."""
    for i in range(len(source)):
        try:
            if alone is None:
                builder.build(source.read(i))
            else:
                _build_image(source, builder, alone, i)
        except BadSample as error:
            yield source.key(i), error.reason, error.detail
        except Exception as error:  # a fault of the reading code is told as such, and the rest is still looked at
            yield source.key(i), "unexpected_error", f"{type(error).__name__}: {error}"[:500]


def _build_image(source: IndexedSource, builder: SampleBuilder, index: ShardIndex, row: int) -> None:
    """Judges an image without a caption. Raises BadSample."""
    reason = index.columns["reason"][row]
    if reason and index.reasons[reason - 1] != "no_caption":
        raise BadSample(index.reasons[reason - 1])
    builder.build(RawSample(source.key(row), source.read_images(row), caption="an image"))


def check_shards(
    specs: Sequence[ShardSpec], settings: tuple[str | None, int, int, int], workers: int = 1
) -> Iterator[ShardCheck]:
    """Results of all shards in order, made by ``workers`` processes."""
    names = shard_names([spec.path for spec in specs])
    if workers <= 1 or len(specs) <= 1:
        yield from (check_shard(spec, name, settings) for spec, name in zip(specs, names))
        return
    results = in_processes(check_shard, [(spec, name, settings) for spec, name in zip(specs, names)], workers)
    for spec, result in zip(specs, results):
        yield result or ShardCheck(spec.path, problems=["unreadable: the reading process died (out of memory?)"])


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Checks what the command line names and writes the report; returns what ``--json`` prints. Raises DataError."""
    specs = shards_of(options.shards, options.kind, vars(options))
    settings = (options.tokenizer, options.visual, options.text, options.max_tiles)
    samples, bad, problems = 0, Counter(), 0
    with open(options.report, "w", encoding="utf-8", errors="backslashreplace") as report:
        for result in check_shards(specs, settings, options.workers):
            samples += result.samples
            for problem in result.problems:
                problems += 1
                print(f"{result.path}: {problem}")
                report.write(json.dumps({"shard": result.path, "problem": problem}) + "\n")
            for key, reason, detail in result.bad:
                bad[reason] += 1
                report.write(json.dumps({"key": key, "reason": reason, "detail": detail}) + "\n")
    lost = sum(bad.values())
    print(f"{len(specs)} shards, {problems} problems: {samples - lost} of {samples} samples are fine")
    for reason, count in bad.most_common():
        print(f"  {reason}: {count}")
    return {
        "samples": samples,
        "ok": samples - lost,
        "bad": dict(bad),
        "report": str(Path(options.report).resolve()),
        "shards": len(specs),
        "problems": problems,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(
        "check", __doc__, "example: python -m data_pipelines.check laion/00000.tar photos/ chat.jsonl"
    )
    add_shard_arguments(parser)
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer (default: every byte counts as a token)")
    parser.add_argument("--visual", type=int, default=_UNBOUNDED, help="visual slots of a row (default: no limit)")
    parser.add_argument("--text", type=int, default=_UNBOUNDED, help="text slots of a row (default: no limit)")
    parser.add_argument("--max_tiles", type=int, default=6, help="tiles of an image")
    parser.add_argument("--report", default="check-report.jsonl", help="where the bad samples are listed")
    parser.add_argument("--workers", type=int, default=1, help="processes, each taking up to 2 GB (default: 1)")
    options = parser.parse_args(arguments)
    result = check(options)
    if options.json:
        command.json_line(result)


if __name__ == "__main__":
    command.run(main)
