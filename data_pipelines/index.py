"""Builds the indices of shards: ``python -m data_pipelines.index SHARDS... --json``.

An index is kept beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that location
is read-only. It is rebuilt when its shard has changed. Shards are indexed in parallel; an interrupted run resumes where
it stopped, since finished indices are kept. Exit code 1: some shards could not be read (storage did not answer, or a
file does not exist); run the command again.

With --runner the same work is done by an Apache Beam pipeline on any engine that Beam supports (options that this
command does not know are passed on to Beam); paths and --index_dir must then be visible to its workers.
`python -m data_pipelines.build --help` says how to install Beam.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from data_pipelines import cli
from data_pipelines.jobs.arguments import add_shard_arguments

_EXAMPLES = """examples:
  python -m data_pipelines.index 'laion/*.tar' --workers=16 --json
  python -m data_pipelines.index 's3://laion/*.tar' --index_dir=s3://mine/indices --runner=FlinkRunner
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments (default: the command line) and indexes the shards; returns the exit code."""
    parser = cli.parser("index", __doc__, _EXAMPLES)
    add_shard_arguments(parser)
    parser.add_argument(
        "--index_dir", help="folder of the indices (default: beside the shards, or else the cache folder)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of processes (default: one per core)"
    )
    parser.add_argument("--force", action="store_true", help="rebuild indices even if they are up to date")
    parser.add_argument("--runner", help="Apache Beam engine, such as DirectRunner or FlinkRunner (default: none)")
    options, beam_arguments = parser.parse_known_args(arguments)
    if beam_arguments and not options.runner:
        parser.error(f"unrecognized arguments: {' '.join(beam_arguments)}")

    from data_pipelines.jobs import indexing

    result = indexing.run(options, beam_arguments)
    if options.json:
        cli.json_line(result)
    return cli.STORAGE_ERROR if "unread" in result else 0


if __name__ == "__main__":
    cli.run(main)
