"""The serving engine: time to the first token and throughput of the monolithic model against the modular one.

Both models have the same language model with the same weights and are served in one process, in turns, on equal images
and text (random weights and pixels; nothing is reused, every request is computed). Images have --tiles tiles and,
beyond one tile, a thumbnail: 2, 6 and 14 tiles with 256 text tokens are the rows of Mono-InternVL's speed table (768,
1,792 and 3,840 image tokens, 120 output tokens). Points, for each of --tiles; --out has a JSON file from the first on:

  first_token    one request at a time, from submission to its first token
  split          its parts: decoding a JPEG, cutting it into tiles, embedding (or encoding) them, prefill
  concurrency_N  N requests at a time: first token, tokens/s, step time, also in bare steps, scheduler's CPU share
  one_by_one     tokens/s of all at once against Generator, one request after another; answers are compared
  transformers   generate of transformers on the exported monolithic model, one request and a batch (--transformers)
  finished       step time with as many answers as there are rows, over the number of finished requests

Presets (--preset): 2b (bfloat16, about 7 GB), small (for CPUs; the encoder has about the same share of FLOPs), tiny.

With --plan, nothing is measured: the programs from pixels to the first token, that of generate.py and those that the
engine calls, are compiled for chips that need not be present (v5e:1x1, h100:1x1x1 ...; compilers as for plan.py), and
the bounds of both models are compared, operation by operation: FLOPs or bytes at the data sheet's rates.

With --url, a running server of the OpenAI protocol is measured by sending it JPEGs (its key: OPENAI_API_KEY).
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
    add("--tiles", type=cli.positive, nargs="+", help="tiles per image (default: 1 on a CPU, else 2 6 14)")
    add("--text", type=cli.positive, help="text tokens per prompt (default: 64 on a CPU, else 256)")
    add("--new_tokens", type=cli.positive, default=120, help="tokens per answer (default %(default)s)")
    add("--concurrency", type=cli.positive, nargs="+", default=[1, 16], help="requests at a time (default 1 16)")
    add("--requests", type=cli.positive, default=4, help="minimum requests per point (default %(default)s)")
    add("--prefill_chunk", type=cli.positive, default=512, help="tokens per prefill chunk (default %(default)s)")
    add("--rounds", type=cli.positive, default=7, help="timed turns per model (default %(default)s)")
    add("--programs", default="", metavar="DIR", help="folder for compiled programs (default: none)")
    add("--transformers", metavar="PYTHON", help="Python of an environment with torch and transformers")
    add("--seed", type=int, default=0, help="seed of weights, pixels and tokens (default %(default)s)")
    add("--out", type=Path, metavar="DIR", help="for serving.json (plan.json, over_http.json), written point by point")
    add("--plan", nargs="+", metavar="CHIP", help="compile for these chips instead and report the bounds")
    add("--url", help="measure the server at this URL instead, as a client")
    add("--tile_size", type=cli.positive, default=448, help="tile size of that server's model (default %(default)s)")
    args = parser.parse_args(argv)
    from experiments.benchmarks.serving_bench import over_http, planning, run  # after parsing: --help needs none of it

    report = over_http.measure(args) if args.url else planning.plan(args) if args.plan else run.run(args)
    if args.json:
        cli.json_line(report)


if __name__ == "__main__":
    cli.run(main)
