"""Hugging Face folders: config.json and safetensors weights, in and out.

One table says which checkpoint tensor is which parameter. Weights move slice by slice: a parameter of
stacked layers ``[L, ...]`` is read and written one layer at a time, so that converting takes little
more memory than the largest single slice. Values are never rounded unless a dtype is asked for: bytes
go out as they came in. Pickles (.bin, .pt, .pth) are never loaded.

Names: the public release of Mono-InternVL (InternLM2's names under ``language_model.``). For the visual
attention experts of Mono-InternVL-1.5 no published names are known; those here are this project's own
and can be changed with a name table (JSON: ``{"parameter/path": "checkpoint.name.{n}.weight"}``).
"""

from __future__ import annotations

import copy
import functools
import json
import re
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError, unknown_key
from mono_jax.models.architecture import Architecture, RopeScaling, VisionConfig
from mono_jax.models.transformer import Model

Params = dict[str, Any]
Names = Mapping[str, str]

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
SHARD_SIZE = 5_000_000_000  # bytes of one exported file, as Hugging Face writes them
COMPANIONS = (  # what lies beside the weights and belongs to the tokenizer, or is the code that config.json names
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "*.py",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")  # a buffer that old InternLM2 files carry; RoPE recomputes it
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

# ---------------------------------------------------------------------------------------------------
# Names. Path of the parameter -> name of the checkpoint tensor ({n} = layer) and its layout there.
#   same:   as it is              kernel: [out, in], ours [in, out]
#   conv:   [C, 3, P, P], ours [P*P*3, C] with rows ordered (row, column, channel)
#   batch:  leading axes of size 1 until the tensor has three
# ---------------------------------------------------------------------------------------------------

_LM = "language_model."
_LAYER = _LM + "model.layers.{n}."
_VIT = "vision_model.encoder.layers.{n}."
_EMBEDDINGS = "vision_model.embeddings."

_TABLE: dict[str, tuple[str, str]] = {
    "embed/embedding": (_LM + "model.tok_embeddings.weight", "same"),
    "final_norm/scale": (_LM + "model.norm.weight", "same"),
    "lm_head/kernel": (_LM + "output.weight", "kernel"),
    "layers/attention_norm/scale": (_LAYER + "attention_norm.weight", "same"),
    "layers/ffn_norm/scale": (_LAYER + "ffn_norm.weight", "same"),
    "layers/attention/wqkv/kernel": (_LAYER + "attention.wqkv.weight", "kernel"),
    "layers/attention/wqkv/bias": (_LAYER + "attention.wqkv.bias", "same"),
    "layers/attention/wo/kernel": (_LAYER + "attention.wo.weight", "kernel"),
    "layers/attention/wo/bias": (_LAYER + "attention.wo.bias", "same"),
    "layers/visual_attention/wqkv/kernel": (_LAYER + "attention.wqkv_ve.weight", "kernel"),
    "layers/visual_attention/wqkv/bias": (_LAYER + "attention.wqkv_ve.bias", "same"),
    "layers/feed_forward/gate/kernel": (_LAYER + "feed_forward.w1.weight", "kernel"),
    "layers/feed_forward/up/kernel": (_LAYER + "feed_forward.w3.weight", "kernel"),
    "layers/feed_forward/down/kernel": (_LAYER + "feed_forward.w2.weight", "kernel"),
    "layers/visual_feed_forward/gate/kernel": (_LAYER + "feed_forward_ve.w1.weight", "kernel"),
    "layers/visual_feed_forward/up/kernel": (_LAYER + "feed_forward_ve.w3.weight", "kernel"),
    "layers/visual_feed_forward/down/kernel": (_LAYER + "feed_forward_ve.w2.weight", "kernel"),
    "vision/class_embedding": (_EMBEDDINGS + "class_embedding", "batch"),
    "vision/position_embedding": (_EMBEDDINGS + "position_embedding", "batch"),
    "vision/patch_embedding/kernel": (_EMBEDDINGS + "patch_embedding.weight", "conv"),
    "vision/patch_embedding/bias": (_EMBEDDINGS + "patch_embedding.bias", "same"),
    "vision/layers/norm1/scale": (_VIT + "norm1.weight", "same"),
    "vision/layers/norm1/bias": (_VIT + "norm1.bias", "same"),
    "vision/layers/norm2/scale": (_VIT + "norm2.weight", "same"),
    "vision/layers/norm2/bias": (_VIT + "norm2.bias", "same"),
    "vision/layers/attn/qkv/kernel": (_VIT + "attn.qkv.weight", "kernel"),
    "vision/layers/attn/qkv/bias": (_VIT + "attn.qkv.bias", "same"),
    "vision/layers/attn/proj/kernel": (_VIT + "attn.proj.weight", "kernel"),
    "vision/layers/attn/proj/bias": (_VIT + "attn.proj.bias", "same"),
    "vision/layers/attn/q_norm/scale": (_VIT + "attn.q_norm.weight", "same"),
    "vision/layers/attn/k_norm/scale": (_VIT + "attn.k_norm.weight", "same"),
    "vision/layers/mlp/fc1/kernel": (_VIT + "mlp.fc1.weight", "kernel"),
    "vision/layers/mlp/fc1/bias": (_VIT + "mlp.fc1.bias", "same"),
    "vision/layers/mlp/fc2/kernel": (_VIT + "mlp.fc2.weight", "kernel"),
    "vision/layers/mlp/fc2/bias": (_VIT + "mlp.fc2.bias", "same"),
    "vision/layers/ls1/scale": (_VIT + "ls1", "same"),
    "vision/layers/ls2/scale": (_VIT + "ls2", "same"),
    "projector/norm/scale": ("mlp1.0.weight", "same"),
    "projector/norm/bias": ("mlp1.0.bias", "same"),
    "projector/fc1/kernel": ("mlp1.1.weight", "kernel"),
    "projector/fc1/bias": ("mlp1.1.bias", "same"),
    "projector/fc2/kernel": ("mlp1.3.weight", "kernel"),
    "projector/fc2/bias": ("mlp1.3.bias", "same"),
}


@functools.lru_cache(maxsize=16)
def param_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of ``config`` by path; stacked layers have a leading axis."""
    return {path: leaf.shape for path, leaf in tree.flatten(Model(config).abstract_params()).items()}


def is_stacked(path: str) -> bool:
    """Whether the parameter at ``path`` has a leading axis of layers."""
    return path.startswith(("layers/", "vision/layers/"))


@dataclass(frozen=True)
class LazyArray:
    """An array that lies in a file: ``lazy[n]`` reads layer n, ``np.asarray(lazy)`` reads all.

    ``read(n)`` returns slice n of the leading axis, or the whole of an array that is not stacked (n None).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]

    def __getitem__(self, n: int) -> np.ndarray:
        return self.read(n) if self.stacked else self.read(None)[n]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        if self.stacked:
            for n in range(self.shape[0]):
                out[n] = self.read(n)
        else:
            out[...] = self.read(None)
        return out

    def astype(self, dtype: Any) -> LazyArray:
        """The same array, cast slice by slice when it is read."""
        return replace(self, dtype=np.dtype(dtype), read=lambda n: self.read(n).astype(dtype))


@dataclass(frozen=True)
class _Tensor:
    """One row of the table for one config. ``shape`` is ours, of one layer where stacked."""

    path: str
    pattern: str
    layout: str
    shape: tuple[int, ...]
    layers: int | None
    patch_size: int

    def name(self, n: int | None) -> str:
        return self.pattern if n is None else self.pattern.replace("{n}", str(n))

    @property
    def slices(self) -> tuple[int | None, ...]:
        return (None,) if self.layers is None else tuple(range(self.layers))

    @property
    def hf_shape(self) -> tuple[int, ...]:
        if self.layout == "kernel":
            return self.shape[::-1]
        if self.layout == "conv":
            rows, out = self.shape
            return (out, rows // self.patch_size**2, self.patch_size, self.patch_size)
        if self.layout == "batch":
            return (1,) * (3 - len(self.shape)) + self.shape
        return self.shape

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            array = array.transpose(2, 3, 1, 0)
        return array.reshape(self.shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        if self.layout == "kernel":
            return array.T
        if self.layout == "conv":
            out, channels, *patch = self.hf_shape
            return array.reshape(*patch, channels, out).transpose(3, 2, 0, 1)
        return array.reshape(self.hf_shape)


def _tensors(config: Architecture, names: Names | None) -> list[_Tensor]:
    """The rows of the table that ``config`` has; every parameter exactly once."""
    for path, pattern in (names or {}).items():
        if path not in _TABLE:
            raise unknown_key("path in the name table", path, _TABLE)
        if not isinstance(pattern, str) or pattern.count("{n}") != is_stacked(path):
            raise ConfigError(f"name table: {path}: {pattern!r} must have {'one' if is_stacked(path) else 'no'} {{n}}")
    rows = []
    for path, shape in param_shapes(config).items():
        pattern, layout = _TABLE[path]
        if config.vision is None:
            pattern = pattern.removeprefix(_LM)
        stacked = is_stacked(path)
        rows.append(
            _Tensor(
                path=path,
                pattern=(names or {}).get(path, pattern),
                layout=layout,
                shape=shape[1:] if stacked else shape,
                layers=shape[0] if stacked else None,
                patch_size=config.vision.patch_size if config.vision else 0,
            )
        )
    seen: dict[str, str] = {}
    for row in rows:
        if seen.setdefault(row.pattern, row.path) != row.path:
            raise ConfigError(f"name table: {row.path} and {seen[row.pattern]} both have the name {row.pattern!r}")
    return rows


# ---------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``; raises ConfigError that names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


class _Section:
    """Typed access to a part of config.json; every error names the file, the key and the fix."""

    def __init__(self, values: Any, where: str):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: must be a JSON object, not {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, key: str, kind: type, default: Any = None, valid: tuple = ()) -> Any:
        """``values[key]``, or ``default`` where absent or null; a default of None means required."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: key {key!r} is missing; add it ({kind.__name__})")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigError(f"{self.where}: {key} is {value!r}: it must be of type {kind.__name__}")
        if kind in (int, float) and key != "select_layer" and value <= 0:
            raise ConfigError(f"{self.where}: {key} is {value!r}: it must be greater than 0")
        if valid and value not in valid:
            raise ConfigError(f"{self.where}: {key} is {value!r}: use one of {', '.join(map(repr, valid))}")
        return value


_ARCHITECTURES = ("InternLM2ForCausalLM", "InternLM2VEForCausalLM", "InternLM2VEAttentionForCausalLM")
_VISION_KINDS = {"intern_vit_patch": "patch_embed", "intern_vit_6b": "intern_vit"}


def config_from_hf(
    values: Mapping[str, Any], *, image_token_id: int | None = None, file: str | Path = "config.json"
) -> Architecture:
    """The Architecture of a Hugging Face config.json (``internvl_chat`` or ``internlm2``).

    ``image_token_id``: id of <IMG_CONTEXT>; default: the key of that name, else InternLM2's 92546.
    Raises ConfigError that names ``file``, the key and the fix.
    """
    top = _Section(values, str(file))
    model_type = top.get("model_type", str, valid=("internvl_chat", "internlm2"))
    if model_type == "internlm2":
        return _build(file, **_language_keys(top))
    language = _Section(values.get("llm_config"), f"{file}: llm_config")
    architecture = (values["llm_config"].get("architectures") or ["missing"])[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{language.where}: architectures is {architecture!r}: use one of {', '.join(_ARCHITECTURES)}"
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if values.get(key):
            raise ConfigError(f"{file}: {key} is {values[key]!r}: merge the LoRA weights first and set it to 0")
    vision = _vision(top, _Section(values.get("vision_config"), f"{file}: vision_config"))
    default = Architecture.image_token_id
    return _build(
        file,
        **_language_keys(language),
        vision=vision,
        visual_ffn_experts=architecture != _ARCHITECTURES[0],
        visual_attention_experts=architecture == _ARCHITECTURES[2],
        image_token_id=image_token_id if image_token_id is not None else top.get("image_token_id", int, default),
    )


def _build(file: str | Path, **keys: Any) -> Architecture:
    try:
        return Architecture(**keys)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _language_keys(section: _Section) -> dict[str, Any]:
    """Keys of InternLM2; absent ones take the defaults of the public InternLM2 configuration."""
    section.get("hidden_act", str, "silu", valid=("silu",))
    heads = section.get("num_attention_heads", int)
    return {
        **{k: section.get(k, int) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        "num_attention_heads": heads,
        "num_key_value_heads": section.get("num_key_value_heads", int, heads),
        "rms_norm_eps": section.get("rms_norm_eps", float, 1e-6),
        "rope_theta": section.get("rope_theta", float, 10000.0),
        "rope_scaling": _rope_scaling(section),
        "max_position_embeddings": section.get("max_position_embeddings", int, 2048),
        "bias": section.get("bias", bool, True),
        "tie_word_embeddings": section.get("tie_word_embeddings", bool, False),
    }


def _rope_scaling(section: _Section) -> RopeScaling | None:
    if section.values.get("rope_scaling") is None:
        return None
    scaling = _Section(section.values["rope_scaling"], f"{section.where}: rope_scaling")
    return RopeScaling(scaling.get("type", str, valid=("linear", "dynamic")), scaling.get("factor", float))


def _vision(top: _Section, section: _Section) -> VisionConfig:
    kind = _VISION_KINDS[section.get("model_type", str, valid=tuple(_VISION_KINDS))]
    # Required where they shape the model; a monolithic one has no encoder and only carries them along.
    fallback = VisionConfig() if kind == "patch_embed" else None

    def encoder(key: str, type_: type, valid: tuple = ()) -> Any:
        return section.get(key, type_, getattr(fallback, key, None), valid)

    image_size = section.get("image_size", int)
    tile_size = top.get("force_image_size", int, image_size)
    try:
        return VisionConfig(
            kind=kind,
            hidden_size=section.get("hidden_size", int),
            patch_size=section.get("patch_size", int),
            image_size=image_size,
            tile_size=None if tile_size == image_size else tile_size,
            num_channels=section.get("num_channels", int, 3, valid=(3,)),
            downsample_ratio=top.get("downsample_ratio", float, 0.5),
            ps_version=top.get("ps_version", str, "v1", valid=("v1", "v2")),
            num_hidden_layers=encoder("num_hidden_layers", int),
            num_attention_heads=encoder("num_attention_heads", int),
            intermediate_size=encoder("intermediate_size", int),
            norm_type=encoder("norm_type", str, ("layer_norm", "rms_norm")),
            layer_norm_eps=section.get("layer_norm_eps", float, 1e-6),
            qkv_bias=encoder("qkv_bias", bool),
            qk_normalization=encoder("qk_normalization", bool),
            hidden_act=section.get("hidden_act", str, "gelu", valid=("gelu", "silu", "relu")),
            select_layer=top.get("select_layer", int, -1),
        )
    except ConfigError as error:
        raise ConfigError(
            f"{section.where}: {error}".replace(f"{section.where}: {section.where}", section.where)
        ) from None


# What a new config.json says of things outside the model; [P1]'s and the release's values.
CHAT_DEFAULTS = {
    "template": "internlm2-chat",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}


def config_to_hf(config: Architecture, original: Mapping[str, Any] | None = None, dtype: Any = None) -> dict[str, Any]:
    """config.json of ``config``. Keys of ``original`` that this project does not know are kept.

    ``original`` may be that of the dense base of a multimodal ``config``. ``dtype`` (of the weights) is written
    into a config that is new. A model with visual attention experts
    gets an architecture name of its own and loses ``_name_or_path`` and ``auto_map``: no public code loads it and
    no published label fits it.
    """
    out: dict[str, Any] = copy.deepcopy(dict(original or {}))
    model_type = "internlm2" if config.vision is None else "internvl_chat"
    if dtype is not None and out.get("model_type") != model_type:
        out["torch_dtype"] = str(np.dtype(dtype))
    if config.vision is None:
        _update(out, _hf_language(config, _ARCHITECTURES[0]))
        return out
    if config.visual_attention_experts and not config.visual_ffn_experts:
        raise ConfigError("visual_attention_experts without visual_ffn_experts has no Hugging Face form")
    if out.get("model_type") != model_type:
        base = {"llm_config": out} if "model_type" in out else {}
        out = CHAT_DEFAULTS | base | {key: out[key] for key in ("torch_dtype",) if key in out}
    language, vision = dict(out.get("llm_config") or {}), dict(out.get("vision_config") or {})
    architecture = _ARCHITECTURES[config.visual_ffn_experts + config.visual_attention_experts]
    _update(language, _hf_language(config, architecture))
    _update(vision, _hf_vision(config.vision))
    _update(out, _hf_top(config))
    out |= {"llm_config": language, "vision_config": vision}
    if config.visual_attention_experts:
        for section in (out, language, vision):
            section.pop("_name_or_path", None)
            section.pop("auto_map", None)
    return out


def _update(section: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets ``values``, leaving what already is equal (1000000 and 1e6) as the original wrote it."""
    for key, value in values.items():
        if key not in section or section[key] != value:
            section[key] = value


def _hf_language(config: Architecture, architecture: str) -> dict[str, Any]:
    scaling = config.rope_scaling
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings", "bias")
    return {
        "architectures": [architecture],
        "model_type": "internlm2",
        "hidden_act": "silu",
        **{key: getattr(config, key) for key in (*keys, "tie_word_embeddings")},
        "rope_scaling": {"type": scaling.type, "factor": scaling.factor} if scaling else None,
    }


def _hf_vision(vision: VisionConfig) -> dict[str, Any]:
    keys = ("hidden_size", "patch_size", "image_size", "num_channels", "num_hidden_layers", "num_attention_heads")
    keys += ("intermediate_size", "norm_type", "layer_norm_eps", "qkv_bias", "qk_normalization", "hidden_act")
    model_type = next(name for name, kind in _VISION_KINDS.items() if kind == vision.kind)
    return {"model_type": model_type, **{key: getattr(vision, key) for key in keys}}


def _hf_top(config: Architecture) -> dict[str, Any]:
    vision = config.vision
    top = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "force_image_size": vision.tile,
        "downsample_ratio": vision.downsample_ratio,
        "ps_version": vision.ps_version,
        "select_layer": vision.select_layer,
    }
    if config.image_token_id != Architecture.image_token_id:
        top["image_token_id"] = config.image_token_id
    return top


def image_token_id(directory: str | Path) -> int | None:
    """Id of <IMG_CONTEXT> by name from the tokenizer files of ``directory``; None where no file has it."""
    directory = Path(directory)
    if (file := directory / "added_tokens.json").is_file() and IMAGE_CONTEXT in (tokens := read_json(file)):
        return int(tokens[IMAGE_CONTEXT])
    if (file := directory / "tokenizer_config.json").is_file():
        for key, token in (read_json(file).get("added_tokens_decoder") or {}).items():
            if token.get("content") == IMAGE_CONTEXT:
                return int(key)
    if (file := directory / "tokenizer.json").is_file():
        for token in read_json(file).get("added_tokens") or []:
            if token.get("content") == IMAGE_CONTEXT:
                return int(token["id"])
    return None


def read_config(
    directory: str | Path, *, image_token_id_: int | None = None, names: Names | None = None
) -> Architecture:
    """The Architecture of a Hugging Face folder; <IMG_CONTEXT> is resolved by name where its files tell.

    Visual attention experts are also recognised by their tensors, since no published config.json announces them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder")
    file = directory / "config.json"
    token = image_token_id_ if image_token_id_ is not None else image_token_id(directory)
    config = config_from_hf(read_json(file), image_token_id=token, file=file)
    path = "layers/visual_attention/wqkv/kernel"
    if config.visual_ffn_experts and (names or {}).get(path, _TABLE[path][0]).replace("{n}", "0") in _tensor_names(
        directory
    ):
        config = config.replace(visual_attention_experts=True)
    return config


# ---------------------------------------------------------------------------------------------------
# Weights in
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A tensor of a safetensors file, not yet read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_index(directory: Path) -> dict[str, _Entry]:
    """Every tensor of the folder by name, from the sharded index or the single file."""
    index = directory / INDEX_FILE
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise WeightsError(f"{index}: key 'weight_map' is missing or no object")
        files = [directory / name for name in sorted(set(map(str, weight_map.values())))]
    elif (directory / WEIGHTS_FILE).is_file():
        files = [directory / WEIGHTS_FILE]
    else:
        pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
        if pickles:
            raise WeightsError(
                f"{directory}: has only pickled weights ({', '.join(pickles)}), which can run code and are never "
                "loaded: save them as safetensors first"
            )
        raise WeightsError(f"{directory}: no {WEIGHTS_FILE} and no {INDEX_FILE}")
    entries: dict[str, _Entry] = {}
    for file in files:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                part = handle.get_slice(name)
                entries[name] = _Entry(file, tuple(part.get_shape()), part.get_dtype())
    return entries


def _tensor_names(directory: Path) -> Collection[str]:
    """Names of the tensors of a folder; none if its weights cannot be read, which reading them will report."""
    try:
        return _read_index(directory)
    except (WeightsError, ConfigError):
        return ()


def _open(file: Path) -> Any:
    if not file.is_file():
        raise WeightsError(f"{file}: no such file, though {INDEX_FILE} names it")
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file}: not a readable safetensors file: {error}") from None


def _read(entry: _Entry, name: str) -> np.ndarray:
    # The file is opened for each tensor: a mapping kept open would hold all pages read so far.
    with _open(entry.file) as handle:
        return handle.get_tensor(name)


def open_params(directory: str | Path, config: Architecture, *, names: Names | None = None) -> Params:
    """The weights of a Hugging Face folder as a nested dict of LazyArray: nothing is read yet.

    Raises one WeightsError that lists all missing, unexpected and misshapen tensors.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise WeightsError(f"{directory}: no such folder")
    entries = _read_index(directory)
    rows = _tensors(config, names)
    _check(directory, entries, rows)
    return tree.unflatten({row.path: _lazy(row, entries) for row in rows})


def _lazy(row: _Tensor, entries: Mapping[str, _Entry]) -> LazyArray:
    def read(n: int | None) -> np.ndarray:
        return row.to_ours(_read(entries[row.name(n)], row.name(n)))

    layers = () if row.layers is None else (row.layers,)
    dtype = _DTYPES[entries[row.name(row.slices[0])].dtype]
    return LazyArray(layers + row.shape, dtype, row.layers is not None, read)


def _check(directory: Path, entries: Mapping[str, _Entry], rows: list[_Tensor]) -> None:
    expected = {row.name(n): row for row in rows for n in row.slices}
    missing = [name for name in expected if name not in entries]
    unexpected = [name for name in entries if name not in expected and not _NOT_WEIGHTS.search(name)]
    wrong = []
    for name, row in expected.items():
        if (entry := entries.get(name)) is None:
            continue
        first = entries.get(row.name(row.slices[0]), entry)
        if entry.shape != row.hf_shape:
            wrong.append(f"{name} is {list(entry.shape)}, the config asks for {list(row.hf_shape)}")
        elif entry.dtype not in _DTYPES:
            wrong.append(f"{name} is {entry.dtype}, use one of {', '.join(_DTYPES)}")
        elif entry.dtype != first.dtype:
            wrong.append(f"{name} is {entry.dtype}, layer 0 is {first.dtype}")
    _raise_if_any(f"{directory}: weights do not fit the config", missing, unexpected, wrong)


def _raise_if_any(what: str, missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
    problems = [
        f"{len(items)} {kind} ({', '.join(items)})"
        for kind, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", wrong))
        if items
    ]
    if problems:
        raise WeightsError(f"{what}: {'; '.join(problems)}")


def load_params(
    directory: str | Path, config: Architecture, dtype: Any = None, *, names: Names | None = None
) -> Params:
    """The weights of a Hugging Face folder as a nested dict of numpy arrays, stacked over layers.

    ``dtype`` None keeps what is stored. Errors: see ``open_params``.
    """
    lazy = tree.flatten(open_params(directory, config, names=names))
    return tree.unflatten({path: leaf.__array__(dtype) for path, leaf in lazy.items()})


# ---------------------------------------------------------------------------------------------------
# Weights out
# ---------------------------------------------------------------------------------------------------


def save_params(
    directory: str | Path,
    config: Architecture,
    params: Params,
    *,
    names: Names | None = None,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """Writes ``params`` (arrays or LazyArray) as safetensors; returns the names of the files.

    One ``model.safetensors`` if all fit ``shard_size`` bytes, else numbered shards with an index. A tensor
    larger than ``shard_size`` gets a file of its own. Raises WeightsError listing all that does not fit.
    """
    directory = Path(directory)
    flat = tree.flatten(params)
    check_params(config, flat)
    # Layer by layer, what has no layer first: the shards of a large model then hold whole layers.
    order = [(row, n) for row in _tensors(config, names) for n in row.slices]
    order.sort(key=lambda item: -1 if item[1] is None else item[1])
    shards: list[list[tuple[_Tensor, int | None]]] = [[]]
    room = shard_size
    for row, n in order:
        size = int(np.prod(row.shape)) * np.dtype(flat[row.path].dtype).itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append((row, n))
        room -= size
    directory.mkdir(parents=True, exist_ok=True)
    weight_map, files, total = {}, [], 0
    for i, shard in enumerate(shards):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(directory / file, shard, flat)
        weight_map |= {row.name(n): file for row, n in shard}
        files.append(file)
    if len(shards) > 1:
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        files.append(INDEX_FILE)
    return files


def _write_file(file: Path, shard: list[tuple[_Tensor, int | None]], flat: Mapping[str, Any]) -> int:
    """One safetensors file, tensor by tensor; returns its bytes of weights.

    The library's writer wants all tensors of a file in memory; the format (8 bytes of header length, a JSON
    header, the bytes) is written here so that one at a time will do. The library reads it.
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for row, n in shard:
        dtype = np.dtype(flat[row.path].dtype)
        end = offset + int(np.prod(row.shape)) * dtype.itemsize
        header[row.name(n)] = {"dtype": names[dtype], "shape": row.hf_shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for row, n in shard:
            leaf = flat[row.path]
            array = np.asarray(leaf if n is None else leaf[n])
            out.write(np.ascontiguousarray(row.to_hf(array)).reshape(-1).view(np.uint8).data)
    return offset


def check_params(config: Architecture, flat: Mapping[str, Any]) -> None:
    """Raises WeightsError listing every parameter that is missing, unexpected or misshapen for ``config``."""
    shapes = param_shapes(config)
    missing = [path for path in shapes if path not in flat]
    unexpected = [path for path in flat if path not in shapes]
    wrong = [
        f"{path} is {list(flat[path].shape)}, the config asks for {list(shape)}"
        for path, shape in shapes.items()
        if path in flat and tuple(flat[path].shape) != shape
    ]
    wrong += [
        f"{path} is {leaf.dtype}, use one of {', '.join(map(str, _DTYPES.values()))}"
        for path, leaf in flat.items()
        if np.dtype(leaf.dtype) not in _DTYPES.values()
    ]
    _raise_if_any("parameters do not fit the config", missing, unexpected, wrong)


def write_json(file: Path, value: Any) -> None:
    """``value`` as indented JSON with a final newline."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def companion_files(directory: str | Path) -> list[Path]:
    """Tokenizer and generation files of a model folder, without config.json."""
    return sorted(file for pattern in COMPANIONS for file in Path(directory).glob(pattern) if file.is_file())


def save_hf(
    directory: str | Path,
    config: Architecture,
    params: Params,
    *,
    original: Mapping[str, Any] | None = None,
    names: Names | None = None,
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """A Hugging Face folder: weights and config.json. Returns the names of the files."""
    files = save_params(directory, config, params, names=names, shard_size=shard_size)
    values = config_to_hf(config, original, params["embed"]["embedding"].dtype)
    write_json(Path(directory) / "config.json", values)
    return [*files, "config.json"]


def named_tensors(
    config: Architecture, params: Mapping[str, Any], *, names: Names | None = None
) -> dict[str, np.ndarray]:
    """{checkpoint name: array in the checkpoint's shape} of a tree in memory (parameters, or gradients of them)."""
    flat = tree.flatten(params)
    named = {}
    for row in _tensors(config, names):
        values = np.asarray(flat[row.path])
        named |= {row.name(n): row.to_hf(values if n is None else values[n]) for n in row.slices}
    return named
