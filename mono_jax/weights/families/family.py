"""How a family of language models is stored in Hugging Face folders: its tensor names, and the keys of its config.json.

All families use one transformer (``mono_jax.models``); ``Architecture`` says which of its parts a model has. A family
defines the spelling of these parts. If a config.json needs something that the transformer lacks, it is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.weights.hf_rope import rope_from_hf, rope_to_hf
from mono_jax.weights.hf_section import Section

CAUSAL = "ForCausalLM"
# Keys that change what models of some families compute, and the value at which they have no effect.
NEUTRAL: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "original_max_position_embeddings": None,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "use_bidirectional_attention": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "no_rope_layers": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": None,
    "logits_scaling": 1.0,
    "num_experts": None,
    "num_local_experts": None,
    "quantization_config": None,
}
# Fields that a family's ``read`` does not return have their defaults in all models of the family.
LANGUAGE = tuple(
    spec.name
    for spec in dataclasses.fields(Architecture)
    if not spec.name.startswith(("visual_", "image_")) and spec.name not in ("vision", "bidirectional_images", "family")
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json: its name, its type, and its default if absent (None: required)."""

    name: str
    kind: type
    default: Any = None


@dataclasses.dataclass(frozen=True)
class Family:
    """One family; subclasses handle keys that do not map to one value each.

    Attributes:
      name: its value in ``Architecture.family``.
      title: for display.
      model_type, architecture: of its config.json.
      tensors: path of a parameter -> name of its tensor ({n} = layer). If it contains {qkv}, the fused parameter is
        stored as three tensors, with q, k and v in their names.
      keys: field of ``Architecture`` -> key of config.json; in addition to those that every family has.
      parts: fields of ``Architecture`` with the same value in all models of the family.
      own: keys of ``NEUTRAL`` that the family reads.
      activation: key of the activation and its only supported value.
      theta: base of the rotary angles if no key gives it.
      scalings: kinds of RoPE scaling that the family's code supports.
      head_dim: width of a head if its key is absent; 0 = hidden_size / heads. None: there is no such key.
    """

    name: str
    title: str
    model_type: str
    architecture: str
    tensors: Mapping[str, str]
    keys: Mapping[str, Key]
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own: tuple[str, ...] = ()
    activation: tuple[str, str] = ("hidden_act", "silu")
    theta: float = 10000.0
    scalings: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn")
    head_dim: int | None = 0

    def architecture_with(self, ffn: bool, attention: bool) -> str:
        """The architecture's name with visual experts; only InternLM2VEForCausalLM is a published one."""
        if not ffn:
            return self.architecture
        experts = "VEAttention" if attention else "VE"
        return self.architecture.removesuffix(CAUSAL) + experts + CAUSAL

    def read(self, section: Section) -> dict[str, Any]:
        """Fields of ``Architecture``; raises ConfigError that names the file, the key and the fix."""
        self.refuse(section)
        key, activation = self.activation
        section.get(key, str, activation, valid=(activation,))
        heads = section.get("num_attention_heads", int)
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        values: dict[str, Any] = {name: section.get(name, int) for name in sizes}
        values["num_attention_heads"] = heads
        values["num_key_value_heads"] = section.get("num_key_value_heads", int, heads)
        values |= {field: section.get(key.name, key.kind, key.default) for field, key in self.keys.items()}
        values |= self.read_head(section, heads, values["hidden_size"])
        values |= self.read_rope(section, values["max_position_embeddings"])
        values |= self.read_windows(section, values["num_hidden_layers"])
        return values | {"family": self.name} | self.parts

    def refuse(self, section: Section) -> None:
        """Raises ConfigError for keys that require something unsupported."""
        for key, neutral in NEUTRAL.items():
            value = section.values.get(key)
            if key not in self.own and value is not None and value != neutral:
                fix = f"{neutral!r} only" if neutral is not None else "nothing there"
                raise ConfigError(f"{section.where}: {key} is {value!r}: for {self.title} this project supports {fix}")

    def read_head(self, section: Section, heads: int, width: int) -> dict[str, Any]:
        usual = width // heads
        if self.head_dim is None:
            section.get("head_dim", int, usual, valid=(usual,))
            return {}
        size = section.get("head_dim", int, self.head_dim or usual)
        return {"head_size": None if size * heads == width else size}

    def read_rope(self, section: Section, limit: int) -> dict[str, Any]:
        theta, scaling = rope_from_hf(section, kinds=self.scalings, default=self.theta, limit=limit)
        return {"rope_theta": theta, "rope_scaling": scaling}

    def read_windows(self, section: Section, layers: int) -> dict[str, Any]:
        del section, layers
        return {}

    def write(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json for ``config``; raises ConfigError for what the family's config cannot express."""
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        values = {key: getattr(config, key) for key in (*keys, "num_key_value_heads")}
        values |= {key.name: getattr(config, field) for field, key in self.keys.items()}
        values |= {"model_type": self.model_type, self.activation[0]: self.activation[1]}
        if self.head_dim is not None:
            values["head_dim"] = config.head_dim
        values |= self.write_rope(config, original) | self.write_windows(config, original)
        self._check_says(config, {**original, **values})
        return values

    def write_rope(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        return rope_to_hf(config, original, kinds=self.scalings, default=self.theta)

    def write_windows(self, config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
        del config, original
        return {}

    def _check_says(self, config: Architecture, values: Mapping[str, Any]) -> None:
        """Raises ConfigError for fields of ``config`` that would be read back from ``values`` with other values."""
        found = Architecture(**self.read(Section(values, "config.json")))
        for field in LANGUAGE:
            if (wanted := getattr(config, field)) != getattr(found, field):
                raise ConfigError(
                    f"model.{field} is {wanted!r}: a config.json of {self.title} cannot express this (model.family)"
                )
