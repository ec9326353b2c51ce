"""Model configurations: frozen dataclasses and the presets.

Names follow the Hugging Face ``config.json`` of the published models, so that a user finds each key
again. Sources of the presets' numbers: Mono-InternVL (arXiv 2410.08202), Mono-InternVL-1.5
(arXiv 2507.12566) and the public configurations of InternLM2 and InternVL-1.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines.batch import TileGeometry
from data_pipelines.special_tokens import IMAGE_TOKENS
from mono_jax.errors import ConfigError, unknown_key

RematPolicy = Literal["none", "full", "dots", "dots_no_batch"]
MmoeImplementation = Literal["static", "dense_both", "grouped"]


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
    def geometry(self) -> TileGeometry:
        """How the tiles of the batch are cut into visual tokens."""
        return TileGeometry(self.tile, self.token_pixels, self.ps_version)

    @property
    def grid(self) -> int:
        """Edge in patches of the stored positional embedding."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model; the defaults are those of InternLM2-1.8B.

    Attributes:
      visual_ffn_experts: each layer has a second FFN for visual tokens (Mono-InternVL).
      visual_attention_experts: each layer has a second QKV projection for visual tokens (1.5).
      bias: biases on wqkv and wo.
      remat: what the backward pass recomputes: "none" (keep all), "full" (keep layer inputs only),
        "dots" (keep matmul outputs), "dots_no_batch" (keep outputs of matmuls with weights).
      mmoe: "static" = the boundary between visual and text slots is static, each expert sees its own
        slots; "dense_both" = both experts on all tokens, chosen by mask (the papers' naive form);
        "grouped" = the kernels of ``pallas_kernels``, which also serve elastic boundaries (each row its own).
      mmoe_kernel: with "grouped", the kernel's name in ``pallas_kernels.registry``; "auto" = chosen by device,
        dtype and shape. mmoe_tile: rows of x that share an expert; boundaries are multiples of it.
      attention: "auto", "xla" (S x S scores; any device) or "xla_chunked" (queries in blocks of
        ``attention_chunk``; memory linear in S), "cudnn" (Hopper), "splash" (TPU).
      loss_chunk: text slots whose logits are in memory at once; 0 = all.
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
    remat: RematPolicy = "none"
    mmoe: MmoeImplementation = "static"
    mmoe_kernel: str = "auto"
    mmoe_tile: int = 128
    attention: Literal["auto", "xla", "xla_chunked", "cudnn", "splash"] = "auto"
    attention_chunk: int = 512
    loss_chunk: int = 0

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
        for name in ("remat", "mmoe", "attention"):
            valid = _LITERALS[name]
            if getattr(self, name) not in valid:
                raise unknown_key(f"value of model.{name}", getattr(self, name), valid)
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

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with ``changes``; raises ConfigError for an unknown key."""
        names = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in names:
                raise unknown_key("model key", key, names)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of ``to_dict``; raises ConfigError that names the nearest valid key."""
        values = dict(values)
        for key, inner in (("vision", VisionConfig), ("rope_scaling", RopeScaling)):
            if values.get(key) is not None and not isinstance(values[key], inner):
                values[key] = _build(inner, dict(values[key]), f"model.{key} key")
        return _build(cls, values, "model key")


_LITERALS: dict[str, tuple[str, ...]] = {
    "remat": ("none", "full", "dots", "dots_no_batch"),
    "mmoe": ("static", "dense_both", "grouped"),
    "attention": ("auto", "xla", "xla_chunked", "cudnn", "splash"),
}


def _build(cls: type, values: dict[str, Any], what: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in names:
            raise unknown_key(what, key, names)
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{what.removesuffix(' key')}: {error}") from None


ADDED_TOKENS = len(IMAGE_TOKENS)

_INTERNLM2_1_8B = ModelConfig()
_INTERNLM2_7B = ModelConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)
_INTERNLM2_20B = ModelConfig(
    hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48, num_key_value_heads=8
)
_TINY_LM = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    image_token_id=100,
)
_TINY_VISION = VisionConfig(hidden_size=32, patch_size=4, image_size=32, num_hidden_layers=2, num_attention_heads=4)


def _mono(base: ModelConfig, **changes: Any) -> ModelConfig:
    """Mono-InternVL over ``base``: patch embedding, added tokens, visual FFN experts."""
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


PRESETS: dict[str, ModelConfig] = {
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
    "tiny_lm": _TINY_LM,
    "tiny_mono": _TINY_LM.replace(vision=_TINY_VISION, visual_ffn_experts=True),
    "tiny_mono_1_5": _TINY_LM.replace(vision=_TINY_VISION, visual_ffn_experts=True, visual_attention_experts=True),
    "tiny_modular": _TINY_LM.replace(vision=dataclasses.replace(_TINY_VISION, kind="intern_vit", intermediate_size=64)),
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The preset ``name`` with ``changes``; raises ConfigError that names the nearest preset."""
    if name not in PRESETS:
        raise unknown_key("preset", name, PRESETS)
    return PRESETS[name].replace(**changes)
