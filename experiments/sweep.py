"""Runs a sweep: one config with many changes, each trained, measured and compared with the first.

FILE is Python: CONFIG names a config of train.py or evip.py, sweep(add) lists the units; see docs/sweeps.md:

    CONFIG = "experiments/configs/demo.py"

    def sweep(add):
        add("trained", seeds=3)
        add("frozen", {"stages.s1_3.stage": "S1.3-frozen-attention"}, seeds=3)

Stages that units have in common are trained once. The same command resumes a sweep; finished work is kept.
Several files form one queue, whose sweeps share their stages; each gets a folder of its name in --workdir.

  expand   check every unit and print them; nothing is trained
  run      train what is missing in --jobs processes; with --unit=NAME or --index=N, one unit in this process
  slurm    write WORKDIR/sweep.sbatch, an array job; --submit passes it to sbatch
  status   the progress of each unit
  gather   write results.csv, summary.csv, summary.md and a plot for each metric, with 95 % intervals over the seeds
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/sweep.py expand experiments/sweeps/tuning.py --config=experiments/configs/demo.py:smoke
  python experiments/sweep.py run experiments/sweeps/attention_s1_3.py --workdir=runs/attention --jobs=2
  python experiments/sweep.py run experiments/sweeps/tuning.py experiments/sweeps/stages.py --workdir=runs --jobs=16
  python experiments/sweep.py gather experiments/sweeps/attention_s1_3.py --workdir=runs/attention --metrics s2/
  python experiments/sweep.py slurm experiments/sweeps/stages.py --workdir=/shared/stages --sbatch=--gpus-per-node=8
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("action", choices=("expand", "run", "slurm", "status", "gather"))
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the sweep, or several")
    parser.add_argument("--workdir", type=Path, help="output folder (all actions but expand)")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="run, slurm: for stages that several sweeps share")
    parser.add_argument("--config", metavar="FILE[:ARG]", help="replaces the sweep's, e.g. by a small one for a trial")
    parser.add_argument("--jobs", type=cli.positive, metavar="N", help="units to run at once (run: 1; slurm: all)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--unit", metavar="NAME", help="run: this unit only, in this process")
    one.add_argument("--index", dest="unit", metavar="N", help="run: the unit with this number in expand's list")
    parser.add_argument("--metrics", nargs="+", default=[], help="gather: names or prefixes (default: all)")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: an option for sbatch")
    parser.add_argument("--submit", action="store_true", help="slurm: submit the job")
    cli.add_cluster_flags(parser)
    args = parser.parse_args(argv)
    if args.workdir is None and args.action != "expand":
        parser.error("the following arguments are required: --workdir")
    if args.unit is not None and len(args.files) > 1:
        parser.error("--unit and --index need exactly one sweep: give one FILE")
    from mono_jax.runs.sweeping import commands  # after parsing: --help needs none of it

    code, result = commands.act(args, __file__)
    if args.json and result is not None:
        cli.json_line(result)
    return code


if __name__ == "__main__":
    cli.run(main)
