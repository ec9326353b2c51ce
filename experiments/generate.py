"""Answers a prompt about images, once or turn by turn.

MODEL is a Hugging Face folder, a model folder made by convert.py or train.py, or the workdir of a stage.
The same code that makes training samples cuts images into tiles and puts questions into the chat template.
Its settings come from model.json, which the training run wrote, else from the model's config.json, else from the
defaults; sampling settings come from its generation_config.json. Flags take precedence over all of them.

An answer ends at the tokenizer's or generation_config.json's end token, <|im_end|>, <|im_start|>, or the length limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mono_jax import cli
from mono_jax.generation.options import NO_TEMPLATE, Sampling
from mono_jax.weights.prompt_format import PromptFormat

EXAMPLES = """examples:
  python experiments/generate.py --model=Mono-InternVL-2B --image=cat.jpg --prompt="What is on the mat?"
  python experiments/generate.py --model=runs/demo/s2 --image=a.png --prompt="What is this?"
  python experiments/generate.py --model=M --image=a.png --image=b.png --prompt="<image> and <image>: what differs?"
  python experiments/generate.py --model=M --prompt="Tell a story." --temperature=0.8 --top_p=0.95 --seed=3
  python experiments/generate.py --model=M --interactive      # then: questions, /image FILE, /quit
  python experiments/generate.py --model=internlm2-1_8b --template=none --prompt="Once upon a time"
"""


def build_parser() -> Any:
    parser = cli.parser(__doc__, EXAMPLES)
    add, own = parser.add_argument, "the model's own, else"
    add("--model", required=True, metavar="DIR", help="folder or URL: a Hugging Face model, model folder or workdir")
    add("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    add("--prompt", metavar="TEXT", help="the question; <image> marks the place of an image (default: in front)")
    add("--interactive", action="store_true", help="continue with questions from standard input")
    add("--max_new_tokens", type=int, help=f"maximum tokens per answer ({own} {Sampling.max_new_tokens})")
    add("--temperature", type=float, help=f"0 = always the likeliest token ({own} {Sampling.temperature})")
    add("--top_k", type=int, help=f"sample from the k likeliest tokens, 0 = all ({own} {Sampling.top_k})")
    add("--top_p", type=float, help=f"sample from the likeliest that add up to p ({own} {Sampling.top_p})")
    add("--seed", type=int, default=Sampling.seed, help="sampling seed (%(default)s)")
    add("--max_tiles", type=int, help=f"maximum tiles, shared by all images ({own} {PromptFormat.max_tiles})")
    add("--template", help=f"chat template (the model's own); {NO_TEMPLATE} = continue the prompt as it is")
    add("--system_message", help='the system turn (the template\'s own); "" = none')
    add("--tokenizer", metavar="PATH", help="folder or file (default: in the model's folder)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16; on a CPU, float32")
    cli.add_cluster_flags(parser)
    add("--max_length", type=int, default=32768, help="maximum tokens of the conversation (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.prompt is None and not args.interactive:
        parser.error("give a --prompt, or --interactive")
    from mono_jax.generation.chat import talk  # after parsing: --help needs none of it

    with cli.joined(args) as first:
        result = talk(args)
    if first and args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
