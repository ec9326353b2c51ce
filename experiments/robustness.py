"""Measures how a model copes with images and prompts that get worse and worse, and with files that are hardly images.

Each question is asked many times: with its image blurred, darkened, rotated, covered, written over and so on, in
levels; with text between image and question; with the image after the question; or among other images. Each change
gives a curve of right answers with 95 % intervals. A list of damaged and unusual files follows, each of which must be
answered or refused by name.

FILE has LLaVA records with one image each; the last turn is the right answer. OUT gets sets/ (the questions as files
that evaluate.py can ask, too), answers/, robustness.json and robustness.html. Run again to resume.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/robustness.py --model=runs/demo/s2 --questions=runs/demo/data/heldout/questions.jsonl \\
      --images=runs/demo/data/heldout/images --out=runs/robustness --limit=80
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or URL: a Hugging Face model, model folder or workdir")
    add("--questions", required=True, metavar="FILE", help="LLaVA records (JSONL)")
    add("--images", default=".", metavar="DIR", help="what image paths are relative to (default: current folder)")
    add("--out", required=True, metavar="DIR", help="folder for sets, answers and report")
    add(
        "--changes",
        nargs="+",
        metavar="NAME",
        help="only these changes, such as blurred, covered, other_pictures (default: all)",
    )
    add("--limit", type=cli.positive, default=100, metavar="N", help="use the first N questions (%(default)s)")
    add("--batch_size", type=cli.positive, default=16, help="questions answered at once (%(default)s)")
    add("--max_new_tokens", type=cli.positive, default=32, help="maximum tokens per answer (%(default)s)")
    cli.add_prompt_flags(parser)
    args = parser.parse_args(argv)
    cli.alone("robustness.py")
    from mono_jax.runs.robustness.run import run  # after parsing: --help needs none of it

    result = run(args)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
