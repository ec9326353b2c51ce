"""Our own Hugging Face layout: config.json, and the code that loads it in transformers (trust_remote_code).

For models without a published layout (Mono-InternVL-1.5, visual experts in other families), and on request for
the others, since the published code works only with old releases of transformers.

    FOLDER/   config.json (architecture, prompt format, auto_map), *_mono_jax.py, model*.safetensors,
              tokenizer files, generation_config.json, processor_config.json, chat_template.jinja
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io.publish import write_json
from mono_jax.files import read_json
from mono_jax.generation.chat import end_tokens, tiling_of
from mono_jax.generation.options import Sampling
from mono_jax.hf_export.tokenizer_files import write_tokenizer
from mono_jax.models.architecture import Architecture
from mono_jax.weights.hf_config import own_config
from mono_jax.weights.prompt_format import PromptFormat

CODE = Path(__file__).parent / "code"


def write_files(folder: Path, config: Architecture, prompt: PromptFormat, dtype: str) -> None:
    """Writes all files but the weights, next to the tokenizer files in ``folder``, some of which are rewritten.

    Raises ConfigError for a model that the code does not support, DataError for an unusable tokenizer or template,
    WeightsError for one that cannot be written in Hugging Face's format.
    """
    write_json(folder / "config.json", own_config(config, prompt, dtype))
    for file in CODE.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    generation = _generation_config(folder, config)
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = Tokenizer(folder)
        encoder = ChatEncoder(tokenizer, prompt.template, prompt.system_message)
        ends = end_tokens(tokenizer, encoder)
        special = write_tokenizer(folder, tokenizer, prompt)
        stored = generation.get("eos_token_id")
        ends |= {*stored} if isinstance(stored, list) else {stored} - {None}
        generation |= {"eos_token_id": sorted(ends), **special}
        if config.vision is not None:
            write_json(folder / "processor_config.json", _processor(config, prompt))
    write_json(folder / "generation_config.json", generation)


def _generation_config(folder: Path, config: Architecture) -> dict[str, Any]:
    """The existing one, plus what our own generation does: greedy where it says nothing, and no placeholders."""
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {"do_sample": False}
    values.setdefault("max_new_tokens", Sampling.max_new_tokens)
    if config.vision is not None:
        values["suppress_tokens"] = sorted({*(values.get("suppress_tokens") or ()), config.image_token_id})
    return values


def _processor(config: Architecture, prompt: PromptFormat) -> dict[str, Any]:
    tiling = tiling_of(config, prompt)
    return {
        "processor_class": "MonoJaxProcessor",
        "auto_map": {"AutoProcessor": "processing_mono_jax.MonoJaxProcessor"},
        "tile_size": tiling.geometry.tile_size,
        "token_pixels": tiling.geometry.token_pixels,
        "min_tiles": tiling.min_tiles,
        "max_tiles": tiling.max_tiles,
        "thumbnail": tiling.thumbnail,
        **({"native": True} if tiling.geometry.native else {}),
    }
