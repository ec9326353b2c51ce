"""Checks runs of several processes on this machine, with a tiny model on simulated devices, against a single process.

"meshes"   for each mesh and number of processes, the largest differences of losses and weights from a single process
"agreed"   milliseconds that the agreement of a step takes: to start it, and to read that of two steps earlier, in a
           loop that does nothing else; "gathered_ms": to wait for one at each step instead, as an all-gather does
"lost"     seconds from the loss of a process (killed, or stopped silently) to the end of the others
"resume"   a run that is stopped and resumed with other numbers of processes, against one that never stopped
"goodput"  the goodput of that run, as python -m mono_jax.runs.goodput measures it

Devices are simulated on CPUs: equality carries over to other hardware, speed does not. On CPUs, two concurrent programs
would share a connection, so each agreement waits for its step; accelerators run programs in turn.
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument("--folder", type=Path, help="for sets and workdirs (default: a temporary folder)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the JSON to this file")
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
