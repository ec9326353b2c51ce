"""Runs a sweep: one config with many changes, each trained, measured and compared with the first.

FILE is Python with CONFIG, a config of train.py or evip.py, and sweep(add), which lists the units:

    CONFIG = "experiments/configs/demo.py"

    def sweep(add):
        add("trained", seeds=3)
        add("frozen", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)
        add("without_s1_2", {"stages": ["s0", "s1_1", "s1_3", "s2"]}, seeds=3)

Changes have the keys of --config.KEY; a list under "stages" chooses and orders the stages. mono_jax.runs.sweeping.units
has product() and values() for grids. Stages that units have in common are trained once. Runs that end early go on when
the same command is given again; finished units are left alone.

  expand   check every unit and print them; nothing is trained
  run      train what is missing, as --jobs processes; --unit=NAME or --index=N: one unit, in this process
  slurm    write WORKDIR/sweep.sbatch, an array job; --submit hands it to sbatch
  status   how far each unit is
  gather   results.csv, summary.csv, summary.md and a plot for each metric, with 95 % intervals over the seeds
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/sweep.py expand experiments/sweeps/attention_s1_3.py
  python experiments/sweep.py run experiments/sweeps/attention_s1_3.py --workdir=runs/attention --jobs=2
  python experiments/sweep.py status experiments/sweeps/attention_s1_3.py --workdir=runs/attention
  python experiments/sweep.py gather experiments/sweeps/attention_s1_3.py --workdir=runs/attention --metrics s2/
  python experiments/sweep.py slurm experiments/sweeps/attention_s1_3.py --workdir=/shared/attention --jobs=8 \\
      --sbatch=--gpus-per-node=8 --submit
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("action", choices=("expand", "run", "slurm", "status", "gather"))
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep")
    parser.add_argument("--workdir", type=Path, help="everything goes here (all actions but expand)")
    parser.add_argument("--jobs", type=int, metavar="N", help="units at once (run: default 1; slurm: default all)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--unit", metavar="NAME", help="run: this unit only, in this process")
    one.add_argument("--index", dest="unit", metavar="N", help="run: the unit of this number, as expand prints it")
    parser.add_argument("--metrics", nargs="+", default=[], help="gather: names, or how they begin (default: all)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: an option of sbatch")
    parser.add_argument("--submit", action="store_true", help="slurm: hand it in")
    cli.add_cluster_flags(parser)
    args = parser.parse_args(argv)
    if args.workdir is None and args.action != "expand":
        parser.error("the following arguments are required: --workdir")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}: give 1 or more")
    from mono_jax.runs.sweeping import commands  # after parsing: --help needs none of it
    from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted

    command = [sys.executable, __file__, "run", str(args.file), f"--workdir={args.workdir}"]
    actions = {
        "expand": lambda: commands.expand(args.file),
        "run": lambda: commands.run(args.file, args.workdir, args.jobs or 1, [*command, "--unit"]),
        "unit": lambda: commands.run_one(args.file, args.workdir, args.unit),
        "slurm": lambda: commands.slurm(
            args.file, args.workdir, args.jobs, args.sbatch, args.submit, [*command, "--index"]
        ),
        "status": lambda: commands.status(args.file, args.workdir),
        "gather": lambda: commands.gather(args.file, args.workdir, args.metrics),
    }
    single = args.action == "run" and args.unit is not None
    with cli.joined(args) if single else contextlib.nullcontext(True) as first:
        try:
            result = actions["unit" if single else args.action]()
        except Preempted as stop:
            if first:
                print(stop, file=sys.stderr)
            return PREEMPTED
    if first and args.json:
        cli.json_line(result)
    return int(bool(result.get("failed")))


if __name__ == "__main__":
    cli.run(main)
