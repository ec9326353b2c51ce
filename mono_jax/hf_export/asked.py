"""A conversion as requested by the flags of ``experiments/convert.py``, tokenizers included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.hf_export.layout import write_files
from mono_jax.weights.convert import Upcycling, convert

_OPTIONS = ("source_kind", "target_kind", "names_file", "image_token_id", "dtype", "shard_size", "grow_vocabulary")


def convert_as_asked(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was done, for JSON; raises MonoJaxError."""
    vision = {key.split(".")[1]: flags[key] for key in flags if key.startswith("vision.") and flags[key] is not None}
    upcycling = Upcycling(Tokenizer, vision, flags["attention_experts"], flags["seed"])
    options = {name: flags[name] for name in (*_OPTIONS, "layout")}
    options |= {"upcycling": upcycling if flags["embed_experts"] else None, "own_layout": write_files}
    return convert(flags["src"], flags["dst"], **options)
