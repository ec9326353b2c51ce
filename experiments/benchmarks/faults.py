"""Rounds of faults on a real training run: after each, the run must end as if nothing had happened.

Every round trains a tiny model on small sets in a workdir of its own, does one thing to it at a random moment, runs
the same command until it is done, and compares metrics.jsonl and the weights with those of a run that nothing
disturbed: bit for bit on the same number of devices, within 1e-5 where it changes.

  kill          SIGKILL at any moment
  kill_commit   ... while a checkpoint is committed
  kill_cache    ... while indices are made
  kill_parent   ... of the trainer only: its data workers must end too
  kill_worker   ... of a data worker
  term          SIGTERM at any moment, compilation included
  term_twice    SIGTERM, and again
  damage        SIGKILL, then a random file is cut, flipped or emptied
  devices       SIGTERM, then on 8, 2, 8 simulated devices

The JSON object: {"rounds", "identical", "lost_steps_max", "lost_records", "hangs", "by_fault": {fault: {"rounds",
"identical", "failures"}}}.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/faults.py --rounds=20 --json\n"
        "  python experiments/benchmarks/faults.py --rounds=50 --faults kill kill_commit --folder=/tmp/faults",
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds in all, the faults in turn (default 9)")
    parser.add_argument("--faults", nargs="+", help="of those above (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and damages (default 0)")
    parser.add_argument("--folder", type=Path, help="sets and workdirs go here (default: a temporary folder)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.faults_bench.rounds import run  # after parsing: --help needs none of it

    result = run(args.rounds, args.faults, args.seed, args.folder)
    if args.json:
        cli.json_line(result)
    return int(result["identical"] != result["rounds"])


if __name__ == "__main__":
    cli.run(main)
