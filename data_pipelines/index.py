"""Makes the indices of shards: ``python -m data_pipelines.index SHARDS... --json``.

An index is kept beside its shard (``00000.tar.index.npz``), or in the cache folder ($MONO_JAX_CACHE) if that place is
read-only. It is made again when its shard has changed. Shards are indexed in parallel; an interrupted run resumes where
it stopped, since finished indices are kept. Exit code 1: some shards could not be read (storage did not answer, a file
is not there); run it again.

With --runner the same is done by an Apache Beam pipeline on any engine that Beam supports (options that this command
does not know go to Beam); paths and --index_dir must then be ones that its workers see. Beam is installed as
`python -m data_pipelines.build --help` says.
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
    """Parses the arguments (default: those of the command line) and indexes the shards; returns the exit code."""
    parser = cli.parser("index", __doc__, _EXAMPLES)
    add_shard_arguments(parser)
    parser.add_argument("--index_dir", help="folder of the indices (default: beside the shards, else the cache folder)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="make indices again even if they are fresh")
    parser.add_argument("--runner", help="engine of Apache Beam, such as DirectRunner or FlinkRunner (default: none)")
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
