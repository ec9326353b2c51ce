"""Memory and time of a plan of many samples: opening, token counts, rows of an epoch, and a step in its middle.

Shards are links to one tar and one index, so that the number of samples costs no disk space; the table of all samples,
the file of token counts (synthetic, like S1.1's) and the plan are those of a run, written and read by the same code.
Each part runs in its own process and reports its CPU time and peak memory, both in total and without the pages of
mapped files, which the system can reclaim.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/benchmarks/plan_size.py --samples=92200000 --folder=/scratch --json
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples in the set (default 1,000,000)")
    parser.add_argument("--folder", help="for the files, about 110 bytes per sample (default: a temporary folder)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.plan_parts import PARTS, PER_SHARD, apart

    if args.samples < PER_SHARD:
        cli.fail(f"--samples must be at least {PER_SHARD}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result: dict[str, Any] = {"samples": args.samples // PER_SHARD * PER_SHARD, "parts": {}}
        for part in PARTS:
            result["parts"][part.__name__] = found = apart(part, Path(folder), args.samples // PER_SHARD)
            print(f"{part.__name__}: " + ", ".join(f"{name} {value:,.4g}" for name, value in found.items()), flush=True)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
