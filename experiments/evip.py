"""Runs the stages of EViP one after another and writes a report.

Each stage of the config is trained (as experiments/train.py does for a single stage), the loss on held-out
text is measured before and after, and the model describes held-out images. Finished stages are skipped, and only
asked again if the config now asks otherwise (heldout_questions, heldout_batches, answer_tokens, gallery); an
interrupted run (SIGTERM or Ctrl-C: exit code 75) resumes where it stopped. The base language model comes from
stage S0 or from config.init; visual experts are embedded in it before the first stage with images.

    WORKDIR/data/        sets that the config asks for              STAGE/       one run, STAGE/summary.json
            mono/        the base with visual experts embedded      base/        frozen parameters of all stages
            report.md, report.html
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mono_jax import cli
from mono_jax.runs import config_file, reference

EXAMPLES = """examples:
  python experiments/evip.py --config=experiments/configs/demo.py --workdir=runs/demo
  python experiments/evip.py --config=experiments/configs/demo.py:smoke --workdir=runs/smoke
  python experiments/evip.py --config=experiments/configs/demo.py --workdir=runs/long --config.stages.s2.steps=2000
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--workdir", required=True, help="output folder, gs:// or s3:// URL; run again with the same one to resume"
    )
    cli.add_cluster_flags(parser)
    args, values = config_file.parse(parser, argv, reference.evip_keys)
    from mono_jax.runs.config import EvipConfig  # after parsing: --help needs none of it
    from mono_jax.runs.evip import run_evip
    from mono_jax.runs.workdir import opened
    from mono_jax.training.callbacks.stopping import PREEMPTED, Preempted, StopAtOnce

    with StopAtOnce(), cli.joined(args) as first:
        try:
            config = EvipConfig.from_dict(values)
            with opened(args.workdir, list(config.stages)) as workdir:
                result = run_evip(config, workdir)
        except Preempted as stop:
            if first:
                print(stop, file=sys.stderr)
            return PREEMPTED
    if first:
        print("report:", *result["reports"])
    if first and args.json:
        cli.json_line(result)
    return 0


if __name__ == "__main__":
    cli.run(main)
