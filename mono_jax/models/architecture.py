"""What a model is: the numbers that go into ``model.json``. How it is computed stands in ``execution``.

Names follow the Hugging Face ``config.json`` of the published models, so that a user finds each key
again. Sources of the presets' numbers: Mono-InternVL (arXiv 2410.08202), Mono-InternVL-1.5
(arXiv 2507.12566) and the public configurations of InternLM2 and InternVL-1.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mono_jax.errors import ConfigError, unknown_key


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """``type``: "linear" (t / factor) or "dynamic" (NTK: the base grows with the length); ``factor`` > 0."""

    type: Literal["linear", "dynamic"]
    factor: float

    def __post_init__(self) -> None:
        if self.type not in ("linear", "dynamic"):
            raise ConfigError(f"rope_scaling.type is {self.type!r}: use 'linear' or 'dynamic', or null for none")
        if not self.factor > 0:
            raise ConfigError(f"rope_scaling.factor is {self.factor}: it must be greater than 0")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The visual side.

    Attributes:
      kind: "patch_embed" = monolithic (no encoder), "intern_vit" = InternViT in front (modular).
      hidden_size: C, width of the patch embedding.
      patch_size: edge in pixels of one patch.
      image_size: edge in pixels of the tile that the positional embedding was made for.
      tile_size: edge of the tiles in the batch; another one than ``image_size`` interpolates the
        positional embedding bicubically. None = ``image_size``.
      downsample_ratio: of the pixel shuffle; 0.5 merges 2x2 patches into one token, 1.0 merges none.
      ps_version: order of a tile's tokens, "v2" = row by row, "v1" = column by column.
      The rest applies to "intern_vit" alone.
    """

    kind: Literal["patch_embed", "intern_vit"] = "patch_embed"
    hidden_size: int = 1024
    patch_size: int = 14
    image_size: int = 448
    tile_size: int | None = None
    num_channels: int = 3
    downsample_ratio: float = 0.5
    ps_version: Literal["v1", "v2"] = "v2"
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_normalization: bool = False
    hidden_act: Literal["gelu", "silu", "relu"] = "gelu"
    select_layer: int = -1

    def __post_init__(self) -> None:
        if self.shuffle < 1 or abs(self.shuffle * self.downsample_ratio - 1) > 1e-6:
            raise ConfigError(f"vision.downsample_ratio is {self.downsample_ratio}: use 1, 0.5, 0.25, ...")
        for name, size in (("image_size", self.image_size), ("tile_size", self.tile)):
            if size % self.token_pixels:
                raise ConfigError(f"vision.{name} is {size}: it must be a multiple of {self.token_pixels} (one token)")
        if self.kind == "intern_vit" and self.hidden_size % self.num_attention_heads:
            raise ConfigError("vision.hidden_size must be a multiple of vision.num_attention_heads")

    @property
    def tile(self) -> int:
        """Edge in pixels of a tile of the batch."""
        return self.tile_size or self.image_size

    @property
    def shuffle(self) -> int:
        """Edge in patches of one token."""
        return round(1 / self.downsample_ratio)

    @property
    def token_pixels(self) -> int:
        """Edge in pixels of one visual token."""
        return self.patch_size * self.shuffle

    @property
    def tile_tokens(self) -> int:
        """Visual tokens of one tile."""
        return (self.tile // self.token_pixels) ** 2

    @property
    def grid(self) -> int:
        """Edge in patches of the stored positional embedding."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a model; the defaults are those of InternLM2-1.8B.

    Attributes:
      visual_ffn_experts: each layer has a second FFN for visual tokens (Mono-InternVL).
      visual_attention_experts: each layer has a second QKV projection for visual tokens (1.5).
      bias: biases on wqkv and wo.
    """

    vocab_size: int = 92544
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    bias: bool = False
    tie_word_embeddings: bool = False
    vision: VisionConfig | None = None
    visual_ffn_experts: bool = False
    visual_attention_experts: bool = False
    image_token_id: int = 92546

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if (self.visual_ffn_experts or self.visual_attention_experts) and not self.is_monolithic:
            raise ConfigError("visual experts need vision.kind 'patch_embed': a modular model has none")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_dim(self) -> int:
        """Output size of wqkv: per KV head, its group of query heads, then k, then v."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def is_monolithic(self) -> bool:
        return self.vision is not None and self.vision.kind == "patch_embed"

    def replace(self, **changes: Any) -> Architecture:
        """A copy with ``changes``; raises ConfigError for an unknown key."""
        names = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in names:
                raise unknown_key("model key", key, names)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The inverse of ``to_dict``; raises ConfigError that names the nearest valid key."""
        values = dict(values)
        for key, inner in (("vision", VisionConfig), ("rope_scaling", RopeScaling)):
            if values.get(key) is not None and not isinstance(values[key], inner):
                values[key] = _build(inner, dict(values[key]), f"model.{key} key")
        return _build(cls, values, "model key")


def _build(cls: type, values: dict[str, Any], what: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise unknown_key(what, key, names)
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{what.removesuffix(' key')}: {error}") from None
