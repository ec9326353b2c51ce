"""Converts models between Hugging Face folders and this project's model folders (Orbax), bit for bit.

  hf      config.json and model.safetensors, or shards with model.safetensors.index.json
  gguf    one llama.cpp file of a Llama model: dequantised to float32, with its tokenizer (needs the gguf package)
  orbax   model.json, params/ (an Orbax checkpoint), and the files that came with the model (tokenizer, config.json)

Weights are streamed layer by layer, so models far larger than memory can be converted. DST appears only once it is
complete. The language model may be InternLM2, Llama, Mistral, Qwen2 (2.5), Qwen3 or Gemma 3 (text); config.json says
which. The project's own layout ships with its PyTorch code: see docs/serving.md.

--embed_experts turns a dense model into a Mono-InternVL model (upcycling): each layer's visual FFN starts as a copy of
its text FFN, the patch embedding and projector start at random (--seed), and the vocabulary grows by the chat and image
tokens that the tokenizer lacks; their rows start as the mean of all rows. --attention_experts adds visual QKV (1.5).
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

a name table (--names=FILE) is JSON; {n} is replaced by the layer:
  {"layers/visual_attention/wqkv/kernel": "language_model.model.layers.{n}.attention.wqkv_visual.weight"}"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    add, forms = parser.add_argument, ("hf", "orbax")
    add("src", metavar="SRC", help="model to read: a folder, URL or .gguf file; a run's workdir works too")
    add("dst", metavar="DST", help="folder or URL to write; it must not exist or must be empty")
    add("--from", dest="source_kind", choices=(*forms, "gguf"), help="format of SRC (default: detected)")
    add("--to", dest="target_kind", choices=forms, help="format of DST (default: the other one; same if changed)")
    add("--layout", choices=("auto", "published", "own"), default="auto", help="of hf; auto: published or else own")
    add("--names", dest="names_file", metavar="FILE", type=Path, help="JSON table of differing tensor names")
    add("--shard_size", type=cli.byte_size, default="5GB", help="largest exported file, e.g. 500MB (5GB)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="cast all weights (default: none, bit for bit)")
    add("--image_token_id", type=int, help="id of <IMG_CONTEXT> (default: from the tokenizer files)")
    add("--grow_vocabulary", type=int, metavar="N", help="grow to N rows; new rows start as the mean of the old")
    add("--embed_experts", action="store_true", help="turn a dense model into a Mono-InternVL model")
    add("--attention_experts", action="store_true", help="with --embed_experts: also add visual QKV (1.5)")
    add("--seed", type=int, default=0, help="seed of the new patch embedding and projector (0)")
    for key in ("hidden_size", "patch_size", "image_size", "downsample_ratio", "ps_version"):
        default = getattr(VisionConfig(), key)
        add(f"--vision.{key}", type=type(default), help=f"for the new patch embedding ({default})")
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
