"""GGUF files: what llama.cpp's writer stores in one is read as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from data_pipelines.encoding.tokenizer import Tokenizer  # noqa: E402
from mono_jax.errors import ConfigError, WeightsError  # noqa: E402
from mono_jax.models.architecture import Architecture  # noqa: E402
from mono_jax.models.presets import preset  # noqa: E402
from mono_jax.weights.convert import convert  # noqa: E402
from mono_jax.weights.hf_config import read_config  # noqa: E402
from mono_jax.weights.writers import named_tensors  # noqa: E402
from tests.mono_jax.helpers import random_params  # noqa: E402
from tests.mono_jax.weights.hf_folders import read_all  # noqa: E402

PLACES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_there(name: str) -> str:
    """The name that llama.cpp gives the tensor ``name``."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{PLACES[stem]}.weight"
    number, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{PLACES[part]}.weight"


def as_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def letters() -> list[str]:
    """The 256 characters that stand for bytes in GPT-2's vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write(file: Path, config: Architecture, tensors: Mapping[str, np.ndarray], **changes: Any) -> Path:
    writer = gguf.GGUFWriter(file, changes.get("architecture", "llama"))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters(), "ab", "Ġab", "12"]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if scaling := changes.get("scaling"):
        writer.add_rope_scaling_type(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "Ġ ab", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, values in tensors.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((count for part, count in heads.items() if part in name), None)
        writer.add_tensor(name_there(name), np.ascontiguousarray(as_pairs(values, count) if count else values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("tied", [False, True])
def test_a_file_becomes_a_folder(tmp_path: Path, tied: bool):
    config = preset("tiny_lm", family="llama", vocab_size=262, rope_theta=5e4, tie_word_embeddings=tied)
    tensors = named_tensors(config, random_params(config))
    file = write(tmp_path / "tiny.gguf", config, tensors)
    report = convert(file, tmp_path / "hf", target_kind="hf")
    assert (report["from"], report["src"]) == ("gguf", str(file))
    assert read_config(tmp_path / "hf").replace(image_token_id=config.image_token_id) == config
    found = read_all(tmp_path / "hf")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    tokenizer = Tokenizer(tmp_path / "hf")
    ids = tokenizer.encode("ab ab 12<|im_end|>")
    assert [tokenizer.decode([n]) for n in ids] == ["ab", " ab", " ", "1", "2", "<|im_end|>"]  # digits are split
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    convert(file, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "model.json").read_text())["model"]["family"] == "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"pre": "llama-bpe"}, "its tokenizer is 'gpt2' with 'llama-bpe'"),
        ({"scaling": "yarn"}, "rope.scaling.type is"),
    ],
)
def test_files_that_are_not_read_say_why(tmp_path: Path, changes: dict[str, Any], message: str):
    config = preset("tiny_lm", family="llama", vocab_size=262)
    if "scaling" in changes:
        changes = {"scaling": gguf.RopeScalingType.YARN}
    file = write(tmp_path / "tiny.gguf", config, named_tensors(config, random_params(config)), **changes)
    with pytest.raises(ConfigError, match=message):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_and_tensors_that_do_not_fit(tmp_path: Path):
    (tmp_path / "text.gguf").write_text("no such format at all")
    with pytest.raises(WeightsError, match="not a readable GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "out")
    config = preset("tiny_lm", family="llama", vocab_size=262)
    tensors = named_tensors(config, random_params(config))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(WeightsError, match=r"1 tensors missing \['blk.1.ffn_up.weight'\]"):
        convert(write(tmp_path / "tiny.gguf", config, tensors), tmp_path / "out")
