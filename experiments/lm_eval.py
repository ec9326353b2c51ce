"""Runs lm-evaluation-harness (pip install '.[lm-eval]') with models of this project: `lm_eval --model mono_jax`.

All flags are the harness's own; `--model=mono_jax` is the default. --model_args takes pretrained=FOLDER (model folder,
Hugging Face folder or workdir), tokenizer, dtype, max_length, max_gen_toks, add_bos_token. Tasks are those of
the harness, or YAML files in the folder given by --include_path. `python experiments/lm_eval.py --harness_help` prints
the harness's flags.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/lm_eval.py --model_args pretrained=runs/demo/s2 --tasks mmlu,cmmlu,hellaswag --num_fewshot 5
  python experiments/lm_eval.py --model_args pretrained=models/mono_2b,dtype=bfloat16 --batch_size 32 \\
      --tasks my_task --include_path my_tasks --output_path results --log_samples
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES, json=False)
    parser.add_argument("--harness_help", action="store_true", help="print the harness's own flags")
    args, flags = parser.parse_known_args(argv)
    cli.alone("lm_eval.py")

    from mono_jax.evaluation.language import harness

    harness.run(["--help"] if args.harness_help else flags)
    return 0


if __name__ == "__main__":
    cli.run(main)
