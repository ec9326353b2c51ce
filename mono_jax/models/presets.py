"""Named architectures: the published models, their bases, and tiny ones for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from data_pipelines.special_tokens import IMAGE_TOKENS
from mono_jax.errors import unknown_key
from mono_jax.models.architecture import Architecture, RopeScaling, VisionConfig

ADDED_TOKENS = len(IMAGE_TOKENS)

_INTERNLM2_1_8B = Architecture()
_INTERNLM2_7B = Architecture(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)
_INTERNLM2_20B = Architecture(
    hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48, num_key_value_heads=8
)
_TINY_LM = Architecture(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    image_token_id=100,
)
_DEMO_LM = Architecture(  # 2 M parameters plus the embeddings: trains in minutes on two CPU cores
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    vocab_size=128,
    image_token_id=100,
)
_SMALL_LM = Architecture(  # 85 M parameters plus the embeddings: hours on one GPU
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    vocab_size=128,
    image_token_id=100,
)
_TINY_VISION = VisionConfig(hidden_size=32, patch_size=4, image_size=32, num_hidden_layers=2, num_attention_heads=4)


def _mono(base: Architecture, **changes: Any) -> Architecture:
    """Mono-InternVL on top of ``base``: patch embedding, added tokens, visual FFN experts."""
    defaults = {
        "vocab_size": base.vocab_size + ADDED_TOKENS,
        "vision": VisionConfig(),
        "visual_ffn_experts": True,
        "rope_scaling": RopeScaling("dynamic", 2.0),
    }
    return base.replace(**(defaults | changes))


def _token_pixels(pixels: int) -> VisionConfig:
    """One visual token per ``pixels`` x ``pixels`` square: patches of half that edge, shuffled 2x2."""
    return VisionConfig(patch_size=pixels // 2)


PRESETS: dict[str, Architecture] = {
    "internlm2_1_8b": _INTERNLM2_1_8B,
    "internlm2_7b": _INTERNLM2_7B,
    "internlm2_20b": _INTERNLM2_20B,
    "mono_internvl_2b": _mono(_INTERNLM2_1_8B),
    "mono_internvl_1_5_2b": _mono(_INTERNLM2_1_8B, visual_attention_experts=True),
    "mono_internvl_7b": _mono(_INTERNLM2_7B),
    "mono_internvl_20b": _mono(_INTERNLM2_20B),
    "mono_internvl_2b_14px": _mono(_INTERNLM2_1_8B, vision=_token_pixels(14)),
    "mono_internvl_2b_56px": _mono(_INTERNLM2_1_8B, vision=_token_pixels(56)),
    "internvl_1_5_2b": _INTERNLM2_1_8B.replace(
        vocab_size=92553, vision=VisionConfig(kind="intern_vit"), rope_scaling=RopeScaling("dynamic", 2.0)
    ),
    "demo_lm": _DEMO_LM,
    "small_lm": _SMALL_LM,
    "tiny_lm": _TINY_LM,
    "tiny_mono": _TINY_LM.replace(vision=_TINY_VISION, visual_ffn_experts=True),
    "tiny_mono_1_5": _TINY_LM.replace(vision=_TINY_VISION, visual_ffn_experts=True, visual_attention_experts=True),
    "tiny_modular": _TINY_LM.replace(vision=dataclasses.replace(_TINY_VISION, kind="intern_vit", intermediate_size=64)),
}


def preset(name: str, **changes: Any) -> Architecture:
    """The preset ``name`` with ``changes``; raises ConfigError that names the nearest preset."""
    if name not in PRESETS:
        raise unknown_key("preset", name, PRESETS)
    return PRESETS[name].replace(**changes)
