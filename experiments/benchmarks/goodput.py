"""The goodput of a run that is killed or asked to stop again and again, and started again at once, as a launcher does.

A small model trains for --minutes, with steps of a second or so and a checkpoint every 15 seconds. In each of --faults
equal parts of that time it is killed (SIGKILL) or stopped (SIGTERM) in turn, at a random moment; at the end it is
stopped. How the time was spent is read from the run's own files, see python -m mono_jax.runs.goodput --help. The
fewer minutes there are for each fault, the more of them restarts take: a start is about as long on any model.

The JSON object: that of python -m mono_jax.runs.goodput, and {"step_s": seconds of a step, "faults": {kind: number},
"elapsed_s": by the clock of this process}.
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
    parser.add_argument("--minutes", type=float, default=60.0, help="of the run in all (default 60)")
    parser.add_argument("--faults", type=int, default=10, help="during that time (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of their moments (default 0)")
    parser.add_argument("--folder", type=Path, help="sets and workdir go here (default: a temporary folder)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.faults_bench import long_run  # after parsing: --help needs none of it

    with tempfile.TemporaryDirectory() as temporary:
        result = long_run.run(args.folder or Path(temporary), args.minutes, args.faults, args.seed)
    if args.json:
        cli.json_line(result)
    return 0


if __name__ == "__main__":
    cli.run(main)
