"""Converts models between Hugging Face folders and this project's model folders (Orbax), bit for bit.

  hf      config.json and model.safetensors, or shards with model.safetensors.index.json
  gguf    one file of llama.cpp with a Llama in it: dequantised to float32, with its tokenizer (needs package gguf)
  orbax   model.json, params/ (an Orbax checkpoint), and what came with the model (tokenizer, config.json)

Weights are streamed layer by layer, so a model far larger than memory converts. DST appears when it is whole. The
language model may be InternLM2, Llama, Mistral, Qwen2 (2.5), Qwen3 or Gemma 3 (text): config.json says which.
The layout of our own brings its PyTorch code along: docs/serving.md.

--embed_experts makes a Mono-InternVL model of a dense one (upcycling): every layer's visual FFN starts as a copy of
its text FFN, patch embedding and projector start at random (--seed), and the vocabulary grows by the chat and image
tokens that the tokenizer lacks, whose rows start as the mean of all. With --attention_experts (1.5) visual QKV too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mono_jax import cli
from mono_jax.models.architecture import VisionConfig

EXAMPLES = """examples:
  python experiments/convert.py --from=hf --to=orbax Mono-InternVL-2B models/mono
  python experiments/convert.py --from=orbax --to=hf models/mono exported
  python experiments/convert.py --embed_experts --from=gguf --vision.patch_size=7 SmolLM2-135M-Instruct.gguf models/smol

a name table (--names=FILE) is JSON, {n} stands for the layer:
  {"layers/visual_attention/wqkv/kernel": "language_model.model.layers.{n}.attention.wqkv_visual.weight"}"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add, forms = parser.add_argument, ("hf", "orbax")
    add("src", metavar="SRC", help="the model to read, a folder, URL or .gguf file; a run's workdir will do")
    add("dst", metavar="DST", help="the folder or URL to write; must not exist, or be empty")
    add("--from", dest="source_kind", choices=(*forms, "gguf"), help="what SRC is (default: seen from its files)")
    add("--to", dest="target_kind", choices=forms, help="what DST becomes (default: the other; a changed model: same)")
    add("--layout", choices=("auto", "published", "own"), default="auto", help="of hf; auto: published, or else own")
    add("--names", dest="names_file", metavar="FILE", type=Path, help="JSON table of tensor names other than ours")
    add("--shard_size", type=cli.byte_size, default="5GB", help="largest exported file, e.g. 500MB (5GB)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="cast all weights (default: none, bit for bit)")
    add("--image_token_id", type=int, help="id of <IMG_CONTEXT> (default: from the tokenizer files)")
    add("--grow_vocabulary", type=int, metavar="N", help="more rows, N in all; the new ones are the mean of the old")
    add("--embed_experts", action="store_true", help="make a Mono-InternVL model of a dense one")
    add("--attention_experts", action="store_true", help="with --embed_experts: visual QKV too (1.5)")
    add("--seed", type=int, default=0, help="of the new patch embedding and projector (0)")
    for key in ("hidden_size", "patch_size", "image_size", "downsample_ratio", "ps_version"):
        default = getattr(VisionConfig(), key)
        add(f"--vision.{key}", type=type(default), help=f"of the new patch embedding ({default})")
    args = parser.parse_args(argv)
    if args.attention_experts and not args.embed_experts:
        parser.error("--attention_experts needs --embed_experts")
    cli.alone("convert.py")
    from mono_jax.hf_export.asked import convert_as_asked
    from mono_jax.weights.convert import summary

    report = convert_as_asked(vars(args))
    cli.json_line(report) if args.json else print(summary(report))


if __name__ == "__main__":
    cli.run(main)
