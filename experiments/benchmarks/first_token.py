"""First-token latency and decoding speed: the monolithic model against the modular one at equal images.

Both have the same language model, in the same weights: the monolithic one gives visual tokens to experts of their
own, the modular one has InternViT-300M in front. Both go through what generate.py calls, from pixels (uint8, cut
into tiles) in the host's memory to the first token there, in turns; medians of the turns count, and what is compiled
is compiled before. Images have --tiles tiles and, beyond one, a thumbnail; 256 visual tokens each.

Points, in this order; --out has a JSON file from the first of them on, and a run that is out of --budget_s leaves out
what is left and says so:

  first_token  a turn of one row: time to its first token, then tokens/s up to the last (streamed, as to a user)
  vision       the way from pixels to visual tokens, alone, on the device
  batch        as first_token, of --rows rows at once
  language     prefill of the language model alone, its visual tokens given, on the device

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
    add("--tiles", type=cli.positive, nargs="+", default=[1, 4, 6, 12], help="of each image (default 1 4 6 12)")
    add("--batch_tiles", type=cli.positive, nargs="+", default=[6], help="of the images of a batch (default 6)")
    add("--rows", type=cli.positive, default=8, help="of a batch (default %(default)s)")
    add("--text", type=cli.positive, default=64, help="text tokens of a prompt (default %(default)s)")
    add("--new_tokens", type=cli.positive, default=65, help="of an answer (default %(default)s)")
    add("--rounds", type=cli.positive, default=12, help="timed turns of each model (default %(default)s)")
    add("--budget_s", type=float, default=float("inf"), help="begin no point after so many seconds (default: none)")
    add("--seed", type=int, default=0, help="of weights, pixels and tokens (default %(default)s)")
    add("--dry_run", action="store_true", help="say what would run and its FLOPs, from shapes only")
    add("--out", type=Path, help="folder for first_token.json, which is written after every point")
    args = parser.parse_args(argv)
    from experiments.benchmarks.first_token_bench.run import run  # after parsing: --help needs none of it

    report = run(args)
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
