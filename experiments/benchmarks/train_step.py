"""Tokens/s of the real training step: static split, both experts on all tokens, and a plain PyTorch form.

All forms of one stage start from the same weights and see the same batch; their first losses are printed
next to the times and must agree. Forms (--forms):

  static      each expert on its own slots (the default of the models)
  grouped     the grouped kernels of pallas_kernels (slots in multiples of 128)
  dense_both  both experts on all slots, selected by mask (the papers' naive form), logits on text slots only
  torch       step/torch_form.py: naive experts, fused attention, logits everywhere; CPU only

On the CPU, the forms take turns, step by step, so that other programs affect them equally; the median step is
reported, and the ratios are medians over the turns. cpu_s, the CPU seconds of a step, hardly depends on other
programs (but OpenMP, which PyTorch uses, also counts its waiting: on a busy machine, compare on one core with
OMP_NUM_THREADS=1 taskset -c 1 python ...). On an accelerator, the forms run one after the other (their states
need not fit in memory together), and MFU is printed.

Presets (--preset): cpu_59m (2 rows of 448 visual and 64 text tokens, float32), mono_internvl_2b (the real
model, bfloat16, 4 rows of 3,584 and 512), tiny (a rehearsal in seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/train_step.py --json\n"
        "  GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python experiments/benchmarks/train_step.py --remat none "
        "--forms static torch --steps 15\n"
        "  python experiments/benchmarks/train_step.py --preset=mono_internvl_2b --forms static --remat full",
    )
    parser.add_argument("--preset", help="see above (default: cpu_59m on a CPU, else mono_internvl_2b)")
    parser.add_argument("--stages", nargs="+", default=["S1.1", "S2"], help="default: S1.1 S2")
    parser.add_argument("--remat", nargs="+", default=["none", "full"], help="policies, default: none full")
    parser.add_argument("--forms", nargs="+", default=["static", "dense_both", "torch"], help="default: all three")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per form (default 5)")
    for name in ("rows", "visual", "text"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} of the batch instead of the preset's")
    parser.add_argument("--samples", type=int, help="samples that share a row (presets: 1; S1.1 has 7 to 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batch (default 0)")
    parser.add_argument("--dry_run", action="store_true", help="print what would run, from shapes only")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    from experiments.benchmarks.step.run import run  # after parsing: --help needs none of it

    report = run(args)
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
