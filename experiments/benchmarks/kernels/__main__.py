"""Correctness, tuning and timing of the modality-grouped kernels and of packed attention, in one command.

  python -m experiments.benchmarks.kernels --out=runs/kernels --dry_run        rehearsal on the CPU, minutes, no figures
  python -m experiments.benchmarks.kernels --out=runs/kernels --budget_s=540   on a GPU or TPU; run it again to resume
  python -m experiments.benchmarks.kernels --out=runs/kernels --report         tables and plots of existing results
  python -m experiments.benchmarks.kernels --readme                            the README's table from committed results

Operations: ffn (SwiGLU of each token's expert) and qkv (the projection of the visual attention experts), at the sizes
of the 2B and the 7B model. Rows of the table; each time is also given as a ratio to that of the dense bound:

  dense                one expert over all tokens: the bound (if one expert is trained, only its tokens' share of the
                       weight gradients is counted)
  xla_split            static boundary, two dense products, as in training
  NAME                 modality_ffn, modality_matmul on rows grouped once per batch: mosaic_gpu, triton, pallas_tpu
  NAME permuted        the same with the permutation in every layer (gathered on load where NAME can)
  NAME unsorted        as in the Mono-InternVL-1.5 paper: rows stay in place, mixed blocks are computed twice
  ragged_dot, tokamax  grouped matmuls of jax and tokamax on stacked weights, rows grouped
  dense_both           both experts on all tokens, selected by mask
  gather_scatter       rows of each expert gathered, computed and scattered back in every layer, as serving engines do

The third operation is attention over one packed row of 1,024 to 131,072 slots, with as many samples as in S1.1 and with
one sample, by each implementation that runs here (--rows attention/NAME), in TFLOP/s of the unmasked scores. Its
break-even points name the fastest implementation at each length.

The most informative points come first, and each is written to kernels.json in --out as soon as it is measured. A second
run with the same --out resumes where the first one stopped. The work is done in a separate process: a point that raises
is recorded as failed; if the process dies, or makes no progress for --stall_s, its current point is lost and another
process takes over; a row that died is not tried again at other sizes.

Also written: kernels.md (tables, aims, break-even points), plots, and tuning tables. To publish, copy kernels.json to
experiments/benchmarks/results/ under a new name, ROOM_DEVICE.json to pallas_kernels/tuning/ROOM/DEVICE.json, and run
--readme.
"""

from __future__ import annotations

import sys

from experiments.benchmarks.kernels.options import make_parser
from mono_jax import cli


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = make_parser(__doc__).parse_args(arguments)

    from experiments.benchmarks.kernels.run import run

    return run(options, arguments)


if __name__ == "__main__":
    cli.run(main)
