"""The project's own layout: which models get it, its round trip, and what it rejects. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.strict.fields import rule_of
from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.generation.options import default_sampling
from mono_jax.hf_export.layout import CODE, write_files
from mono_jax.hf_export.tokenizer_files import write_tokenizer
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.models.presets import preset
from mono_jax.weights import readers
from mono_jax.weights.convert import convert
from mono_jax.weights.hf_config import config_to_hf, has_published_layout, own_config, read_config
from mono_jax.weights.model_folder import read_origin
from mono_jax.weights.prompt_format import PromptFormat
from tests.mono_jax.hf_export.exports import CASES, export
from tests.mono_jax.weights.hf_folders import assert_same_bytes, read_all, write_mono


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_as_it_was(golden_dir: Path, tmp_path: Path, name: str):
    model = export(tmp_path, golden_dir, name)
    assert read_config(model.folder) == model.config
    assert read_origin(model.folder).prompt == model.form
    found = tree.flatten(readers.load_params(model.folder, model.config))
    for path, values in tree.flatten(model.params).items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)
    convert(model.folder, tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf2", own_layout=write_files)
    assert_same_bytes(read_all(tmp_path / "hf2"), read_all(model.folder))
    names = {file.name for file in model.folder.iterdir()}
    assert names == {file.name for file in (tmp_path / "hf2").iterdir()}
    same, *others = filecmp.cmpfiles(model.folder, tmp_path / "hf2", names, shallow=False)
    assert not any(others) and {*same} == names


def test_only_models_without_a_published_layout_get_it(golden_dir: Path, tmp_path: Path):
    published = ("internlm2_1_8b", "mono_internvl_2b", "internvl_1_5_2b", "tiny_lm")
    assert all(has_published_layout(preset(name)) for name in published)
    assert has_published_layout(preset("tiny_modular", family="qwen2", qkv_bias=True))
    assert not has_published_layout(preset("mono_internvl_1_5_2b"))
    assert not has_published_layout(preset("tiny_mono", family="llama"))
    assert not has_published_layout(preset("tiny_mono", bidirectional_images=True))
    source = write_mono(tmp_path / "source", golden_dir)
    convert(source, tmp_path / "ours")
    for layout in ("auto", "published"):
        report = convert(tmp_path / "ours", tmp_path / layout, layout=layout, own_layout=write_files)
        assert "layout" not in report and not list((tmp_path / layout).glob("*.py"))
        assert_same_bytes(read_all(tmp_path / layout), read_all(source))
    report = convert(tmp_path / "ours", tmp_path / "own", layout="own", own_layout=write_files)
    assert report["layout"] == "own"
    assert_same_bytes(read_all(tmp_path / "own"), read_all(source))
    assert {file.name for file in (tmp_path / "own").glob("*.py")} == {file.name for file in CODE.glob("*.py")}
    convert(tmp_path / "own", tmp_path / "back", target_kind="hf", layout="published")
    first, back = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "back"))
    assert back["llm_config"]["architectures"] == first["llm_config"]["architectures"]
    assert read_config(tmp_path / "back") == read_config(source)


def test_generation_is_asked_for_as_by_us(golden_dir: Path, tmp_path: Path):
    """Greedy decoding, no placeholders, and the end tokens."""
    model = export(tmp_path, golden_dir, "internlm2")
    values = json.loads((model.folder / "generation_config.json").read_text())
    assert values["suppress_tokens"] == [model.config.image_token_id] and values["do_sample"] is False
    ends = {model.tokenizer.eos, *(model.tokenizer.added[name] for name in ("<|im_start|>", "<|im_end|>"))}
    assert {*default_sampling(model.folder).stop_tokens} == {*values["eos_token_id"]} == ends


# Fields that the code does not use: alternative spellings, and those rejected with vision.kind 'intern_vit'.
UNREAD = {"kind"} | {
    spec.name for spec in dataclasses.fields(VisionConfig) if rule_of(spec).help.startswith("InternViT: ")
}


@pytest.mark.parametrize("section", [Architecture, VisionConfig])
def test_the_code_reads_every_option_of_a_model(section: type):
    """The exported code reads everything that the computation depends on, and the exported config.json has it."""
    source = "".join(file.read_text() for file in CODE.glob("*.py"))
    asked = set(re.findall(r"\b[av](?:\.|, \")(\w+)", source))
    names = {spec.name for spec in dataclasses.fields(section)}
    assert names - asked - UNREAD == set()
    config = preset("tiny_mono_1_5", family="qwen3", qk_norm=True)
    native = config.replace(vision=dataclasses.replace(config.vision, native=True))
    said = own_config(native, PromptFormat(), "float32")["architecture"]
    assert names <= set(said if section is Architecture else said["vision"])


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("vision.native", {"vision": dataclasses.replace(preset("tiny_mono").vision, native=True)}),
        ("bidirectional_images", {"bidirectional_images": True}),
        ("visual_attention_experts", {"visual_attention_experts": True, "visual_ffn_experts": False}),
    ],
)
def test_what_no_published_layout_says_comes_back_by_our_own(
    golden_dir: Path, tmp_path: Path, change: str, fields: dict[str, Any]
):
    config = preset("tiny_mono", **fields)
    assert not has_published_layout(config)
    with pytest.raises(ConfigError, match=f"{change} .*no published layout.*--layout=own"):
        config_to_hf(config)
    model = export(tmp_path, golden_dir, "internlm2", **fields)
    assert read_config(model.folder) == model.config
    convert(model.folder, tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf2", own_layout=write_files)
    assert_same_bytes(read_all(tmp_path / "hf2"), read_all(model.folder))
    for name in ("config.json", "processor_config.json"):
        assert (tmp_path / "hf2" / name).read_bytes() == (model.folder / name).read_bytes()


def test_a_modular_model_is_refused():
    with pytest.raises(ConfigError, match="'intern_vit' has the published layout only"):
        own_config(preset("tiny_modular"), PromptFormat(), "float32")


def test_an_id_that_tokenizer_json_cannot_say_is_refused(golden_dir: Path, tmp_path: Path):
    """The vocabulary of a Unigram model is a list, so no token can be beyond its end."""
    from data_pipelines.encoding.tokenizer import Tokenizer

    tokenizer = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": tokenizer}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<img>": 9}))
    with pytest.raises(WeightsError, match=r"the id of '<img>' is 9, but tokenizer.json can only give it 2"):
        write_tokenizer(tmp_path, Tokenizer(tmp_path), PromptFormat())
