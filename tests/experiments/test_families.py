"""Every family of language models, from one Hugging Face folder to another: vision, two stages, answer, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.special_tokens import OWN_TEMPLATE
from experiments import convert, generate
from mono_jax import tree
from mono_jax.models.presets import preset
from mono_jax.runs.config import RunConfig
from mono_jax.runs.stage import run_stage
from mono_jax.weights.families.table import FAMILIES
from mono_jax.weights.model_folder import load_model
from mono_jax.weights.writers import save_hf
from tests.mono_jax.helpers import random_params

WINDOW = {"sliding_window": 40, "sliding_layers": (0,)}
LLAMA3 = {"type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GROUPED = {"experts": "grouped", "experts_kernel": "ragged", "experts_block": 16}
# Family: its golden tokenizer, what its model has besides the family's defaults, and how it is computed.
TABLE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "internlm2": ("chat", {}, {}),
    "llama": (
        "chat_templates/llama3",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "tie_word_embeddings": True},
        {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}},
    ),
    "mistral": ("chat_templates/mistral", {"sliding_window": 40, "sliding_layers": (0, 1)}, {}),
    "qwen2": ("chat_templates/smollm2", {}, {"execution": {"remat": "dots"}}),
    "qwen3": ("chat_templates/qwen3", {"head_size": 24}, {"execution": GROUPED}),
    "gemma3": (
        "chat_templates/gemma3",
        WINDOW | {"rope_local_theta": 1e4, "query_pre_attn_scalar": 16.0, "head_size": 8},
        {"execution": GROUPED, "mesh": {"data": 4, "fsdp": 1, "tensor": 2}},
    ),
}


def test_the_table_has_all_families():
    assert TABLE.keys() == FAMILIES.keys()


def base_model(folder: Path, family: str, tokenizer: Path, fields: dict[str, Any]) -> None:
    """A Hugging Face folder: a random model of two layers with its tokenizer."""
    shutil.copytree(tokenizer, folder)
    size = Tokenizer(folder).vocab_size
    config = preset("tiny_lm", family=family, vocab_size=size, **{**FAMILIES[family].parts, **fields})
    save_hf(folder, config, random_params(config, size=0.05))


def stage(name: str, folder: str, init: Path | str, sets: dict[str, Any], **changes: Any) -> RunConfig:
    data = {"tokenizer": str(init), "batch_size": 8, "visual_tokens": 64, "text_tokens": 448, "block_samples": 64}
    data |= {"sources": sets["stages"][folder]["sources"], "max_tiles": 1, **changes.pop("data")}
    values = {"stage": name, "steps": 2, "init": str(init), "dtype": "float32", "frozen_dtype": "float32"}
    return RunConfig.from_dict(values | {"data": data, "log_every": 1, "checkpoint_every": 2} | changes)


def answer(model: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    flags = [f"--model={model}", f"--image={picture}", "--prompt=What is it?", "--dtype=float32", "--json"]
    generate.main([*flags, "--max_new_tokens=8"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])["turns"][0]


@pytest.mark.slow
@pytest.mark.parametrize("family", TABLE)
def test_from_a_language_model_to_one_that_sees(
    family: str, sets: dict[str, Any], golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer, fields, options = TABLE[family]
    template = {} if family == "internlm2" else {"template": OWN_TEMPLATE}
    base_model(tmp_path / "base", family, golden_dir / tokenizer, fields)
    vision = [
        f"--vision.{name}={value}" for name, value in (("hidden_size", 16), ("patch_size", 8), ("image_size", 64))
    ]
    embed = ["--embed_experts", "--attention_experts", *vision]
    convert.main([*embed, str(tmp_path / "base"), str(tmp_path / "mono")])

    losses, init = [], tmp_path / "mono"
    for name, folder in (("S1.1++", "s1_1"), ("S2++", "s2")):
        workdir = tmp_path / folder
        run_stage(stage(name, folder, init, sets, data=template, **options), workdir, say=lambda text: None)
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        losses += [record["loss"] for record in records if "loss" in record]
        init = workdir / "model"
    assert len(losses) == 4 and np.isfinite(losses).all()

    before, after = (tree.flatten(load_model(folder)[1]) for folder in (tmp_path / "mono", init))
    assert {path for path in before if np.array_equal(before[path], after[path])} <= {"vision/class_embedding"}
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(picture)
    found = answer(init, picture, capsys)
    assert found["visual_tokens"] == 16 and found["finish"] in ("stop", "length")

    convert.main(["--to=hf", str(init), str(tmp_path / "hf")])
    exported = tree.flatten(load_model(tmp_path / "hf")[1])
    assert exported.keys() == after.keys() and all(np.array_equal(exported[path], after[path]) for path in after)
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert values["model_type"] == "mono_jax" and values["architecture"]["family"] == family
    assert values["template"] == template.get("template", "internlm2-chat")
    timing = {"seconds", "seconds_to_first_token"}
    again = answer(tmp_path / "hf", picture, capsys)
    assert {k: v for k, v in again.items() if k not in timing} == {k: v for k, v in found.items() if k not in timing}
