"""Rounds of faults on a real training run: after each, the run must end as if nothing had happened.

Each round trains a tiny model on small sets in its own workdir, injects one fault at a random moment, runs the same
command until it finishes, and compares metrics.jsonl and the weights with those of an undisturbed run: bit for bit on
the same number of devices, within 1e-5 where the number changes.

  kill, kill_commit, kill_cache,    SIGKILL at any moment, while a checkpoint is committed, while index and plan are
  kill_write, kill_resume           made, while the base or the result is written, and again during the resumption
  kill_parent, kill_worker          ... of only the trainer, whose data workers must end, too; of a data worker
  term_start, term_compile, term,   SIGTERM before, during and after compilation, and twice
  term_twice, interrupt             Ctrl-C, once or twice
  second, devices                   a second trainer on the same workdir; resumption on 8, 2, 8 simulated devices
  disk_small, disk_moment,          a real disk that the run fills, that is full for a moment,
  disk_long                         or until the run ends
  storage_renamed, storage_cut,     the data is missing, truncated,
  storage_overwritten               or overwritten, and then restored
  damage_cache, damage_checkpoint,  a file is truncated, has a flipped bit, is emptied, replaced by noise, or removed
  damage_small, damage_metrics, damage_model

"identical" also requires that there is no traceback and that exit codes are as expected. "struck" counts the rounds in
which the fault hit at the intended moment. Disks need a mount namespace (unshare); without one, their rounds are left
out and listed under "skipped".

With --folder, the rounds are kept in FOLDER/rounds.jsonl, and the same command continues with the next round.

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
    parser.add_argument("--rounds", type=int, default=25, help="total rounds; the faults take turns (default 25)")
    parser.add_argument("--faults", nargs="+", help="faults to inject, see above (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and damages (default 0)")
    parser.add_argument("--folder", type=Path, help="for sets and workdirs (default: a temporary folder)")
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
