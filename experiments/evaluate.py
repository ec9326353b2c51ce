"""Scores models on benchmarks, with 95 % intervals and paired differences.

Data are files in the benchmarks' own layouts below --data (docs/evaluation.md lists them), or TASK=FILE. Tasks may have
a * (mmbench*) or be groups (zero_shot); "questions=FILE" asks one's own LLaVA records. Answers are greedy.

OUT gets predictions.jsonl of each model and task as the answers come (run again to continue), scores.json, report.html
and, where a test set's answers are hidden, the file to be sent in. Several processes share the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/evaluate.py --model=Mono-InternVL-2B --tasks=mme,mmbench_dev_en --data=benchmarks --out=results
  python experiments/evaluate.py --model runs/demo/s1_3 runs/demo/s2 --tasks=questions=my.jsonl --out=results
  python experiments/evaluate.py --model=M --tasks=zero_shot,refcoco_all --data=benchmarks --out=results --limit=200
  python experiments/evaluate.py --model=M --tasks=mmvet --data=D --out=O --judge=http://localhost:8000/v1 \\
      --judge_model=judge
"""


def build_parser() -> Any:
    parser = cli.parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--model",
        required=True,
        nargs="+",
        action="extend",
        metavar="DIR",
        help="models: folders as generate.py takes them",
    )
    add("--tasks", required=True, metavar="NAME[=FILE],...", help="what they are asked")
    add("--data", default=".", metavar="DIR", help="folder of the benchmarks' files (%(default)s)")
    add("--out", required=True, metavar="DIR", help="folder of answers, scores and report")
    add("--batch_size", type=cli.positive, default=16, help="examples answered at once (%(default)s)")
    add("--limit", type=cli.positive, help="the first so many examples of each task (all)")
    add("--max_new_tokens", type=cli.positive, help="longest answer (the task's own)")
    cli.add_prompt_flags(parser)
    add("--judge", metavar="COMMAND|URL", help="who grades mathvista and mmvet: a program, or an OpenAI-compatible URL")
    add("--judge_model", metavar="NAME", help="model behind the URL; its key is read from JUDGE_API_KEY")
    cli.add_cluster_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    from mono_jax.evaluation.benchmarks.running import evaluate  # after parsing: --help needs none of it

    with cli.joined(args) as first:
        result = evaluate(args)
    if first and args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
