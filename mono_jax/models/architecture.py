"""What a model is: the numbers in ``model.json``. How it is computed is defined in ``execution``.

Names follow the Hugging Face ``config.json`` of the published models, so that users recognise each key.
Sources of the presets' numbers: Mono-InternVL (arXiv 2410.08202), Mono-InternVL-1.5
(arXiv 2507.12566) and the public configurations of InternLM2 and InternVL-1.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from data_pipelines import strict
from data_pipelines.batch import DEFAULT_GEOMETRY, NativeGeometry, TileGeometry
from data_pipelines.strict import field
from mono_jax.errors import ConfigError, unknown_key


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary angles change beyond the lengths that the model was trained on."""

    type: Literal["linear", "dynamic", "llama3", "yarn"] = field(
        help='"linear" (t / factor), "dynamic" (NTK: the base grows with length), "llama3" (low frequencies divided by '
        'factor), "yarn" (arXiv 2309.00071)'
    )
    factor: float = field(gt=0, help="factor of the scaling")
    original_max_position_embeddings: int | None = field(
        None, ge=1, help='"llama3", "yarn": the length that the model was trained on before'
    )
    low_freq_factor: float | None = field(None, gt=0, help='"llama3": wavelengths above original / this are scaled')
    high_freq_factor: float | None = field(None, gt=0, help='"llama3": wavelengths below original / this are unchanged')
    beta_fast: float | None = field(
        None, gt=0, help='"yarn": faster frequencies (turns in the original) stay; None = 32'
    )
    beta_slow: float | None = field(None, gt=0, help='"yarn": slower ones scale in full; None = 1')
    attention_factor: float | None = field(None, gt=0, help='"yarn": of cosines and sines; None = 0.1 * ln(factor) + 1')

    def __post_init__(self) -> None:
        strict.check(self, "rope_scaling", ConfigError)
        needed = {"llama3": _LLAMA3, "yarn": _YARN[:1]}.get(self.type, ())
        known = {"llama3": _LLAMA3, "yarn": _YARN}.get(self.type, ())
        for name in (*_LLAMA3, *_YARN):
            if name in needed and getattr(self, name) is None:
                raise ConfigError(f"rope_scaling.{name} is missing: type {self.type!r} needs it")
            if name not in known and getattr(self, name) is not None:
                raise ConfigError(f"rope_scaling.{name} belongs to another type than {self.type!r}: remove it")

    def parameters(self) -> dict[str, float]:
        """All keys except the type, if set."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "type" and value is not None}


_LLAMA3 = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The visual side: patch embedding, pixel shuffle and, for modular models, InternViT."""

    kind: Literal["patch_embed", "intern_vit"] = field(
        "patch_embed", help='"patch_embed" = monolithic (no encoder), "intern_vit" = InternViT in front (modular)'
    )
    hidden_size: int = field(1024, ge=1, help="C, width of the patch embedding")
    patch_size: int = field(14, ge=1, help="edge of a patch, pixels")
    image_size: int = field(448, ge=1, help="edge of the tile that the positional embedding was made for, pixels")
    tile_size: int | None = field(
        None,
        ge=1,
        help="edge of the batch's tiles, pixels; a value other than image_size interpolates; None = equal",
    )
    native: bool = field(
        False,
        help="native resolution: an image is not cut into tiles but keeps its size and shape, in whole tokens, up to "
        "data.max_tiles tiles' worth of them; the positional embedding is interpolated to each image's grid",
    )
    num_channels: int = field(3, ge=1, help="channels of the pixels")
    downsample_ratio: float = field(
        0.5, ge=0.01, le=1, help="of the pixel shuffle: 0.5 merges 2x2 patches into one token, 1 merges none"
    )
    ps_version: Literal["v1", "v2"] = field("v2", help='order of a tile\'s tokens: "v2" = by rows, "v1" = by columns')
    num_hidden_layers: int = field(24, ge=1, help="InternViT: layers")
    num_attention_heads: int = field(16, ge=1, help="InternViT: heads")
    intermediate_size: int = field(4096, ge=1, help="InternViT: width of the FFN")
    norm_type: Literal["layer_norm", "rms_norm"] = field("layer_norm", help="InternViT: normalisation")
    layer_norm_eps: float = field(1e-6, gt=0, help="InternViT: epsilon of the normalisation")
    qkv_bias: bool = field(True, help="InternViT: biases on qkv")
    qk_normalization: bool = field(False, help="InternViT: RMS-normalised queries and keys")
    hidden_act: Literal["gelu", "silu", "relu"] = field("gelu", help="InternViT: activation of the FFN")
    select_layer: int = field(-1, help="InternViT: the layer whose output is used; negative = from the end")

    def __post_init__(self) -> None:
        strict.check(self, "vision", ConfigError)
        if self.shuffle < 1 or abs(self.shuffle * self.downsample_ratio - 1) > 1e-6:
            raise ConfigError(f"vision.downsample_ratio is {self.downsample_ratio}: use 1, 0.5, 0.25, ...")
        for name, size in (("image_size", self.image_size), ("tile_size", self.tile)):
            if size % self.token_pixels:
                raise ConfigError(f"vision.{name} is {size}: it must be a multiple of {self.token_pixels} (one token)")
        if self.native and (self.kind == "intern_vit" or self.ps_version != "v2"):
            raise ConfigError("vision.native goes with kind 'patch_embed' and ps_version 'v2' only")
        if self.kind == "intern_vit" and self.hidden_size % self.num_attention_heads:
            raise ConfigError("vision.hidden_size must be a multiple of vision.num_attention_heads")

    @property
    def tile(self) -> int:
        """Edge in pixels of the batch's tiles."""
        return self.tile_size or self.image_size

    @property
    def geometry(self) -> TileGeometry:
        """How the tiles of the batch are cut into visual tokens."""
        kind = NativeGeometry if self.native else TileGeometry
        return kind(self.tile, self.token_pixels, self.ps_version)

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
    """A language model, optionally with vision and visual experts; the defaults are those of InternLM2-1.8B.

    Features of other families of language models that InternLM2 lacks are off by default.
    """

    family: Literal["internlm2", "llama", "mistral", "qwen2", "qwen3", "gemma3"] = field(
        "internlm2", help="whose Hugging Face names and keys the model has; nothing is computed by it"
    )
    vocab_size: int = field(92544, ge=1, help="tokens of the vocabulary")
    hidden_size: int = field(2048, ge=1, help="d, width of the residual stream")
    intermediate_size: int = field(8192, ge=1, help="width of the FFNs")
    num_hidden_layers: int = field(24, ge=1, help="decoder layers")
    num_attention_heads: int = field(16, ge=1, help="query heads")
    num_key_value_heads: int = field(8, ge=1, help="key and value heads (grouped-query attention)")
    rms_norm_eps: float = field(1e-5, gt=0, help="epsilon of the RMSNorms")
    rope_theta: float = field(1e6, gt=0, help="base of the rotary angles")
    rope_scaling: RopeScaling | None = field(None, help="scaling of the rotary angles; None = none")
    max_position_embeddings: int = field(32768, ge=1, help="length beyond which dynamic scaling sets in")
    bias: bool = field(False, help="biases on wqkv and wo")
    qkv_bias: bool = field(False, help="biases on wqkv only (Qwen2)")
    head_size: int | None = field(
        None, ge=1, help="width of an attention head; None = hidden_size / num_attention_heads"
    )
    qk_norm: bool = field(False, help="RMSNorm on each head's queries and keys, before RoPE (Qwen3, Gemma 3)")
    query_pre_attn_scalar: float | None = field(
        None, gt=0, help="scores are divided by its root (Gemma 3); None = the width of a head"
    )
    sandwich_norms: bool = field(False, help="RMSNorms after attention and FFN too, before the sum (Gemma 3)")
    unit_offset_norms: bool = field(False, help="RMSNorms multiply by 1 + scale (Gemma 3)")
    hidden_act: Literal["silu", "gelu_tanh"] = field(
        "silu", help='activation of the FFNs: "silu" (SwiGLU) or "gelu_tanh" (GeGLU)'
    )
    scale_embeddings: bool = field(False, help="token embeddings are multiplied by sqrt(hidden_size) (Gemma 3)")
    sliding_window: int | None = field(
        None, ge=1, help="tokens that sliding layers attend to, the token itself included"
    )
    sliding_layers: tuple[int, ...] = field((), ge=0, help="numbers of the layers with a sliding window")
    rope_local_theta: float | None = field(
        None,
        gt=0,
        help="base of the rotary angles, unscaled, in sliding layers (Gemma 3); None = as in the other layers",
    )
    tie_word_embeddings: bool = field(False, help="the LM head is the transposed token embedding")
    vision: VisionConfig | None = field(None, help="the visual side; None = a language model")
    visual_ffn_experts: bool = field(False, help="each layer has a second FFN, for visual tokens (Mono-InternVL)")
    visual_attention_experts: bool = field(False, help="each layer has a second QKV, for visual tokens (1.5)")
    image_token_id: int = field(92546, ge=0, help="id of <IMG_CONTEXT>")
    bidirectional_images: bool = field(
        False, help="visual tokens attend to all of their image (all its tiles), later tokens too; False = causal"
    )

    def __post_init__(self) -> None:
        strict.check(self, "model", ConfigError)
        heads = [("num_attention_heads", "num_key_value_heads")]
        if self.head_size is None:
            heads.insert(0, ("hidden_size", "num_attention_heads"))
        for large, small in heads:
            if getattr(self, large) % getattr(self, small):
                raise ConfigError(
                    f"model.{large} is {getattr(self, large)}: it must be a multiple of model.{small} "
                    f"({getattr(self, small)})"
                )
        if self.head_dim % 2:
            name = "hidden_size / num_attention_heads" if self.head_size is None else "head_size"
            raise ConfigError(f"model.{name} is {self.head_dim}: it must be even (RoPE)")
        self._check_windows()
        if (self.visual_ffn_experts or self.visual_attention_experts) and not self.is_monolithic:
            raise ConfigError("model: visual experts need vision.kind 'patch_embed': a modular model has none")

    def _check_windows(self) -> None:
        layers = self.sliding_layers
        if (self.sliding_window is None) != (not layers):
            raise ConfigError("model: sliding_window and sliding_layers need each other")
        if list(layers) != sorted(set(layers)) or any(n >= self.num_hidden_layers for n in layers):
            raise ConfigError(
                f"model.sliding_layers is {list(layers)}: numbers of layers, ascending, below {self.num_hidden_layers}"
            )

    @property
    def head_dim(self) -> int:
        """D, width of an attention head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def query_dim(self) -> int:
        """Width of all query heads together: the input size of wo."""
        return self.num_attention_heads * self.head_dim

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias or self.qkv_bias

    @property
    def qkv_dim(self) -> int:
        """Output size of wqkv: for each KV head, its group of query heads, then k, then v."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def is_monolithic(self) -> bool:
        return self.vision is not None and self.vision.kind == "patch_embed"

    @property
    def causal(self) -> bool:
        """Whether every token sees its sample up to itself, in all layers."""
        return not self.bidirectional_images and self.sliding_window is None

    @property
    def geometry(self) -> TileGeometry:
        """Of the tiles that the model reads; the default for a model without vision, which reads none."""
        return self.vision.geometry if self.vision is not None else DEFAULT_GEOMETRY

    def replace(self, **changes: Any) -> Architecture:
        """A copy with ``changes``; raises ConfigError for an unknown key."""
        names = {spec.name for spec in dataclasses.fields(self)}
        for key in changes:
            if key not in names:
                raise unknown_key("model key", key, names)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Keys that InternLM2 lacks are left out unless set, so that older versions can read the rest."""
        values = strict.to_dict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"type": self.rope_scaling.type} | self.rope_scaling.parameters()
        if self.vision is not None and not self.vision.native:
            del values["vision"]["native"]
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self) if spec.name in _OF_OTHER_FAMILIES}
        return {
            key: value for key, value in values.items() if key not in defaults or getattr(self, key) != defaults[key]
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model") -> Architecture:
        """The inverse of ``to_dict``; raises ConfigError with the dotted name below ``where``."""
        return strict.build(cls, values, where, ConfigError)


_OF_OTHER_FAMILIES = (
    *("family", "qkv_bias", "head_size", "qk_norm", "query_pre_attn_scalar", "sandwich_norms", "unit_offset_norms"),
    *("hidden_act", "scale_embeddings", "sliding_window", "sliding_layers", "rope_local_theta"),
)
