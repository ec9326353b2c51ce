"""Configuration of a model exported by mono-jax: its architecture is one section of config.json."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Attributes that transformers reads from a configuration, and that are part of the architecture.
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "image_token_id"),
)


def _shared(name: str) -> property:
    def read(self: MonoJaxConfig) -> Any:
        return self.architecture.get(name)

    def write(self: MonoJaxConfig, value: Any) -> None:
        self.architecture[name] = value

    return property(read, write)


class MonoJaxConfig(PretrainedConfig):
    """``architecture``: the fields of mono-jax's ``Architecture``, under the same names."""

    model_type = "mono_jax"

    def __init__(self, architecture: dict[str, Any] | None = None, **kwargs: Any):
        self.architecture = dict(architecture or {})
        # A tied head is not a separate module here, so there is nothing for transformers to tie.
        super().__init__(**{**kwargs, "tie_word_embeddings": False})

    @property
    def head_dim(self) -> int | None:
        """Width of an attention head; None for a configuration without an architecture."""
        a = self.architecture
        return (a and (a["head_size"] or a["hidden_size"] // a["num_attention_heads"])) or None


for _name in SHARED:
    setattr(MonoJaxConfig, _name, _shared(_name))
