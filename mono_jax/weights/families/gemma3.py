"""Gemma 3, the language model (``gemma3_text``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.weights.families.family import Family, Key
from mono_jax.weights.families.llama import BIAS_KEY, BIASES, QK_NORMS, TENSORS, keys
from mono_jax.weights.families.windows import FULL, SLIDING, layer_types, sliding_layers
from mono_jax.weights.hf_rope import ROPE_KEYS, rope_from_hf, rope_to_hf
from mono_jax.weights.hf_section import Section

_LAYER = "model.layers.{n}."
_LOCAL = "rope_local_base_freq"
_LOCAL_THETA = 10000.0
_PATTERN = "sliding_window_pattern"
_NORMS = {
    "layers/attention_post_norm/scale": _LAYER + "post_attention_layernorm.weight",
    "layers/ffn_norm/scale": _LAYER + "pre_feedforward_layernorm.weight",
    "layers/ffn_post_norm/scale": _LAYER + "post_feedforward_layernorm.weight",
}


class _Gemma3(Family):
    """Every sixth layer has full attention; the others have a window, and rotary angles with a different base."""

    def read_windows(self, section: Section, layers: int) -> dict[str, Any]:
        numbers = sliding_layers(section, layers)
        if numbers is None:
            pattern = section.get(_PATTERN, int, 6)
            numbers = tuple(n for n in range(layers) if (n + 1) % pattern)
        return (
            {"sliding_window": section.get("sliding_window", int, 4096), "sliding_layers": numbers} if numbers else {}
        )

    def write_windows(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        if config.sliding_window is None:
            return {"layer_types": layer_types(config)}
        values: dict[str, Any] = {"sliding_window": config.sliding_window}
        by_pattern = {key: original[key] for key in (_PATTERN, "layer_types") if key in original}
        if sliding_layers(Section(by_pattern, ""), config.num_hidden_layers) == config.sliding_layers:
            return values
        pattern = by_pattern.get(_PATTERN)
        if pattern and config.sliding_layers == tuple(n for n in range(config.num_hidden_layers) if (n + 1) % pattern):
            return values
        return values | {"layer_types": layer_types(config)}

    def read_rope(self, section: Section, limit: int) -> dict[str, Any]:
        whole, local = _apart(section)
        theta, scaling = rope_from_hf(whole, kinds=self.scalings, default=self.theta, limit=limit)
        local_theta, local_scaling = rope_from_hf(local, kinds=self.scalings, default=_LOCAL_THETA, limit=limit)
        if local_scaling is not None:
            raise ConfigError(f"{local.where}: this project does not support scaled rotary angles in sliding layers")
        return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local_theta}

    def write_rope(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        nested = original.get("rope_parameters")
        options = {"kinds": self.scalings, "default": self.theta}
        if not isinstance(nested, Mapping):
            return rope_to_hf(config, original, **options) | {_LOCAL: config.rope_local_theta}
        parts = {FULL: config, SLIDING: config.replace(rope_theta=config.rope_local_theta, rope_scaling=None)}
        spelt = {
            kind: rope_to_hf(part, {"rope_parameters": nested.get(kind) or {"rope_type": "default"}}, **options)
            for kind, part in parts.items()
        }
        return {"rope_parameters": {kind: each["rope_parameters"] for kind, each in spelt.items()}}


def _apart(section: Section) -> tuple[Section, Section]:
    """The keys of the rotary angles of full and of sliding layers, as two separate sections."""
    whole = {key: section.values[key] for key in ROPE_KEYS if key in section.values}
    local = {"rope_theta": section.values.get(_LOCAL)}
    nested = whole.pop("rope_parameters", None)
    if nested is not None:
        if not isinstance(nested, Mapping) or not {*nested} <= {FULL, SLIDING}:
            raise ConfigError(f"{section.where}: rope_parameters must have the keys {FULL!r} and {SLIDING!r}")
        whole["rope_parameters"], local["rope_parameters"] = nested.get(FULL), nested.get(SLIDING)
    return Section(whole, section.where), Section(local, f"{section.where}: sliding layers")


GEMMA3 = _Gemma3(
    name="gemma3",
    title="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=TENSORS | BIASES | QK_NORMS | _NORMS,
    keys=keys(131072, tied=True) | BIAS_KEY | {"query_pre_attn_scalar": Key("query_pre_attn_scalar", float, 256.0)},
    parts={
        "qk_norm": True,
        "sandwich_norms": True,
        "unit_offset_norms": True,
        "scale_embeddings": True,
        "hidden_act": "gelu_tanh",
    },
    own=("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    theta=1e6,
    head_dim=256,
)
