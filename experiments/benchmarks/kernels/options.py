"""The options of the kernel benchmark (no jax: --help is instant)."""

from __future__ import annotations

import argparse
from pathlib import Path

from mono_jax import cli


def make_parser(doc: str | None = None) -> argparse.ArgumentParser:
    parser = cli.parser(doc)
    parser.add_argument("--out", type=Path, help="folder for the results; a run resumes from its contents")
    parser.add_argument("--dry_run", action="store_true", help="tiny sizes, interpreted kernels: does the script run?")
    ops = ["ffn", "qkv", "attention"]
    parser.add_argument("--ops", nargs="+", default=ops, choices=ops, help="default: all")
    parser.add_argument("--shapes", nargs="+", default=["2b", "7b"], choices=["2b", "7b"], help="default: both")
    parser.add_argument("--rows", nargs="*", default=[], metavar="NAME", help="only these rows (plus the bound)")
    per_block = "rows per block of the grouped forms (default: 128; 512 suits a TPU)"
    parser.add_argument("--tile", type=int, default=128, help=per_block)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--budget_s", type=float, default=1e9, help="start no new point after this many seconds")
    parser.add_argument("--stall_s", type=float, default=240, help="give up a point after this many seconds (240)")
    parser.add_argument("--no_tune", action="store_true", help="use the existing tuning tables")
    parser.add_argument("--retry_failed", action="store_true", help="retry failed points of an earlier run")
    parser.add_argument("--report", action="store_true", help="only write tables and plots of the results in --out")
    parser.add_argument("--readme", action="store_true", help="write the README's table from results/ and stop")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser
