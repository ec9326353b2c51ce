"""experiments/inspect_model.py on a tiny model with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.special_tokens import IMAGE_CONTEXT
from experiments import inspect_model as command
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.model_folder import Origin, companion_files, save_model
from mono_jax.weights.prompt_format import PromptFormat


def saved(folder: Path, sets: dict[str, Any], **changes: Any) -> str:
    tokenizer = Tokenizer(sets["tokenizer"])
    vision = VisionConfig(hidden_size=32, patch_size=8, image_size=64)
    options = {"vocab_size": tokenizer.vocab_size, "image_token_id": tokenizer.id(IMAGE_CONTEXT), "vision": vision}
    config = preset("tiny_mono", **(options | changes))
    files = companion_files(sets["tokenizer"])
    origin = Origin(None, PromptFormat(max_tiles=1, system_message=""), "float32")
    save_model(folder, config, Model(config).init(jax.random.key(0)), extra_files=files, origin=origin)
    return str(folder)


UNITS = {"rms", "dead", "tokens", "overlap_with_all"}


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_figures_and_a_page_with_pictures(
    sets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], native: bool
):
    vision = VisionConfig(hidden_size=32, patch_size=8, image_size=64, native=native)
    model, asked = saved(tmp_path / "model", sets, vision=vision), sets["heldout"]["questions"]
    page = tmp_path / "inside.html"
    flags = [f"--model={model}", f"--base={model}", f"--questions={asked['path']}", f"--images={asked['image_root']}"]
    command.main([*flags, "--limit=1", f"--html={page}", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    kinds = {json.loads(line)["kind"] for line in Path(asked["path"]).read_text().splitlines()}
    assert set(result["kinds"]) == kinds and result["questions"] == len(kinds)
    assert result["distances"]["gate"]["text"] == [0, 0] and result["distances"]["gate"]["visual"][0] > 0.5
    assert len(result["attention"]["text_to_visual"]) == 2 and len(result["gap"]) == 3
    assert result["sizes"] == {} and set(result["kinds"]["color"]["visual"]) == UNITS
    assert page.read_text().count("data:image/png;base64,") == 5
    with pytest.raises(ConfigError, match="takes no images"):
        plain = saved(tmp_path / "plain", sets, vision=None, visual_ffn_experts=False)
        command.main([f"--model={plain}", *flags[2:]])


def test_images_at_several_sizes_and_questions_of_several_files(
    sets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, asked, page = saved(tmp_path / "model", sets), sets["heldout"]["questions"], tmp_path / "inside.html"
    files = [f"first={asked['path']}", f"second={asked['path']}"]
    flags = [f"--model={model}", "--limit=2", "--json", "--questions", *files]
    sizes = ["--images", asked["image_root"], "--sizes", "32", "128", "--max_tiles=4", f"--html={page}"]
    command.main([*flags, *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["questions"] == 4 and set(result["kinds"]) == {"first", "second"}
    assert list(result["sizes"]) == ["32 px, 16 tokens", "128 px, 80 tokens"], "four tiles and the thumbnail"
    assert [size["visual"]["tokens"] for size in result["sizes"].values()] == [4 * 16, 4 * 80]
    first, second = (result["kinds"][name]["visual"] for name in ("first", "second"))
    assert first == second and set(first) == UNITS and all(0 <= share <= 1 for share in first["dead"])
    assert "32 px, 16 tokens: 64" in page.read_text()
    with pytest.raises(ConfigError, match="3 folders for 2 files"):
        command.main([*flags, "--images", "a", "b", "c"])
