"""Tiny random models of every family with experts, exported, and the results of our own code on the same prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_tokens
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io.publish import write_json
from data_pipelines.special_tokens import IMAGE_CONTEXT, OWN_TEMPLATE
from mono_jax.generation.chat import tiling_of
from mono_jax.generation.prompts import Prompt, check_prompt, pack
from mono_jax.hf_export.layout import write_files
from mono_jax.models.architecture import Architecture, RopeScaling, VisionConfig
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.convert import convert
from mono_jax.weights.families.table import FAMILIES
from mono_jax.weights.model_folder import Origin, save_model
from mono_jax.weights.prompt_format import PromptFormat
from mono_jax.weights.upcycle import add_tokens
from tests.mono_jax.helpers import random_params

VISION = VisionConfig(hidden_size=16, patch_size=4, image_size=32)
_YARN = RopeScaling("yarn", 4.0, 32, beta_fast=16.0)
_LLAMA3 = RopeScaling("llama3", 8.0, 32, low_freq_factor=1.0, high_freq_factor=2.0)
_WINDOWS = {"sliding_window": 7, "sliding_layers": (0,)}
# Name -> folder of the tokenizer, template, fields of the architecture besides the family's defaults.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "internlm2": ("chat", "internlm2-chat", {"rope_scaling": RopeScaling("dynamic", 2.0), "bias": True}),
    "llama": ("llama3", OWN_TEMPLATE, {"rope_scaling": _LLAMA3, "tie_word_embeddings": True, "head_size": 24}),
    "mistral": ("mistral", OWN_TEMPLATE, {"sliding_window": 7, "sliding_layers": (0, 1)}),
    "qwen2": ("smollm2", OWN_TEMPLATE, {"rope_scaling": _YARN, **_WINDOWS}),
    "qwen3": ("qwen3", OWN_TEMPLATE, {"bias": True, "head_size": 16}),
    "gemma3": ("gemma3", OWN_TEMPLATE, {"rope_local_theta": 1e3, "query_pre_attn_scalar": 24.0, **_WINDOWS}),
}
SIZES = {"max_position_embeddings": 24, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}


@dataclasses.dataclass
class Exported:
    """``folder``: the Hugging Face export; the rest is from our code."""

    folder: Path
    config: Architecture
    params: dict[str, Any]
    tokenizer: Tokenizer
    form: PromptFormat

    def prompt(self, text: str, images: Sequence[Path]) -> Prompt:
        tiling = tiling_of(self.config, self.form).shared(len(images))
        parts = [image_tokens(file.read_bytes(), tiling, ImageLimits()) for file in images]
        encoder = ChatEncoder(self.tokenizer, self.form.template, self.form.system_message)
        ids, _ = encoder.conversation([("human", text)], [len(cells) for _, cells in parts], answer=True)
        return Prompt(ids, *map(np.concatenate, zip(*parts))) if parts else Prompt(ids)

    def logits(self, prompts: Sequence[Prompt], dtype: Any = jnp.float32) -> list[np.ndarray]:
        """For each prompt, float32 [text tokens, vocabulary]; all run as one batch."""
        prompts = [check_prompt(self.config, prompt, "") for prompt in prompts]
        batch, _ = pack(self.config, prompts, np.zeros(len(prompts), int), len(prompts))
        model = Model(self.config)
        run = jax.jit(lambda params, batch: model.logits(params, model(params, batch, dtype).hidden))
        logits = np.asarray(run(self.params, batch))
        return [row[: len(prompt.input_ids) - len(prompt.patches)] for row, prompt in zip(logits, prompts)]


def export(folder: Path, golden: Path, name: str, *, layout: str = "auto", **changes: Any) -> Exported:
    """``changes`` of the architecture; the model goes through a model folder."""
    files, template, fields = CASES[name]
    source = golden / files if files == "chat" else golden / "chat_templates" / files
    known = Tokenizer(source)
    # A vocabulary that is larger than the tokenizer's.
    tokens, size = add_tokens(known.added, known.vocab_size + 3, template != OWN_TEMPLATE)
    fields = {"visual_ffn_experts": True, "visual_attention_experts": True, "vision": VISION} | SIZES | fields | changes
    parts = {**FAMILIES[name].parts, "vocab_size": size, "image_token_id": tokens[IMAGE_CONTEXT]}
    config = preset("tiny_lm", family=name, **parts | fields)
    params = random_params(config, size=0.15)
    form = PromptFormat(template, "Look." if name == "internlm2" else None, 1, 3)
    ours = folder / "ours"
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    extra = [file for part in names if (file := source / part).is_file()]
    save_model(ours, config, params, extra_files=extra, origin=Origin(prompt=form))
    write_json(ours / "added_tokens.json", tokens)
    convert(ours, folder / "hf", own_layout=write_files, layout=layout)
    return Exported(folder / "hf", config, params, Tokenizer(ours), form)


def pictures(folder: Path) -> list[Path]:
    """Three images of several grids."""
    files = []
    for number, size in enumerate([(90, 40), (33, 70), (50, 50)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
