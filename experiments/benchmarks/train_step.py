"""Tokens/s of the real training step: static split, both experts on all tokens, and a plain PyTorch form.

All forms of one stage start from the same weights and see the same batch; their first losses are printed
beside the times and must agree. Forms (--forms):

  static      each expert on its own slots (the default of the models)
  dense_both  both experts on all slots, chosen by mask (the papers' naive form), logits on text slots only
  torch       experiments/benchmarks/torch_form.py: naive experts, fused attention, logits everywhere; CPU only

On the CPU the forms take turns, step by step, so that other programs disturb them alike; the median step
counts; cpu_s, the processor seconds of a step, hardly depends on what else runs (but OpenMP, which PyTorch
uses, also counts its waiting). On an accelerator the
forms run one after the other (their states need not fit together), and MFU is printed.

Presets (--preset): cpu_59m (2 rows of 448 visual and 64 text tokens, float32), mono_internvl_2b (the real
model, bfloat16, 4 rows of 3,584 and 512), tiny (a rehearsal in seconds).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/benchmarks/train_step.py --json
  python experiments/benchmarks/train_step.py --preset=mono_internvl_2b --forms static --remat full
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--preset", help="one of those above (default: cpu_59m on a CPU, mono_internvl_2b elsewhere)")
    parser.add_argument("--stages", nargs="+", default=["S1.1", "S2"], help="default: S1.1 S2")
    parser.add_argument("--remat", nargs="+", default=["none", "full"], help="policies, default: none full")
    parser.add_argument("--forms", nargs="+", default=["static", "dense_both", "torch"], help="default: all three")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each form (default 5)")
    for name in ("rows", "visual", "text"):
        parser.add_argument(f"--{name}", type=int, help=f"{name} of the batch instead of the preset's")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batch (default 0)")
    parser.add_argument("--dry_run", action="store_true", help="say what would run, from shapes only")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args(argv)
    from experiments.benchmarks import step_timing  # after parsing: --help needs none of it

    report = step_timing.run(args)
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
