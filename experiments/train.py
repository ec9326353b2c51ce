"""Trains one stage of Mono-InternVL; run it again with the same workdir to resume.

The config is a Python file with get_config() -> ml_collections.ConfigDict; its keys are those of
mono_jax/runs/config.py (RunConfig): stage, data, model or init, steps or epochs, optim, mesh, dtype, ...
Stages: S0 (text only), S1.1, S1.2, S1.3, S2, their EViP++ forms (S1.1++ ...), and the ablations delta,
full, S1.3-frozen-attention.
SIGTERM or Ctrl-C saves a checkpoint and exits with code 75; the same command then resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mono_jax import cli
from mono_jax.runs import config_file, reference

EXAMPLES = """examples:
  python experiments/train.py --config=experiments/configs/demo.py:smoke --workdir=runs/s0
  python experiments/train.py --config=experiments/configs/demo.py:smoke --stage=s1_1 --workdir=runs/s1_1 \\
      --config.init=runs/s0/model
  python experiments/train.py --config=my_config.py --workdir=runs/a --config.optim.learning_rate=1e-4
  python experiments/train.py --config=my_config.py --compile_for=v5e:16x16    # does it fit, how fast at best
  python experiments/train.py --config=my_config.py --workdir=runs/b --config.mesh.fsdp=8 --config.steps=2000
  srun python experiments/train.py --config=my_config.py --workdir=runs/c        # in a SLURM job: all of its tasks
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--workdir", help="folder, gs:// or s3:// URL for checkpoints, metrics and the trained model")
    parser.add_argument("--compile_for", metavar="TARGET", help="print plan.py's plan for it instead, e.g. v5e:4x4")
    parser.add_argument("--stage", metavar="NAME", help="which stage of a config with several (default: the first)")
    cli.add_cluster_flags(parser)
    args, values = config_file.parse(parser, argv, reference.stage_keys)
    if args.compile_for:
        from mono_jax.runs import plan

        result = plan.show(values, args.compile_for, stage=args.stage)
        if args.json:
            cli.json_line(result)
        return 0
    if not args.workdir:
        parser.error("the following arguments are required: --workdir")
    from mono_jax.runs.evip import single_stage  # after parsing: --help needs none of it
    from mono_jax.runs.stage import run_stage
    from mono_jax.runs.workdir import opened
    from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted, StopAtOnce

    with StopAtOnce(), cli.joined(args) as first:
        try:
            with opened(args.workdir) as workdir:
                result = run_stage(single_stage(values, workdir, args.stage), workdir)
        except Preempted as stop:
            if first:
                print(stop, file=sys.stderr)
            return PREEMPTED
    if first:
        print(f"done: step {result['step']}, loss {result['loss']}, model in {result['model']}")
    if first and args.json:
        cli.json_line(result)
    return 0


if __name__ == "__main__":
    cli.run(main)
