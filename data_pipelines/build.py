"""Filters, checks, tokenises and rewrites shards of any kind as ArrayRecord files, with an Apache Beam pipeline.

Training does not need this: it reads shards in place. Use it if you want one copy that holds only the samples in use,
in files designed for random access. Every image is decoded once, so no bad sample is written. The output is read with
{"kind": "array_record", "paths": "OUT/*.array_record"}. The same code runs on every engine that Beam supports (options
that this command does not know are passed on to Beam, such as --runner=FlinkRunner); paths must then be visible to the
workers. An interrupted run resumes where it stopped.

Beam needs old versions of other packages, so install it in a separate environment:
  python -m venv .venv-build && .venv-build/bin/pip install -r data_pipelines/requirements-build.txt
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from data_pipelines import cli
from data_pipelines.jobs.arguments import add_shard_arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments (default: the command line) and runs the pipeline."""
    example = "example: python -m data_pipelines.build 'laion/*.tar' --output=records --direct_num_workers=8"
    parser = cli.parser("build", __doc__, example)
    add_shard_arguments(parser)
    parser.add_argument("--output", required=True, help="folder or URL of the output files")
    parser.add_argument("--samples_per_file", type=int, default=10_000)
    parser.add_argument(
        "--captions", help="parquet or JSONL files of key -> caption that replace the samples' own captions"
    )
    parser.add_argument("--scores", help="parquet or JSONL files of key -> numbers that filters may use")
    filters_help = 'JSON, such as {"min_size": 64, "max_punsafe": 0.5}'
    parser.add_argument("--filters", type=json.loads, default={}, help=filters_help)
    parser.add_argument("--tokenizer", help="folder or file of a tokenizer: also store token ids")
    options, beam_arguments = parser.parse_known_args(arguments)

    from data_pipelines.jobs import building

    result = building.run(options, beam_arguments)
    if options.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
