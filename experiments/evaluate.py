"""Scores models on benchmarks, with 95 % intervals and paired differences.

Data files are in the benchmarks' own layouts below --data (docs/evaluation.md lists them), or given as TASK=FILE. Task
names may contain a * (mmbench*) or name a group (zero_shot); "questions=FILE" asks your own LLaVA records. Decoding is
greedy.

OUT gets a predictions.jsonl for each model and task, written as the answers arrive (run again to continue),
scores.json, report.html and, for test sets with hidden answers, the file to submit. Several processes share the
examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/evaluate.py --model=Mono-InternVL-2B --tasks=mme,mmbench_dev_en --data=benchmarks --out=results
  python experiments/evaluate.py --model runs/demo/s1_3 runs/demo/s2 --tasks=questions=my.jsonl --out=results
  python experiments/evaluate.py --model=runs/demo/s2 --tasks=questions=my.jsonl --out=results --blind
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
        help="one or more models, in any form that generate.py accepts",
    )
    add("--tasks", required=True, metavar="NAME[=FILE],...", help="tasks to evaluate")
    add("--data", default=".", metavar="DIR", help="folder of the benchmark files (%(default)s)")
    add("--out", required=True, metavar="DIR", help="folder for answers, scores and report")
    add("--batch_size", type=cli.positive, default=16, help="examples answered at once (%(default)s)")
    add("--limit", type=cli.positive, help="only this many examples from the start of each task (all)")
    add("--max_new_tokens", type=cli.positive, help="maximum tokens per answer (the task's own)")
    add("--blind", action="store_true", help="also ask about other examples' pictures: what do answers owe to theirs?")
    cli.add_prompt_flags(parser)
    add("--judge", metavar="COMMAND|URL", help="grades mathvista and mmvet: a program or an OpenAI-compatible URL")
    add("--judge_model", metavar="NAME", help="model to request at the URL; the key is read from JUDGE_API_KEY")
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
