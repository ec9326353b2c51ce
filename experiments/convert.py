"""Converts models between Hugging Face folders and this project's model folders (Orbax), bit for bit.

  hf      config.json and model.safetensors, or shards with model.safetensors.index.json
  orbax   model.json, params/ (an Orbax checkpoint), and what came with the model (tokenizer, config.json)

Weights are streamed layer by layer, so a model far larger than memory converts. DST appears when it is whole.

--embed_experts makes a Mono-InternVL model of a dense InternLM2 one: every layer's visual FFN starts as a copy
of its text FFN, the patch embedding and projector start at random (--seed), and the vocabulary grows by the
chat and image tokens that the tokenizer lacks; their embedding and output rows start as the mean of all rows.
With --attention_experts (Mono-InternVL-1.5) the visual QKV starts as a copy of the text QKV. No names are
published for the tensors of 1.5: --names changes this project's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.special_tokens import CHAT_TOKENS, IMAGE_CONTEXT, IMAGE_TOKENS
from mono_jax import cli, tree
from mono_jax.checkpoints import checkpoint
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.models.architecture import ModelConfig, VisionConfig
from mono_jax.weights import hf
from mono_jax.weights.upcycle import embed_experts

EXAMPLES = """examples:
  python experiments/convert.py --from=hf --to=orbax Mono-InternVL-2B models/mono
  python experiments/convert.py --from=orbax --to=hf models/mono exported
  python experiments/convert.py --embed_experts --to=orbax internlm2-1_8b models/mono_start
  python experiments/convert.py --embed_experts --vision.patch_size=7 --to=hf internlm2-1_8b mono_14px

a name table (--names=FILE) is JSON, {n} stands for the layer:
  {"layers/visual_attention/wqkv/kernel": "language_model.model.layers.{n}.attention.wqkv_visual.weight"}"""

# In the order of the public release (arXiv 2410.08202 adds the nine image tokens to InternLM2).
INTERNLM2_VOCABULARY = 92544
VISION_KEYS = {"hidden_size": int, "patch_size": int, "image_size": int, "downsample_ratio": float, "ps_version": str}


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command line asks for; returns what ``--json`` prints. Raises MonoJaxError."""
    source, target = Path(args.src), Path(args.dst)
    names = hf.read_json(Path(args.names)) if args.names else {}
    kind = _kind(source, args.source)
    target_kind = args.target or (kind if args.embed_experts else {"hf": "orbax", "orbax": "hf"}[kind])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty: choose another DST or remove it")
    config, params, names = checkpoint.open_model(source, image_token_id=args.image_token_id, names=names)
    original = hf.read_json(source / "config.json") if (source / "config.json").is_file() else None
    report: dict[str, Any] = {"from": kind, "to": target_kind, "src": str(source), "dst": str(target)}
    added_tokens = None
    if args.embed_experts:
        config, params, added_tokens, rows = _embed(source, config, params, args)
        report["vocabulary_rows_added"] = rows
    flat = tree.flatten(params)
    if unused := [path for path in names if path not in flat]:
        raise ConfigError(f"{args.names}: no such parameter in this model: {', '.join(unused)}")
    if args.dtype:
        params = tree.unflatten({path: leaf.astype(jnp.dtype(args.dtype)) for path, leaf in flat.items()})
        original = original and original | {"torch_dtype": args.dtype}
    report |= {"model": _describe(config), **_sizes(params)}
    started = time.perf_counter()
    _write(target, target_kind, source, config, params, original, names, args.shard_size, added_tokens)
    return report | {"seconds": round(time.perf_counter() - started, 2)}


def _kind(source: Path, given: str | None) -> str:
    if not source.is_dir():
        raise WeightsError(f"{source}: no such folder")
    found = "orbax" if (source / checkpoint.MODEL_FILE).is_file() else "hf"
    if given == "orbax" and found == "hf":
        raise WeightsError(f"{source}: no {checkpoint.MODEL_FILE} in it: not a model folder; use --from=hf?")
    if given == "hf" and found == "orbax":
        raise WeightsError(f"{source}: has a {checkpoint.MODEL_FILE}: a model folder; use --from=orbax")
    return found


def _describe(config: ModelConfig) -> str:
    """What the model is. No size: the published labels (2B) belong to the published checkpoints alone."""
    if config.vision is None:
        return "InternLM2"
    if not config.is_monolithic:
        return "modular InternVL"
    return "Mono-InternVL" + ("-1.5" if config.visual_attention_experts else "")


def _sizes(params: tree.Tree) -> dict[str, Any]:
    flat = tree.flatten(params)
    return {
        "tensors": sum(leaf.shape[0] if hf.is_stacked(path) else 1 for path, leaf in flat.items()),
        "parameters": sum(math.prod(leaf.shape) for leaf in flat.values()),
        "bytes": sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in flat.values()),
        "dtypes": sorted({str(np.dtype(leaf.dtype)) for leaf in flat.values()}),
    }


# ---------------------------------------------------------------------------------------------- embedding experts


def _embed(
    source: Path, config: ModelConfig, params: tree.Tree, args: argparse.Namespace
) -> tuple[ModelConfig, tree.Tree, dict[str, int], int]:
    """The Mono-InternVL model, its added tokens and the number of rows that the vocabulary grew by."""
    vision = {key: value for key in VISION_KEYS if (value := getattr(args, f"vision.{key}")) is not None}
    if vision and config.vision is not None:
        raise ConfigError(f"--vision.{next(iter(vision))}: {source} has a patch embedding already")
    added, vocab_size = add_tokens(source, config.vocab_size)
    new, params = embed_experts(
        config,
        params,
        vision=dataclasses.replace(VisionConfig(), **vision),
        attention_experts=args.attention_experts,
        vocab_size=vocab_size,
        image_token_id=args.image_token_id if args.image_token_id is not None else added[IMAGE_CONTEXT],
        seed=args.seed,
    )
    return new, params, added, vocab_size - config.vocab_size


def add_tokens(source: Path, vocab_size: int) -> tuple[dict[str, int], int]:
    """Ids of all added tokens of the tokenizer in ``source``, chat and image tokens included, and the new vocabulary.

    Tokens that the tokenizer has keep their ids; the others follow at the end, in the release's order.
    """
    known: dict[str, int] = {}
    if any((source / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = Tokenizer(source)
        known, vocab_size = dict(tokenizer.added), max(vocab_size, tokenizer.vocab_size)
    if vocab_size == INTERNLM2_VOCABULARY:
        known = {name: number for name, number in CHAT_TOKENS.items() if name not in known} | known
    for name in (*reversed(CHAT_TOKENS), *IMAGE_TOKENS):
        if name not in known:
            known[name] = vocab_size
            vocab_size += 1
    return known, vocab_size


# --------------------------------------------------------------------------------------------------------- writing


def _write(
    target: Path,
    kind: str,
    source: Path,
    config: ModelConfig,
    params: tree.Tree,
    original: dict[str, Any] | None,
    names: hf.Names,
    shard_size: int,
    added_tokens: dict[str, int] | None,
) -> None:
    """Writes beside ``target`` and renames, so that DST is whole or absent."""
    partial = target.with_name(target.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{partial}: left by a run that was killed, or in use by another: remove it") from None
    try:
        needed, free = _sizes(params)["bytes"], shutil.disk_usage(partial).free
        if needed > free:
            raise WeightsError(f"{target}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
        params = _with_progress(params)
        if kind == "hf":
            hf.save_hf(partial, config, params, original=original, names=names, shard_size=shard_size)
        else:
            checkpoint.save_model(partial, config, params, names=names)
            values = hf.config_to_hf(config, original, params["embed"]["embedding"].dtype)
            hf.write_json(partial / "config.json", values)
        for file in hf.companion_files(source):
            shutil.copyfile(file, partial / file.name)
        if added_tokens is not None:
            hf.write_json(partial / "added_tokens.json", added_tokens)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise WeightsError(f"{target}: not written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _with_progress(params: tree.Tree) -> tree.Tree:
    """Counts the slices as they are read, on one line of a terminal."""
    if not sys.stderr.isatty():
        return params
    flat = tree.flatten(params)
    total = sum(leaf.shape[0] if hf.is_stacked(path) else 1 for path, leaf in flat.items())
    done = 0

    def counted(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, hf.LazyArray):
            return leaf

        def read(n: int | None) -> np.ndarray:
            nonlocal done
            done += 1
            print(f"\r{done}/{total} {path:50}", end="" if done < total else "\n", file=sys.stderr, flush=True)
            return leaf.read(n)

        return dataclasses.replace(leaf, read=read)

    return tree.unflatten({path: counted(path, leaf) for path, leaf in flat.items()})


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return size


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("src", metavar="SRC", help="the model to read")
    parser.add_argument("dst", metavar="DST", help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--from", dest="source", choices=("hf", "orbax"), help="what SRC is (default: seen from its files)"
    )
    parser.add_argument(
        "--to",
        dest="target",
        choices=("hf", "orbax"),
        help="what DST becomes (default: the other; SRC's with --embed_experts)",
    )
    parser.add_argument(
        "--names", metavar="FILE", help="JSON table of checkpoint names that differ from the built-in ones"
    )
    parser.add_argument(
        "--shard_size", type=_bytes, default=hf.SHARD_SIZE, help="largest exported file, e.g. 500MB (5GB)"
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="cast all weights (default: bit for bit as they are)",
    )
    parser.add_argument("--image_token_id", type=int, help="id of <IMG_CONTEXT> (default: from the tokenizer files)")
    parser.add_argument("--embed_experts", action="store_true", help="make a Mono-InternVL model of a dense InternLM2")
    parser.add_argument("--attention_experts", action="store_true", help="with --embed_experts: visual QKV too (1.5)")
    parser.add_argument("--seed", type=int, default=0, help="of the new patch embedding and projector (0)")
    for key, type_ in VISION_KEYS.items():
        default = getattr(VisionConfig(), key)
        parser.add_argument(f"--vision.{key}", type=type_, help=f"of the new patch embedding ({default})")
    args = parser.parse_args(argv)
    if args.attention_experts and not args.embed_experts:
        parser.error("--attention_experts needs --embed_experts")
    report = convert(args)
    if args.json:
        cli.json_line(report)
        return
    print(
        f"{report['dst']}: {report['model']}, {report['parameters'] / 1e9:.3f} B parameters in {report['tensors']} "
        f"tensors, {report['bytes'] / 1e9:.2f} GB ({', '.join(report['dtypes'])}), {report['seconds']} s"
    )
    if report.get("vocabulary_rows_added"):
        print(f"vocabulary: {report['vocabulary_rows_added']} rows added, each the mean of the old ones")


if __name__ == "__main__":
    cli.run(main)
