"""Indexing many shards by several processes, and what was found in them.

An interrupted run resumes where it stopped, since finished indices are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io.processes import in_processes
from data_pipelines.io.storage import Patience, set_patience
from data_pipelines.jobs.arguments import Faults, patience
from data_pipelines.sources.finding import shards_of
from data_pipelines.sources.indexing import load_or_make
from data_pipelines.sources.indices.shard import Shard


@dataclasses.dataclass
class ShardReport:
    """What indexing a shard found; ``problems`` concern the shard as a whole."""

    path: str
    samples: int = 0
    usable: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    made: bool = False
    fault: StorageError | None = None


def report_shard(
    shard: Shard, index_dir: str | None = None, force: bool = False, patience: Patience | None = None
) -> ShardReport:
    """Indexes one shard; one that cannot be opened is reported, not raised: its ``fault`` if storage is to blame."""
    if patience is not None:
        set_patience(patience)
    try:
        index, made = load_or_make(shard, index_dir, force)
    except StorageError as error:
        return ShardReport(shard.source, fault=error)
    except DataError as error:
        return ShardReport(shard.source, problems=[f"unreadable: {error}"])
    return ShardReport(shard.source, len(index), len(index.usable), index.dropped(), index.problems, made)


def index_shards(
    shards: Sequence[Shard],
    workers: int = 1,
    index_dir: str | None = None,
    force: bool = False,
    patience: Patience | None = None,
) -> Iterator[ShardReport]:
    """Reports of all shards in order, made by ``workers`` processes."""
    if workers <= 1 or len(shards) <= 1:
        yield from (report_shard(shard, index_dir, force, patience) for shard in shards)
        return
    reports = in_processes(report_shard, [(shard, index_dir, force, patience) for shard in shards], workers)
    for shard, report in zip(shards, reports):
        yield report or ShardReport(shard.source, problems=["unreadable: the indexing process died (out of memory?)"])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Indexes what the command line names and prints a summary; returns what ``--json`` prints.

    "unread" lists the shards that storage did not give. Raises DataError; StorageError if it gives none at all.
    """
    start, faults, wait = time.monotonic(), Faults(), patience(options)
    set_patience(wait)
    shards = shards_of(options.shards, options.kind, vars(options))
    samples, usable, made, skipped, problems = 0, 0, 0, Counter(), {}
    for report in index_shards(shards, options.workers, options.index_dir, options.force, wait):
        faults.add(report.path, report.fault)
        samples, usable, made = samples + report.samples, usable + report.usable, made + report.made
        skipped.update(report.skipped)
        if report.problems:
            problems[report.path] = report.problems
        for problem in report.problems:
            print(f"{report.path}: {problem}")
    seconds = round(time.monotonic() - start, 3)
    print(f"{len(shards)} shards ({made} indexed now): {usable} of {samples} samples usable, {seconds} s")
    for reason, count in skipped.most_common():
        print(f"  {reason}: {count}")
    summary: dict[str, Any] = {"shards": len(shards), "samples": samples, "usable": usable, "skipped": dict(skipped)}
    summary |= {"seconds": seconds, "indexed": made, "problems": problems}
    return {**summary, "unread": faults.found} if faults.found else summary
