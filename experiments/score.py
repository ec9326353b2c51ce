"""Scores every sample of a config's data with a model, for filters that select easy or hard samples.

OUT/SOURCE.jsonl gets one line per sample: its key; loss, in nats per trained token; tokens, the number of trained
tokens; and, if the model has vision, sight: by how many nats per token the loss grows when noise replaces the images,
that is, how much of the text they reveal. A model without vision, such as a base language model, reads only the text.

In the source's spec, "scores": "OUT/SOURCE.jsonl" enables the filters min_loss, max_loss and so on (docs/data.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli
from mono_jax.runs import config_file

EXAMPLES = """examples:
  python experiments/score.py --config=my.py --model=models/mono_base --out=scores
  python experiments/score.py --config=experiments/configs/demo.py:smoke --stage=s1_2 --cache_dir=runs/smoke \\
      --model=runs/smoke/s0 --out=runs/smoke/scores
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or URL: a Hugging Face model, model folder or workdir")
    add("--out", required=True, metavar="DIR", help="folder for the scores")
    add("--stage", metavar="NAME", help="which stage of a config with several (default: the first)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16; on a CPU, float32")
    cache_help = "folder for sets, token counts and plans (default $MONO_JAX_CACHE or ~/.cache/mono_jax)"
    add("--cache_dir", metavar="DIR", help=cache_help)
    args, values = config_file.parse(parser, argv)
    cli.alone("score.py")
    from data_pipelines.io import paths
    from mono_jax.runs import inspection, scoring
    from mono_jax.runs.console import say_now

    data, _ = inspection.data_of(values, args.cache_dir, args.stage)
    cache = Path(args.cache_dir) if args.cache_dir else paths.cache_dir()
    result = scoring.score(args.model, data, Path(args.out), cache, say_now, args.dtype)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
