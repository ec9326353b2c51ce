"""The serving engine: time to the first token and throughput, the monolithic model against the modular one.

Both models have the same language model, in the same weights, and are served in one process, in turns, at equal images
and text (random weights and pixels; nothing is reused, every request is computed). Images have --tiles tiles and,
beyond one, a thumbnail: 2, 6 and 14 tiles with 256 text tokens are the rows of Mono-InternVL's table of speeds (768,
1,792 and 3,840 image tokens, 120 tokens out). Points, for each of --tiles; --out has a JSON file from the first on:

  first_token    one request at a time, from submit to its first token
  split          its parts: decoding a JPEG, cutting it into tiles, embedding (or encoding) them, reading the prompt
  concurrency_N  N requests at a time: first token, tokens/s, a step, the scheduler's share
  one_by_one     tokens/s of all at once against Generator, one request after another; answers are compared
  transformers   its generate on the exported monolithic model, alone and all in one batch (--transformers)
  finished       a step of as many answers as there are rows, the more requests have finished

Presets (--preset): 2b (bfloat16, about 7 GB), small (for CPUs; the encoder has about the same share of FLOPs), tiny.

With --plan nothing is measured: the programs from pixels to the first token are compiled for chips that need not be
there (v5e:1x1, h100:1x1x1 ...; compilers as for plan.py), the one of generate.py and those that the engine calls, and
bounds of both models compared, operation by operation: FLOPs or bytes at the data sheet's rates.

With --url a running server of OpenAI's protocol is measured, by JPEGs sent to it (its key: OPENAI_API_KEY).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(
        __doc__,
        "examples:\n"
        "  python experiments/benchmarks/serving.py --out=serving --json\n"
        "  python experiments/benchmarks/serving.py --preset=tiny --new_tokens=8 --rounds=2 --concurrency 1 4\n"
        "  JAX_PLATFORMS=cpu python experiments/benchmarks/serving.py --plan v5e:1x1 --json\n"
        "  python experiments/benchmarks/serving.py --url=http://127.0.0.1:8000/v1 --tiles 1 4 --json",
    )
    add = parser.add_argument
    add("--preset", help="see above (default: small on a CPU, else 2b)")
    add("--tiles", type=cli.positive, nargs="+", help="of each image (default: 1 on a CPU, else 2 6 14)")
    add("--text", type=cli.positive, help="text tokens of a prompt (default: 64 on a CPU, else 256)")
    add("--new_tokens", type=cli.positive, default=120, help="of an answer (default %(default)s)")
    add("--concurrency", type=cli.positive, nargs="+", default=[1, 16], help="requests at a time (default 1 16)")
    add("--requests", type=cli.positive, default=4, help="least requests of a point (default %(default)s)")
    add("--prefill_chunk", type=cli.positive, default=512, help="tokens read at once (default %(default)s)")
    add("--rounds", type=cli.positive, default=7, help="timed turns of each model (default %(default)s)")
    add("--programs", default="", metavar="DIR", help="folder for compiled programs (default: none)")
    add("--transformers", metavar="PYTHON", help="interpreter of an environment with torch and transformers")
    add("--seed", type=int, default=0, help="of weights, pixels and tokens (default %(default)s)")
    add("--out", type=Path, metavar="DIR", help="for serving.json (plan.json, over_http.json), written point by point")
    add("--plan", nargs="+", metavar="CHIP", help="compile for these chips instead, and say the bound")
    add("--url", help="measure the server there instead, from outside")
    add("--tile_size", type=cli.positive, default=448, help="of that server's model, in pixels (default %(default)s)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.serving_bench import over_http, planning, run  # after parsing: --help needs none of it

    report = over_http.measure(args) if args.url else planning.plan(args) if args.plan else run.run(args)
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
