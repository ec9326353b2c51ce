"""Compiles a run's own step for hardware that need not be present: does it fit, what limits it, how many days at best.

No data is opened and no device is used; --config is a config of train.py or evip.py. Targets: v5e:4x4, v5e:16x16,
v5p:4x4x4, v6e:16x16, tpu7x:2x2x1 (need libtpu), h200:1x8x1, h100:1x32x8 (need jax[cuda13]), cpu:8.

Times are lower bounds, operation by operation: FLOPs at the data sheet's peak or bytes at the memory bandwidth,
whichever is slower, plus the collectives that computation does not hide. A real step takes longer. A step that does not
fit or compile is reported as a result: "fits": false, with the reason. --search ranks hundreds of candidates in seconds
by arithmetic on shapes and compiles the best ones; the result is the best of those, and the ranking is under "search".
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli
from mono_jax.runs import config_file, reference

EXAMPLES = """examples:
  python experiments/plan.py --config=experiments/configs/mono_internvl.py:S1.1,v5e-16 --target=v5e:4x4 --json
  python experiments/plan.py --config=my_config.py --target=h200:1x8x1 --config.mesh.fsdp=8
  python experiments/plan.py --config=my_config.py --target=v5e:16x16 --search --compile=3
  python experiments/plan.py --config=experiments/configs/mono_internvl.py --table --compile_rows=S1.1@v5e-256
  python experiments/plan.py --config=experiments/configs/demo.py:smoke --stage=s1_1 --target=cpu:8
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--target", metavar="KIND:SHAPE", help="what to compile for, e.g. v5e:16x16")
    parser.add_argument("--stage", metavar="NAME", help="which stage of a config with several (default: the first)")
    full = "samples per row, for the cost of attention (default: as many images with the most tiles as fit)"
    parser.add_argument("--samples_per_row", type=float, metavar="N", help=full)
    parser.add_argument("--search", action="store_true", help="rank meshes, microbatches, remat and row lengths first")
    parser.add_argument("--compile", type=int, default=2, metavar="N", help="with --search: compile the N best (2)")
    rows = (
        "all stages on pods by arithmetic, as in docs/scaling.md; needs --config=FILE without a stage and no --target"
    )
    parser.add_argument("--table", action="store_true", help=rows)
    parser.add_argument(
        "--compile_rows", default="", metavar="STAGE@POD,...", help="with --table: also compile these rows"
    )
    args, values = config_file.parse(parser, argv, reference.stage_keys)
    cli.alone("plan.py")
    from mono_jax.runs import plan  # after parsing: --help needs none of it

    if args.table:
        return plan.print_table(args.config.partition(":")[0], [row for row in args.compile_rows.split(",") if row])
    if not args.target:
        parser.error("the following arguments are required: --target (or --table)")
    options = {"stage": args.stage, "samples_per_row": args.samples_per_row}
    options["compile_best"] = max(args.compile, 0) if args.search else None
    result = plan.show(values, args.target, **options)
    if args.json:
        cli.json_line(result)
    return 0


if __name__ == "__main__":
    cli.run(main)
