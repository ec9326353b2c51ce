"""Llama 2 and 3, and models with the same structure: Mistral, Qwen2 (and 2.5), Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_jax.models.architecture import Architecture
from mono_jax.weights.families.family import Family, Key
from mono_jax.weights.families.windows import SLIDING, layer_types, sliding_layers
from mono_jax.weights.hf_section import Section

_LAYER = "model.layers.{n}."
TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
    "layers/attention_norm/scale": _LAYER + "input_layernorm.weight",
    "layers/ffn_norm/scale": _LAYER + "post_attention_layernorm.weight",
    "layers/attention/wqkv/kernel": _LAYER + "self_attn.{qkv}_proj.weight",
    "layers/attention/wo/kernel": _LAYER + "self_attn.o_proj.weight",
    "layers/visual_attention/wqkv/kernel": _LAYER + "self_attn.{qkv}_proj_ve.weight",
    "layers/feed_forward/gate/kernel": _LAYER + "mlp.gate_proj.weight",
    "layers/feed_forward/up/kernel": _LAYER + "mlp.up_proj.weight",
    "layers/feed_forward/down/kernel": _LAYER + "mlp.down_proj.weight",
    "layers/visual_feed_forward/gate/kernel": _LAYER + "mlp_ve.gate_proj.weight",
    "layers/visual_feed_forward/up/kernel": _LAYER + "mlp_ve.up_proj.weight",
    "layers/visual_feed_forward/down/kernel": _LAYER + "mlp_ve.down_proj.weight",
}
QKV_BIASES = {
    "layers/attention/wqkv/bias": _LAYER + "self_attn.{qkv}_proj.bias",
    "layers/visual_attention/wqkv/bias": _LAYER + "self_attn.{qkv}_proj_ve.bias",
}
BIASES = QKV_BIASES | {"layers/attention/wo/bias": _LAYER + "self_attn.o_proj.bias"}
QK_NORMS = {
    "layers/attention/q_norm/scale": _LAYER + "self_attn.q_norm.weight",
    "layers/attention/k_norm/scale": _LAYER + "self_attn.k_norm.weight",
    "layers/visual_attention/q_norm/scale": _LAYER + "self_attn.q_norm_ve.weight",
    "layers/visual_attention/k_norm/scale": _LAYER + "self_attn.k_norm_ve.weight",
}


def keys(limit: int, tied: bool = False) -> dict[str, Key]:
    """``limit``: default of max_position_embeddings; ``tied``: default of tie_word_embeddings."""
    return {
        "rms_norm_eps": Key("rms_norm_eps", float, 1e-6),
        "max_position_embeddings": Key("max_position_embeddings", int, limit),
        "tie_word_embeddings": Key("tie_word_embeddings", bool, tied),
    }


BIAS_KEY = {"bias": Key("attention_bias", bool, False)}


class _Mistral(Family):
    """Only ``sliding_window`` decides: either all layers have it, or none."""

    def read_windows(self, section: Section, layers: int) -> dict[str, Any]:
        if "sliding_window" in section.values and section.values["sliding_window"] is None:
            return {}
        window = section.get("sliding_window", int, 4096)
        return {"sliding_window": window, "sliding_layers": tuple(range(layers))}

    def write_windows(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        return {"sliding_window": config.sliding_window}


class _Qwen(Family):
    """When in use, the window applies to the layers from ``max_window_layers`` on, or to those in ``layer_types``."""

    def read_windows(self, section: Section, layers: int) -> dict[str, Any]:
        if not section.get("use_sliding_window", bool, False):
            return {}
        numbers = sliding_layers(section, layers)
        if numbers is None:
            numbers = tuple(range(section.get("max_window_layers", int, 28), layers))
        return (
            {"sliding_window": section.get("sliding_window", int, 4096), "sliding_layers": numbers} if numbers else {}
        )

    def write_windows(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        if config.sliding_window is None:
            values: dict[str, Any] = {"use_sliding_window": False}
            values |= {"layer_types": layer_types(config)} if SLIDING in (original.get("layer_types") or ()) else {}
            return values
        values = {"use_sliding_window": True, "sliding_window": config.sliding_window}
        return values | {"layer_types": layer_types(config)}


LLAMA = Family(
    name="llama",
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    tensors=TENSORS | BIASES,
    keys=keys(2048) | BIAS_KEY,
    own=("attention_bias",),
)
MISTRAL = _Mistral(
    name="mistral",
    title="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    tensors=TENSORS,
    keys=keys(131072),
    own=("sliding_window",),
)
QWEN2 = _Qwen(
    name="qwen2",
    title="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=TENSORS | QKV_BIASES,
    keys=keys(32768),
    parts={"qkv_bias": True},
    own=("use_sliding_window", "sliding_window", "layer_types"),
    head_dim=None,
)
QWEN3 = _Qwen(
    name="qwen3",
    title="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=TENSORS | BIASES | QK_NORMS,
    keys=keys(32768) | BIAS_KEY,
    parts={"qk_norm": True},
    own=("attention_bias", "use_sliding_window", "sliding_window", "layer_types"),
    head_dim=128,
)
