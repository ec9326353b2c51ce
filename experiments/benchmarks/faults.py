"""Rounds of faults on a real training run: after each, the run must end as if nothing had happened.

Every round trains a tiny model on small sets in a workdir of its own, does one thing to it at a random moment, runs
the same command until it is done, and compares metrics.jsonl and the weights with those of a run that nothing
disturbed: bit for bit on the same number of devices, within 1e-5 where it changes.

  kill, kill_commit, kill_cache,    SIGKILL at any moment, while a checkpoint is committed, while index and plan are
  kill_write, kill_resume           made, while the base or the result is written, and again while it resumes
  kill_parent, kill_worker          ... of the trainer only: its data workers must end too; of a data worker
  term_start, term_compile, term,   SIGTERM before, during and after compilation, and twice
  term_twice, interrupt             Ctrl-C, and twice
  second, devices                   a second trainer on the workdir; resumed on 8, 2, 8 simulated devices
  disk_small, disk_moment,          a real disk that the run fills, that is full for a moment,
  disk_long                         or until the run ends
  storage_renamed, storage_cut,     the data is away, shorter,
  storage_overwritten               or other, and back
  damage_cache, damage_checkpoint,  a file is cut, flipped, emptied, replaced by noise, or missing
  damage_small, damage_metrics, damage_model

"identical" also asks for no traceback and for the expected exit codes. "struck": rounds in which the fault came at its
moment. Disks need a mount namespace (unshare); without one their rounds are left out, under "skipped".

With --folder the rounds are kept in FOLDER/rounds.jsonl, and the same command goes on with the next.

The JSON object: {"rounds", "identical", "lost_steps_max", "lost_records", "hangs", "by_fault": {fault: {"rounds",
"struck", "identical", "failures"}}, "skipped": {fault: reason}}.
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
    parser.add_argument("--rounds", type=int, default=25, help="rounds in all, the faults in turn (default 25)")
    parser.add_argument("--faults", nargs="+", help="of those above (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and damages (default 0)")
    parser.add_argument("--folder", type=Path, help="sets and workdirs go here (default: a temporary folder)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.faults_bench.disk import isolate  # after parsing: --help needs none of it

    isolate()
    from experiments.benchmarks.faults_bench.rounds import run

    result = run(args.rounds, args.faults, args.seed, args.folder)
    if args.json:
        cli.json_line(result)
    return int(result["identical"] != result["rounds"])


if __name__ == "__main__":
    cli.run(main)
