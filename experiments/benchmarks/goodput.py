"""Measures the goodput of a run that is repeatedly killed or asked to stop and restarted at once, as by a launcher.

A small model trains for --minutes, with steps of about a second and a checkpoint every 15 seconds. In each of --faults
equal parts of that time it is killed (SIGKILL) or stopped (SIGTERM) in turn, at a random moment; at the end it is
stopped. How the time was spent is read from the run's own files, see python -m mono_jax.runs.goodput --help. The
fewer minutes there are per fault, the larger the share of restarts: a start takes about the same time for any model.

The JSON object: that of python -m mono_jax.runs.goodput, and {"step_s": seconds of a step, "faults": {kind: number},
"elapsed_s": wall time of this process}.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/goodput.py --minutes=75 --json\n"
        "  python experiments/benchmarks/goodput.py --minutes=5 --faults=2 --folder=/tmp/goodput",
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="total length of the run (default 60)")
    parser.add_argument("--faults", type=int, default=10, help="faults during that time (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of their moments (default 0)")
    parser.add_argument("--folder", type=Path, help="for sets and workdir (default: a temporary folder)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.faults_bench import long_run  # after parsing: --help needs none of it

    with tempfile.TemporaryDirectory() as temporary:
        result = long_run.run(args.folder or Path(temporary), args.minutes, args.faults, args.seed)
    if args.json:
        cli.json_line(result)
    return 0


if __name__ == "__main__":
    cli.run(main)
