"""Indexing many shards with several processes or with an Apache Beam pipeline, and what was found in them.

An interrupted run resumes where it stopped, since finished indices are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError, StorageError
from data_pipelines.io import paths
from data_pipelines.io.processes import in_processes
from data_pipelines.io.storage import Patience, set_patience
from data_pipelines.jobs.arguments import Faults, patience
from data_pipelines.jobs.pipelines import run_pipeline
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

    def counts(self) -> dict[str, Any]:
        """What is summed over shards, in JSON types."""
        fault = self.fault
        return {
            "samples": self.samples,
            "usable": self.usable,
            "indexed": int(self.made),
            "skipped": dict(self.skipped),
            "problems": {self.path: list(self.problems)} if self.problems else {},
            "unread": {self.path: fault.detail if fault.path == self.path else str(fault)} if fault else {},
        }


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
    """Reports of all shards in order, computed by ``workers`` processes."""
    if workers <= 1 or len(shards) <= 1:
        yield from (report_shard(shard, index_dir, force, patience) for shard in shards)
        return
    reports = in_processes(report_shard, [(shard, index_dir, force, patience) for shard in shards], workers)
    for shard, report in zip(shards, reports):
        yield report or ShardReport(shard.source, problems=["unreadable: the indexing process died (out of memory?)"])


def run(options: argparse.Namespace, beam_arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Indexes what the command line asks for and prints a summary; returns what ``--json`` prints.

    "unread" lists the shards that storage did not deliver. Raises DataError; StorageError if it delivers none at all.
    """
    start, wait = time.monotonic(), patience(options)
    set_patience(wait)
    shards = shards_of(options.shards, options.kind, vars(options))
    if options.runner:
        found = _by_beam(shards, options, [f"--runner={options.runner}", *beam_arguments], wait)
    else:
        found = _by_processes(shards, options, wait)
    seconds, usable = round(time.monotonic() - start, 3), f"{found['usable']} of {found['samples']} samples usable"
    print(f"{len(shards)} shards ({found['indexed']} indexed now): {usable}, {seconds} s")
    for reason, count in Counter(found["skipped"]).most_common():
        print(f"  {reason}: {count}")
    unread = found.pop("unread")
    summary = {"shards": len(shards), **found, "seconds": seconds}
    return {**summary, "unread": unread} if unread else summary


def _by_processes(shards: Sequence[Shard], options: argparse.Namespace, wait: Patience) -> dict[str, Any]:
    """What is found in all shards, by local processes. Raises StorageError if storage is unavailable."""
    faults, found = Faults(), []
    for report in index_shards(shards, options.workers, options.index_dir, options.force, wait):
        faults.add(report.path, report.fault)
        for problem in report.problems:
            print(f"{report.path}: {problem}")
        found.append(report.counts())
    return add_reports(found)


def _by_beam(
    shards: Sequence[Shard], options: argparse.Namespace, arguments: Sequence[str], wait: Patience
) -> dict[str, Any]:
    """The same by a Beam pipeline; existing up-to-date indices are left unchanged."""
    if not options.index_dir:
        raise DataError("--runner needs --index_dir: a folder or URL that all workers write to, named in the spec too")
    work = functools.partial(_counts_of, index_dir=options.index_dir, force=options.force, patience=wait)
    found = run_pipeline(shards, work, add_reports, paths.join(options.index_dir, "index_stats.json"), arguments)
    for path, problems in found["problems"].items():
        print("\n".join(f"{path}: {problem}" for problem in problems))
    for path, fault in found["unread"].items():
        print(f"{path}: could not be read: {fault}")
    if len(found["unread"]) == len(shards):
        raise StorageError(*next(iter(found["unread"].items())))
    return found


def _counts_of(shard: Shard, index_dir: str, force: bool, patience: Patience) -> dict[str, Any]:
    return report_shard(shard, index_dir, force, patience).counts()


def add_reports(reports: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of ``ShardReport.counts``."""
    total = ShardReport("").counts()
    for report in reports:
        for name, value in report.items():
            if not isinstance(value, Mapping):
                total[name] += value
            elif name == "skipped":
                total[name] = dict(Counter(total[name]) + Counter(value))
            else:
                total[name] |= value
    return total
