"""GGUF files (llama.cpp) as Hugging Face folders: dequantised weights, config.json, tokenizer and chat template.

Llama models in such files are read with the package ``gguf``. Their queries and keys are in the order of
llama.cpp's rotary embeddings (neighbouring pairs); here they are put back into Hugging Face's order (halves).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.io.publish import write_json
from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.models.architecture import Architecture
from mono_jax.weights.families.llama import LLAMA
from mono_jax.weights.hf_config import config_from_hf
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.names import Tensor, tensors
from mono_jax.weights.writers import save_params

_BLOCK = "blk.{n}."
_NAMES = {  # Hugging Face: GGUF
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": _BLOCK + "attn_norm.weight",
    "post_attention_layernorm.weight": _BLOCK + "ffn_norm.weight",
    "self_attn.q_proj.weight": _BLOCK + "attn_q.weight",
    "self_attn.k_proj.weight": _BLOCK + "attn_k.weight",
    "self_attn.v_proj.weight": _BLOCK + "attn_v.weight",
    "self_attn.o_proj.weight": _BLOCK + "attn_output.weight",
    "mlp.gate_proj.weight": _BLOCK + "ffn_gate.weight",
    "mlp.up_proj.weight": _BLOCK + "ffn_up.weight",
    "mlp.down_proj.weight": _BLOCK + "ffn_down.weight",
}
_CONTROL = (3, 4)  # token types: control, user-defined
# How texts are split before the merges, by tokenizer.ggml.pre: whether each digit is split off.
_DIGITS_ALONE = {"smollm": True, "gpt-2": False}


@contextlib.contextmanager
def unpacked(file: Path) -> Iterator[Path]:
    """Yields a folder, which exists within the context, with the contents of ``file`` in float32.

    Raises ConfigError or WeightsError that name the file and the part of it that cannot be read.
    """
    reader, values = _opened(file)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / file.stem
        folder.mkdir()
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config_json = _config_json(file, values, tied="output.weight" not in stored)
        config = config_from_hf(config_json, file=file)
        write_json(folder / "config.json", config_json)
        _write_tokenizer(file, values, folder)
        save_params(folder, config, _lazy_params(file, config, stored))
        yield folder


def _opened(file: Path) -> tuple[Any, dict[str, Any]]:
    """The library's reader, and the file's fields as plain values."""
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"{file}: GGUF files are read with the package gguf: pip install gguf") from None
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file}: not a readable GGUF file: {error}") from None
    return reader, {name: field.contents() for name, field in reader.fields.items()}


# ======================================================================================================================
# Config
# ======================================================================================================================


def _config_json(file: Path, values: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    if (kind := values.get("general.architecture")) != "llama":
        raise ConfigError(f"{file}: general.architecture is {kind!r}: of GGUF files this project reads only 'llama'")

    def get(key: str, default: Any = None) -> Any:
        value = values.get(f"llama.{key}", default)
        if value is None:
            raise ConfigError(f"{file}: key 'llama.{key}' is missing")
        return value

    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ConfigError(f"{file}: llama.rope.scaling.type is {scaling!r}: use the model's safetensors")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if values.get(key):
            raise ConfigError(f"{file}: {key} is {values[key]}: use the model's safetensors")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ConfigError(f"{file}: llama.rope.dimension_count is not the width of a head, {head_dim}")
    linear = {"rope_type": "linear", "factor": values.get("llama.rope.scaling.factor")}
    return {
        "architectures": [LLAMA.architecture],
        "model_type": LLAMA.model_type,
        "vocab_size": get("vocab_size", len(values.get("tokenizer.ggml.tokens", ())) or None),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),  # a float32 there
        "rope_theta": float(get("rope.freq_base", LLAMA.theta)),
        "rope_scaling": linear if scaling == "linear" else None,
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
    }


# ======================================================================================================================
# Weights
# ======================================================================================================================


def _lazy_params(file: Path, config: Architecture, stored: Mapping[str, Any]) -> tree.Tree:
    rows = tensors(config)
    wanted = {_gguf_name(name, n) for row in rows for n in row.slices for name in row.names(n)}
    if wanted != stored.keys():
        missing, unexpected = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
        raise WeightsError(
            f"{file}: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        )
    flat = {}
    for row in rows:
        layers = () if row.layers is None else (row.layers,)
        read = _reader_of(config, row, stored)
        flat[row.path] = LazyArray(layers + row.shape, np.dtype(np.float32), row.layers is not None, read)
    return tree.unflatten(flat)


def _reader_of(config: Architecture, row: Tensor, stored: Mapping[str, Any]) -> Any:
    from gguf import dequantize

    def read(n: int | None) -> np.ndarray:
        parts = []
        for name in row.names(n):
            tensor = stored[_gguf_name(name, n)]
            part = dequantize(tensor.data, tensor.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                part = _halves(part, config.head_dim)
            parts.append(np.asarray(part, np.float32))
        return row.to_ours(*parts)

    return read


def _gguf_name(name: str, n: int | None) -> str:
    return _NAMES[name if n is None else name.split(f".{n}.", 1)[1]].replace("{n}", str(n))


def _halves(weight: np.ndarray, dim: int) -> np.ndarray:
    """Reorders the rows of each head from pairs to halves: (a0, b0, a1, b1, ...) to (a0, a1, ..., b0, b1, ...)."""
    rows, columns = weight.shape
    return weight.reshape(rows // dim, dim // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


# ======================================================================================================================
# Tokenizer
# ======================================================================================================================


def _write_tokenizer(file: Path, values: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, cut = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _DIGITS_ALONE:
        raise ConfigError(
            f"{file}: its tokenizer is {kind!r} with {cut!r}: this project reads only 'gpt2' with "
            f"{', '.join(map(repr, _DIGITS_ALONE))}: use the model's safetensors and tokenizer files"
        )
    names = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _DIGITS_ALONE[cut] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [name for name, type_ in zip(names, values["tokenizer.ggml.token_type"]) if type_ in _CONTROL]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {f"{end}_token": values.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")}
    settings = {key: names[number] for key, number in ends.items() if number is not None}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token")),
    }
    if template := values.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "generation_config.json", {"eos_token_id": values.get("tokenizer.ggml.eos_token_id")})
