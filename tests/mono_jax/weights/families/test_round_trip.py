"""Models of every family come back bit for bit: single, sharded, tied, biased, with visual experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import DataError
from data_pipelines.special_tokens import CHAT_TOKENS, IMAGE_TOKENS, OWN_TEMPLATE
from mono_jax import tree
from mono_jax.models.presets import preset
from mono_jax.weights import readers
from mono_jax.weights.convert import Upcycling, convert
from mono_jax.weights.families.table import FAMILIES
from mono_jax.weights.hf_config import read_config
from mono_jax.weights.model_folder import read_origin
from mono_jax.weights.prompt_format import PromptFormat, prompt_to_hf
from mono_jax.weights.writers import save_hf
from tests.mono_jax.helpers import random_params
from tests.mono_jax.weights.hf_folders import assert_same_bytes, read_all

NAMES = [name for name in FAMILIES if name != "internlm2"]
VISION = {"hidden_size": 16, "patch_size": 4, "image_size": 32}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_published_files_come_back_through_a_model_folder(golden_dir: Path, tmp_path: Path, name: str):
    source = golden_dir / "families" / name
    convert(source, tmp_path / "ours")
    for folder, shard_size in (("whole", 1 << 30), ("shards", 20_000)):
        convert(tmp_path / "ours", tmp_path / folder, shard_size=shard_size)
        assert_same_bytes(read_all(tmp_path / folder), read_all(source))
        assert config_of(tmp_path / folder) == config_of(source)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "ours_again")
    assert read_config(tmp_path / "shards") == read_config(source)


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_visual_experts_are_copies_that_come_back(golden_dir: Path, tmp_path: Path, name: str, attention: bool):
    source, mono = golden_dir / "families" / name, tmp_path / "mono"
    convert(source, mono, target_kind="hf", upcycling=Upcycling(Tokenizer, VISION, attention))
    old, new = read_all(source), read_all(mono)
    vocabulary = config_of(source)["vocab_size"]
    for tensor, values in old.items():
        found = new.pop(f"language_model.{tensor}")
        np.testing.assert_array_equal(found[:vocabulary] if "embed" in tensor or "lm_head" in tensor else found, values)
    experts = {tensor.removeprefix("language_model.") for tensor in new if tensor.startswith("language_model.")}
    parts = ("mlp", "self_attn") if attention else ("mlp",)
    copied = {t for t in old if t.split(".")[3:4] and t.split(".")[3] in parts and ".o_proj" not in t}
    assert len(experts) == len(copied)
    for tensor in copied:
        module = "mlp" if ".mlp." in tensor else tensor.split(".")[-2]
        twin = tensor.replace(f".{module}.", f".{module}_ve.")
        np.testing.assert_array_equal(new[f"language_model.{twin}"], old[tensor])
    convert(mono, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    assert_same_bytes(read_all(tmp_path / "again"), read_all(mono))
    assert config_of(tmp_path / "again") == config_of(mono)
    said = config_of(mono)["llm_config"]["architectures"]
    assert said == [FAMILIES[name].architecture_with(True, attention)]


def test_a_chat_template_goes_along_and_tells_how_a_model_is_asked(golden_dir: Path, tmp_path: Path):
    """With vision, config.json gives the template; for a language model, it is recognised from the files next to it."""
    source = shutil.copytree(golden_dir / "families/qwen3", tmp_path / "source")
    assert read_origin(source).prompt == PromptFormat()
    for file in (golden_dir / "chat_templates/qwen3").iterdir():
        shutil.copyfile(file, source / file.name)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf")
    convert(source, tmp_path / "mono", target_kind="hf", upcycling=Upcycling(Tokenizer, VISION, False))
    for folder in ("source", "ours", "hf", "mono"):
        assert read_origin(tmp_path / folder).prompt == PromptFormat(OWN_TEMPLATE)
        assert (tmp_path / folder / "chat_template.jinja").is_file()
    assert config_of(tmp_path / "hf") == config_of(source) and config_of(tmp_path / "mono")["template"] == OWN_TEMPLATE
    prompt = PromptFormat("internlm2-chat", "Look.")
    assert prompt_to_hf(prompt, config_of(tmp_path / "mono"))["template"] == "internlm2-chat"
    (source / "chat_template.jinja").unlink()
    settings = config_of(source) | {"chat_template": "{{ messages }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_origin(source).prompt == PromptFormat(OWN_TEMPLATE)
    (source / "config.json").write_text(json.dumps({"model_type": "internlm2"}))
    assert read_origin(source).prompt == PromptFormat()


TOKENIZERS = {"llama": "llama3", "mistral": "mistral", "qwen2": "smollm2", "qwen3": "qwen3", "gemma3": "gemma3"}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_a_template_of_its_own_gets_image_tokens_only(golden_dir: Path, tmp_path: Path, name: str):
    """Without a template, it is prompted like Mono-InternVL and gets those tokens, too; a wrong one is refused."""
    source = shutil.copytree(golden_dir / "families" / name, tmp_path / "source")
    for file in (golden_dir / "chat_templates" / TOKENIZERS[name]).iterdir():
        shutil.copyfile(file, source / file.name)
    before = Tokenizer(source)
    convert(source, tmp_path / "own", target_kind="hf", upcycling=Upcycling(Tokenizer, VISION))
    after = Tokenizer(tmp_path / "own")
    assert after.added == before.added | {token: after.id(token) for token in IMAGE_TOKENS}
    size = max(before.vocab_size, config_of(source)["vocab_size"])
    new = sorted(after.id(token) for token in IMAGE_TOKENS if token not in before.added)
    assert new == [size + number for number in range(len(new))]
    assert read_config(tmp_path / "own").vocab_size == size + len(new)
    ChatEncoder(after, OWN_TEMPLATE).conversation([("human", "a"), ("gpt", "b")])
    if not set(CHAT_TOKENS) <= set(before.added):
        with pytest.raises(DataError, match=r"no token '<\|im_start\|>'.*set data.template.*to 'tokenizer'"):
            ChatEncoder(after, "internlm2-chat").conversation([("human", "a"), ("gpt", "b")])
    (source / "chat_template.jinja").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "fixed", target_kind="hf", upcycling=Upcycling(Tokenizer, VISION))
    fixed = Tokenizer(tmp_path / "fixed")
    assert {*CHAT_TOKENS, *IMAGE_TOKENS} <= set(fixed.added)
    ChatEncoder(fixed, "internlm2-chat").conversation([("human", "a"), ("gpt", "b")])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_biased_models_made_here(tmp_path: Path, name: str, tied: bool):
    fields = {"rope_local_theta": 1e4, "query_pre_attn_scalar": 16.0} if name == "gemma3" else {}
    changes = {"bias": True, "tie_word_embeddings": tied, "head_size": 8, **FAMILIES[name].parts, **fields}
    config = preset("tiny_lm", family=name, **changes)
    params = random_params(config)
    save_hf(tmp_path / "model", config, params)
    assert read_config(tmp_path / "model").replace(image_token_id=config.image_token_id) == config
    found = tree.flatten(readers.load_params(tmp_path / "model", config))
    for path, values in tree.flatten(params).items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)
