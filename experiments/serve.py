"""Serves a model to OpenAI clients, and to people through a web page at /.

MODEL is what generate.py takes. Concurrent requests are answered together, each as generate.py would answer it by
itself. /v1/chat/completions takes text and images (data: URIs; http URLs with --image_urls), streamed or in one piece;
/v1/completions continues text, with echo and logprobs. Also /v1/models, /health, /metrics (Prometheus), /openapi.json.

SIGTERM and Ctrl-C stop it: new requests are refused, running ones get --drain_s seconds. docs/serving.md shows clients.
Needs pip install '.[serve]'.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from data_pipelines.io.paths import cache_dir
from mono_jax import cli
from mono_jax.serving.api.settings import ApiConfig
from mono_jax.serving.contract import EngineConfig

EXAMPLES = """examples:
  python experiments/serve.py --model=Mono-InternVL-2B      # then open http://127.0.0.1:8000
  python experiments/serve.py --model=runs/demo/s2 --port=9000 --max_rows=4 --max_slots=8192 --max_length=2048
  MONO_JAX_API_KEY=secret python experiments/serve.py --model=M --host=0.0.0.0
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "Tell a story."}], "stream": true}'
"""


def build_parser() -> Any:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or URL: a Hugging Face model, model folder or workdir")
    add("--name", help="name by which clients request the model (the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = all of this machine (%(default)s)")
    add("--port", type=int, default=8000, help="port to listen on; 0 = any free one, which is printed (%(default)s)")
    add(
        "--api_key", action="append", help="a key that clients must send; may be repeated (MONO_JAX_API_KEY, else none)"
    )
    cli.add_format_flags(parser)
    cli.add_config_flags(parser.add_argument_group("engine"), EngineConfig)
    parser.set_defaults(programs=str(cache_dir() / "serving"))  # the first start compiles for minutes
    cli.add_config_flags(parser.add_argument_group("clients"), ApiConfig)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    cli.alone("serve.py")
    from mono_jax.serving.start import serve  # after parsing: --help needs none of it

    result, hangs = serve(args)
    if args.json:
        cli.json_line(result)
    if hangs:  # a thread hangs in a library, and Python would wait for it
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    cli.run(main)
