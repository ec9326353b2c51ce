"""Conversion between Hugging Face's config.json and this project's config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import strict
from data_pipelines.special_tokens import IMAGE_CONTEXT, OWN_TEMPLATE
from mono_jax.errors import ConfigError
from mono_jax.files import read_json
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.weights.families.table import ARCHITECTURES, BY_MODEL_TYPE, family_of
from mono_jax.weights.hf_rope import ROPE_KEYS
from mono_jax.weights.hf_section import Section
from mono_jax.weights.names import Names, patterns
from mono_jax.weights.prompt_format import PROMPT_KEYS, PromptFormat, prompt_to_hf
from mono_jax.weights.readers import tensor_names

_VISION_KINDS = {"intern_vit_patch": "patch_embed", "intern_vit_6b": "intern_vit"}
OWN_MODEL_TYPE = "mono_jax"  # of our own layout, whose code is ``mono_jax.hf_export``
DTYPE_KEYS = ("torch_dtype", "dtype")  # of the weights: the older key, and that of transformers 5
# Contents of a new config.json beyond the model: the values of the paper (arXiv 2410.08202) and its release.
CHAT_DEFAULTS = {
    "template": "internlm2-chat",
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}


def config_from_hf(
    values: Mapping[str, Any], *, image_token_id: int | None = None, file: str | Path = "config.json"
) -> Architecture:
    """The Architecture of a Hugging Face config.json (``internvl_chat``, a language model's, or ``mono_jax``).

    ``image_token_id``: id of <IMG_CONTEXT>; default: the key of that name, else InternLM2's 92546.
    Raises ConfigError that names ``file``, the key and the fix.
    """
    top = Section(values, str(file))
    model_type = top.get("model_type", str, valid=("internvl_chat", *BY_MODEL_TYPE, OWN_MODEL_TYPE))
    if model_type == OWN_MODEL_TYPE:
        config = Architecture.from_dict(top.get("architecture", dict), f"{file}: architecture")
        return config if image_token_id is None else config.replace(image_token_id=image_token_id)
    if model_type in BY_MODEL_TYPE:
        return _build(file, **BY_MODEL_TYPE[model_type].read(top))
    language = Section(values.get("llm_config"), f"{file}: llm_config")
    architecture = (values["llm_config"].get("architectures") or ["missing"])[0]
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{language.where}: architectures is {architecture!r}: use one of {', '.join(ARCHITECTURES)}")
    family, ffn_experts, attention_experts = ARCHITECTURES[architecture]
    if (said := language.values.get("model_type")) not in (None, family.model_type):
        raise ConfigError(f"{language.where}: architectures is {architecture!r}, but model_type {said!r}: change one")
    for key in ("use_backbone_lora", "use_llm_lora"):
        if values.get(key):
            raise ConfigError(f"{file}: {key} is {values[key]!r}: merge the LoRA weights first and set it to 0")
    for key in ROPE_KEYS:  # no code would read it here
        if values.get(key) is not None and language.values.get(key) is None:
            raise ConfigError(f"{file}: {key} is next to llm_config: move it into llm_config")
    vision = _vision(top, Section(values.get("vision_config"), f"{file}: vision_config"))
    default = Architecture.image_token_id
    return _build(
        file,
        **family.read(language),
        vision=vision,
        visual_ffn_experts=ffn_experts,
        visual_attention_experts=attention_experts,
        image_token_id=image_token_id if image_token_id is not None else top.get("image_token_id", int, default),
    )


def _build(file: str | Path, **keys: Any) -> Architecture:
    try:
        return Architecture(**keys)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _vision(top: Section, section: Section) -> VisionConfig:
    kind = _VISION_KINDS[section.get("model_type", str, valid=tuple(_VISION_KINDS))]
    # Required where they shape the model; a monolithic model has no encoder and only keeps them.
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


def config_to_hf(
    config: Architecture,
    original: Mapping[str, Any] | None = None,
    dtype: Any = None,
    *,
    prompt: PromptFormat | None = None,
) -> dict[str, Any]:
    """config.json of ``config``. Keys of ``original`` that this project does not know are kept, as is its spelling.

    ``original`` may be the config.json of the dense base of a multimodal ``config``. ``dtype`` (of the weights) is
    written into a new config. ``prompt``: the format of the model's training; None = as in ``original``, else
    CHAT_DEFAULTS. A model with visual attention experts gets a separate architecture name and loses
    ``_name_or_path`` and ``auto_map``: no public code loads it and no published label fits it.
    """
    out: dict[str, Any] = copy.deepcopy(dict(original or {}))
    if out.get("model_type") == OWN_MODEL_TYPE:
        out = {key: out[key] for key in (*PROMPT_KEYS, *DTYPE_KEYS) if key in out}
    family = family_of(config)
    model_type = family.model_type if config.vision is None else "internvl_chat"
    if dtype is not None and out.get("model_type") != model_type:
        out = with_dtype(out, dtype)
    if config.vision is None:
        _update(out, _hf_language(config, out))
        # The use of a tokenizer's own template is detected from its files.
        return out if prompt and prompt.template == OWN_TEMPLATE else out | prompt_to_hf(prompt, out)
    if config.vision.native:
        raise ConfigError("vision.native has no published layout, whose readers cut tiles: --layout=own")
    if config.bidirectional_images:
        raise ConfigError("bidirectional_images has no published layout, whose readers are causal: --layout=own")
    if config.visual_attention_experts and not config.visual_ffn_experts:
        raise ConfigError("visual_attention_experts without visual_ffn_experts has no published layout: --layout=own")
    if out.get("model_type") != model_type:
        prompt_keys = {key: out.pop(key) for key in PROMPT_KEYS if key in out}
        base = {"llm_config": out} if "model_type" in out else {}
        out = CHAT_DEFAULTS | prompt_keys | base | {key: out[key] for key in DTYPE_KEYS if key in out}
    language, vision = dict(out.get("llm_config") or {}), dict(out.get("vision_config") or {})
    _update(language, _hf_language(config, language))
    _update(vision, _hf_vision(config.vision))
    _update(out, _hf_top(config, out))
    out |= {"llm_config": language, "vision_config": vision} | prompt_to_hf(prompt, out)
    if config.visual_attention_experts:
        for section in (out, language, vision):
            section.pop("_name_or_path", None)
            section.pop("auto_map", None)
    return out


def has_published_layout(config: Architecture) -> bool:
    """Whether ``config_to_hf`` makes a config.json that other projects' code can load."""
    if config.vision is None or not config.is_monolithic:
        return True
    own = config.visual_attention_experts or config.bidirectional_images or config.vision.native
    return not own and config.family == Architecture.family


def config_beside(
    config: Architecture,
    original: Mapping[str, Any] | None = None,
    dtype: Any = None,
    *,
    prompt: PromptFormat | None = None,
) -> dict[str, Any] | None:
    """The config.json stored with one of our models: ``config_to_hf``, or None if there is no published layout."""
    try:
        return config_to_hf(config, original, dtype, prompt=prompt)
    except ConfigError:
        return None


def own_config(config: Architecture, prompt: PromptFormat, dtype: str) -> dict[str, Any]:
    """config.json of our own layout. Raises ConfigError for a modular model, which its code does not support."""
    if config.vision is not None and not config.is_monolithic:
        raise ConfigError("vision.kind 'intern_vit' has the published layout only: --layout=published")
    classes = dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"modeling_mono_jax.{_OWN_CLASS}")
    if config.vision is not None:
        classes["AutoModelForImageTextToText"] = classes["AutoModel"]
    return {
        "architectures": [_OWN_CLASS],
        "model_type": OWN_MODEL_TYPE,
        "auto_map": {"AutoConfig": "configuration_mono_jax.MonoJaxConfig", **classes},
        "torch_dtype": dtype,
        "architecture": strict.to_dict(config) | {key: config.to_dict()[key] for key in ("rope_scaling", "vision")},
        **(CHAT_DEFAULTS | prompt_to_hf(prompt, CHAT_DEFAULTS)),
    }


_OWN_CLASS = "MonoJaxForCausalLM"


def with_dtype(values: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """``values`` of a config.json with the dtype of the weights set to ``dtype``, in every spelling and section."""
    name = str(np.dtype(dtype))
    out = _with_dtype(values, name)
    return out if any(key in out for key in DTYPE_KEYS) else out | {"torch_dtype": name}


def _with_dtype(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    sections = {key: _with_dtype(value, name) for key, value in values.items() if isinstance(value, Mapping)}
    return {**values, **sections, **{key: name for key in DTYPE_KEYS if key in values}}


def _update(section: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Sets ``values``, but keeps the original spelling of those that are already equal (1000000 and 1e6)."""
    for key, value in values.items():
        if key not in section or section[key] != value:
            section[key] = value


def _hf_language(config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
    family = family_of(config)
    architecture = family.architecture_with(config.visual_ffn_experts, config.visual_attention_experts)
    return {"architectures": [architecture], **family.write(config, original)}


def _hf_vision(vision: VisionConfig) -> dict[str, Any]:
    keys = ("hidden_size", "patch_size", "image_size", "num_channels", "num_hidden_layers", "num_attention_heads")
    keys += ("intermediate_size", "norm_type", "layer_norm_eps", "qkv_bias", "qk_normalization", "hidden_act")
    model_type = next(name for name, kind in _VISION_KINDS.items() if kind == vision.kind)
    return {"model_type": model_type, **{key: getattr(vision, key) for key in keys}}


def _hf_top(config: Architecture, original: Mapping[str, Any]) -> dict[str, Any]:
    vision = config.vision
    top = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "force_image_size": vision.tile,
        "downsample_ratio": vision.downsample_ratio,
        "ps_version": vision.ps_version,
        "select_layer": vision.select_layer,
    }
    if config.image_token_id != Architecture.image_token_id or "image_token_id" in original:
        top["image_token_id"] = config.image_token_id
    return top


def find_image_token_id(directory: str | Path) -> int | None:
    """Id of <IMG_CONTEXT> by name from the tokenizer files of ``directory``; None if no file has it."""
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
    directory: str | Path, *, image_token_id: int | None = None, names: Names | None = None
) -> Architecture:
    """The Architecture of a Hugging Face folder; <IMG_CONTEXT> is looked up by name in its tokenizer files if present.

    Visual attention experts are also recognised by their tensors, since no published config.json declares them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder")
    file = directory / "config.json"
    if image_token_id is None:
        image_token_id = find_image_token_id(directory)
    config = config_from_hf(read_json(file), image_token_id=image_token_id, file=file)
    name = patterns(config, names)["layers/visual_attention/wqkv/kernel"].replace("{n}", "0").replace("{qkv}", "q")
    if config.visual_ffn_experts and name in tensor_names(directory):
        config = config.replace(visual_attention_experts=True)
    return config
