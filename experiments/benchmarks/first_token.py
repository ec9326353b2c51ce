"""First-token latency and decoding speed of the monolithic model against the modular one on equal images.

Both have the same language model with the same weights: the monolithic model routes visual tokens to separate experts,
the modular one has InternViT-300M in front. Both run the code that generate.py calls, from pixels (uint8, cut into
tiles) in host memory to the first token in host memory, in turns; medians over the turns are reported, and everything
is compiled beforehand. Images have --tiles tiles and, beyond one tile, a thumbnail; 256 visual tokens each.

Points, in this order; --out has a JSON file from the first point on, and a run that exceeds --budget_s leaves out the
remaining points and reports that:

  first_token  a turn of one row: time to its first token, then tokens/s up to the last (streamed, as to a user)
  vision       only the path from pixels to visual tokens, on the device
  batch        as first_token, for --rows rows at once
  language     only the prefill of the language model, given its visual tokens, on the device

Presets (--preset): 2b (Mono-InternVL-2B and InternVL-1.5-2B, random weights, bfloat16: about 7 GB), tiny.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/first_token.py --out=first_token --budget_s=150\n"
        "  python experiments/benchmarks/first_token.py --out=/tmp/rehearsal --preset=tiny --rounds=2   # on a CPU\n"
        "  python experiments/benchmarks/first_token.py --preset=2b --dry_run",
    )
    add = parser.add_argument
    add("--preset", help="see above (default: tiny on a CPU, else 2b)")
    add("--tiles", type=cli.positive, nargs="+", default=[1, 4, 6, 12], help="tiles per image (default 1 4 6 12)")
    add("--batch_tiles", type=cli.positive, nargs="+", default=[6], help="tiles per image of a batch (default 6)")
    add("--rows", type=cli.positive, default=8, help="rows of a batch (default %(default)s)")
    add("--text", type=cli.positive, default=64, help="text tokens per prompt (default %(default)s)")
    add("--new_tokens", type=cli.positive, default=65, help="tokens per answer (default %(default)s)")
    add("--rounds", type=cli.positive, default=12, help="timed turns per model (default %(default)s)")
    add("--budget_s", type=float, default=float("inf"), help="start no point after this many seconds (default: none)")
    add("--seed", type=int, default=0, help="seed of weights, pixels and tokens (default %(default)s)")
    add("--dry_run", action="store_true", help="print what would run and its FLOPs, from shapes only")
    add("--out", type=Path, help="folder for first_token.json, which is written after each point")
    args = parser.parse_args(argv)
    from experiments.benchmarks.first_token_bench.run import run  # after parsing: --help needs none of it

    report = run(args)
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
