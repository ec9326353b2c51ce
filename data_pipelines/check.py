"""Reads every sample of shards, image folders or JSONL files through the training code and lists the bad samples.

Images are decoded, rotated upright and cut into tiles; captions are cleaned; conversations are rendered with the chat
template. In a folder without any captions only the images are checked. The only output is the report, with one JSON
object per line for each bad sample ("key", "reason", "detail", "path" and, where available, "line" and the record's
own "id") and for each shard that is damaged as a whole ("shard", "problem"). Exit code 1: some shards could not be read
(storage did not answer), which says nothing about their samples; with --strict also: some samples or shards are bad.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines import cli
from data_pipelines.jobs.arguments import add_shard_arguments

_UNBOUNDED = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments (default: the command line) and checks the shards; returns the exit code."""
    parser = cli.parser("check", __doc__, "example: python -m data_pipelines.check laion/00000.tar photos/ chat.jsonl")
    add_shard_arguments(parser)
    parser.add_argument("--tokenizer", help="folder or file of the tokenizer (default: every byte counts as a token)")
    parser.add_argument("--visual", type=int, default=_UNBOUNDED, help="visual slots per row (default: no limit)")
    parser.add_argument("--text", type=int, default=_UNBOUNDED, help="text slots per row (default: no limit)")
    parser.add_argument("--max_tiles", type=int, default=6, help="maximum number of tiles per image (default: 6)")
    parser.add_argument("--report", default="check-report.jsonl", help="file that lists the bad samples")
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes, each using up to 2 GB (default: 1)"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 if anything is bad")
    options = parser.parse_args(arguments)

    from data_pipelines.jobs import checking

    result = checking.run(options)
    if options.json:
        cli.json_line(result)
    faulty = options.strict and (result["bad"] or result["problems"])
    return cli.STORAGE_ERROR if "unread" in result or faulty else 0


if __name__ == "__main__":
    cli.run(main)
