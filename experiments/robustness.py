"""How a model bears pictures and prompts that get worse and worse, and files that are hardly pictures.

Each question is asked again and again with its picture blurred, darkened, turned, covered, written over and so on, in
levels, with text in between, after the question, or among other pictures: a curve of right answers for each, with 95 %
intervals. Then a list of damaged and unusual files, each of which must be answered or refused by name.

FILE has LLaVA records with one picture each; the last turn is the right answer. OUT gets sets/ (the questions as files
that evaluate.py asks as well), answers/, robustness.json and robustness.html. Run again, it goes on where it was.
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
    add("--model", required=True, metavar="DIR", help="folder or URL: of Hugging Face, a model folder, or a workdir")
    add("--questions", required=True, metavar="FILE", help="LLaVA records (JSONL)")
    add("--images", default=".", metavar="DIR", help="what their image paths are relative to (default: here)")
    add("--out", required=True, metavar="DIR", help="folder of sets, answers and report")
    add(
        "--changes",
        nargs="+",
        metavar="NAME",
        help="only these, such as blurred, covered, other_pictures (default: all)",
    )
    add("--limit", type=cli.positive, default=100, metavar="N", help="the first so many questions (%(default)s)")
    add("--batch_size", type=cli.positive, default=16, help="questions answered at once (%(default)s)")
    add("--max_new_tokens", type=cli.positive, default=32, help="longest answer (%(default)s)")
    cli.add_prompt_flags(parser)
    args = parser.parse_args(argv)
    cli.alone("robustness.py")
    from mono_jax.runs.robustness.run import run  # after parsing: --help needs none of it

    result = run(args)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
