"""Looks inside a model, layer by layer: attention between images and text, visual experts beside text experts.

Shows how much text attends to images and images to themselves, and over what distance; how far apart the hidden states
of the two modalities are; how far the experts have moved from each other and, with --base, from the base model that
they were copied from; how large their activations are, which units are never active, and which are used most, by kind
and by size of image.

FILE has LLaVA records, one per line, each with an "image" and a "conversations" that ends with the right answer; "kind"
groups them, or KIND if several files are given. The model reads question and answer; it generates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/inspect_model.py --model=runs/demo/s2 --base=runs/demo/mono \\
      --questions=runs/demo/data/heldout/questions.jsonl --images=runs/demo/data/heldout/images --html=inside.html
  python experiments/inspect_model.py --model=Mono-InternVL-2B --questions chart=charts.jsonl photo=photos.jsonl \\
      --images charts photos --sizes 224 448 896 --limit=8 --json
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or URL: a Hugging Face model, model folder or workdir")
    add("--questions", required=True, nargs="+", metavar="[KIND=]FILE", help="LLaVA records (JSONL)")
    add(
        "--images",
        nargs="+",
        default=["."],
        metavar="DIR",
        help="what image paths are relative to (default: current folder): one for all files, or one per file",
    )
    add("--base", metavar="DIR", help="the model before any training with images, e.g. WORKDIR/mono")
    add("--limit", type=cli.positive, default=16, metavar="N", help="questions per kind (default %(default)s)")
    add(
        "--sizes",
        nargs="+",
        type=cli.positive,
        default=(),
        metavar="PIXELS",
        help="resize each image so that its shorter edge has these sizes (default: unchanged)",
    )
    add("--max_tiles", type=cli.positive, metavar="N", help="maximum tiles per image (the model's own)")
    add("--html", metavar="FILE", help="write a page with pictures")
    args = parser.parse_args(argv)
    cli.alone("inspect_model.py")
    from mono_jax.runs.insight.run import run  # after parsing: --help needs none of it

    result = run(args)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
