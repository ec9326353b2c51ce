"""Runs of several processes on this machine, a tiny model on simulated devices: are they what one process makes?

"meshes"   for each mesh and number of processes the largest differences from one process, of losses and of weights
"agreed"   milliseconds that the agreement of a step takes: to start it, and to read that of two steps before, in a loop
           that does nothing else; "gathered_ms": to wait for one at each step instead, as an all-gather does
"lost"     seconds from the loss of a process (killed, or stopped without a word) to the end of the others
"resume"   a run that is stopped and resumed by other numbers of processes, against one that never stopped
"goodput"  of that run: python -m mono_jax.runs.goodput

Simulated devices on CPUs: what is equal here is equal elsewhere, what is fast here is not. On CPUs two programs at
once would share a connection, so that each agreement waits for its step; accelerators run programs in turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli

PARTS = ("meshes", "agreed", "lost", "resume")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/cluster.py --json\n"
        "  python experiments/benchmarks/cluster.py --processes 2 --parts agreed lost --folder=/tmp/cluster",
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="numbers of processes (2 4)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of those above (default: all)")
    parser.add_argument("--folder", type=Path, help="sets and workdirs go here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args(argv)
    from experiments.benchmarks.cluster_bench.measure import measure  # after parsing: --help needs none of it

    result = measure(args.parts, args.processes, args.folder)
    for part, values in result.items():
        print(f"{part}: {values}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
