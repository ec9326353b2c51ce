"""The exported model has what the run trained with: prompt format, dtypes, companions, and exact frozen weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.special_tokens import IMAGE_CONTEXT
from experiments import generate
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.evaluation.questions import Question, to_prompt
from mono_jax.generation import chat
from mono_jax.models.architecture import Architecture
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import RunConfig
from mono_jax.runs.stage import run_stage
from mono_jax.training.groups import groups_of
from mono_jax.weights.convert import convert
from mono_jax.weights.model_folder import open_model, read_origin, save_model
from mono_jax.weights.prompt_format import PromptFormat
from mono_jax.weights.writers import save_hf

pytestmark = pytest.mark.usefixtures("one_device")

BASE = {"hidden_size": 32, "vision": {"hidden_size": 16, "patch_size": 8, "image_size": 64}}


def hf_folder(folder: Path, sets: dict[str, Any], dtype: str) -> Path:
    """A tiny model in Hugging Face form with the sets' tokenizer, that answers with 6 tiles and its own system turn."""
    tokenizer = Tokenizer(sets["tokenizer"])
    config = preset("tiny_mono", vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.id(IMAGE_CONTEXT))
    values = config.to_dict()
    config = type(config).from_dict(values | BASE)
    rng = np.random.default_rng(0)
    shapes = Model(config).abstract_params()
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.05).astype(jax.numpy.dtype(dtype)), shapes)
    save_hf(folder, config, params)
    source = Path(sets["tokenizer"])
    for file in (source if source.is_dir() else source.parent).iterdir():
        shutil.copy(file, folder)
    for name in ("generation_config.json", "preprocessor_config.json"):
        (folder / name).write_text('{"eos_token_id": 2}')
    (folder / "modeling_mono.py").write_text("")
    return folder


def settings(sets: dict[str, Any], init: Path, **changes: Any) -> dict[str, Any]:
    data = {
        "sources": sets["stages"]["s1_1"]["sources"],
        "tokenizer": sets["tokenizer"],
        "system_message": "You see.",
        "max_tiles": 2,
        "batch_size": 2,
        "visual_tokens": 64,
        "text_tokens": 96,
        "block_samples": 64,
    }
    values = {"stage": "S1.1", "steps": 2, "init": str(init), "dtype": "float32", "log_every": 1, "data": data}
    return values | {"mesh": {"data": 1, "fsdp": -1}} | changes


def run(values: dict[str, Any], workdir: Path) -> Path:
    return Path(run_stage(RunConfig.from_dict(values), workdir, say=lambda line: None)["model"])


def stored(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(open_model(folder)[1]).items()}


def frozen_paths(folder: Path) -> list[str]:
    config, params, _ = open_model(folder)
    groups = groups_of(config, params)
    return [path for path in groups if groups[path] not in ("visual_embedding", "visual_experts")]


def assert_same_bytes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], paths: list[str]) -> None:
    assert paths
    for path in paths:
        assert found[path].dtype == expected[path].dtype, path
        assert found[path].tobytes() == expected[path].tobytes(), path


@pytest.fixture(scope="module")
def trained(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(Hugging Face folder, workdir of a run from it, the run's config)."""
    folder = tmp_path_factory.mktemp("trained")
    init = hf_folder(folder / "init", sets, "float32")
    values = settings(sets, init)
    run(values, folder / "run")
    return init, folder / "run", values


def prompts_of(model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The input that generate.py passes to the model."""
    seen: list[Any] = []
    original = chat.Chat._prompt
    monkeypatch.setattr(chat.Chat, "_prompt", lambda self, *args: seen.append(original(self, *args)) or seen[-1])
    generate.main([f"--model={model}", f"--image={picture}", "--prompt=what is this", "--max_new_tokens=1"])
    return seen[0]


@pytest.mark.parametrize("form", ["workdir", "model", "export"])
def test_generate_asks_as_the_run_trained(
    trained: tuple[Path, Path, dict[str, Any]],
    form: str,
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    _, workdir, values = trained
    model = {"workdir": workdir, "model": workdir / "model", "export": tmp_path / "hf"}[form]
    if form == "export":
        convert(workdir, model)
    prompt = prompts_of(model, picture, monkeypatch)
    config = RunConfig.from_dict(values)
    builder = SampleBuilder(config.data, geometry=architecture_of(config).geometry)
    expected = to_prompt(builder, Question("q", picture, (("human", "what is this"),), "", ""))
    np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)
    np.testing.assert_array_equal(prompt.patches, expected.patches)
    assert len(prompt.patches) == 3 * 16  # two tiles and the thumbnail


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A wide picture: six tiles if the model may have them."""
    from PIL import Image

    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 384, 3), np.uint8)).save(path)
    return path


def test_companions_and_settings_of_the_run_leave_with_the_model(
    trained: tuple[Path, Path, dict[str, Any]], tmp_path: Path
):
    _, workdir, values = trained
    origin = read_origin(workdir / "model")
    assert origin.prompt == PromptFormat.of(RunConfig.from_dict(values).data)
    assert origin.dtype == "float32"
    convert(workdir, tmp_path / "hf")
    for folder in (workdir / "model", tmp_path / "hf"):
        values = json.loads((folder / "config.json").read_text())
        assert (values["max_dynamic_patch"], values["system_message"]) == (2, "You see.")
        assert (values["torch_dtype"], values["template"]) == ("float32", "internlm2-chat")
        for name in ("generation_config.json", "preprocessor_config.json", "modeling_mono.py", "tokenizer.model"):
            assert (folder / name).is_file()


@pytest.mark.parametrize(
    ("dtype", "on_device"), [("float32", "source"), ("float16", "source"), ("float16", "bfloat16")]
)
def test_frozen_weights_leave_byte_for_byte(sets: dict[str, Any], tmp_path: Path, dtype: str, on_device: str):
    init = hf_folder(tmp_path / "init", sets, dtype)
    values = settings(sets, init, frozen_dtype=on_device)
    model = run(values, tmp_path / "run")
    before, after = stored(init), stored(model)
    frozen = frozen_paths(init)
    assert_same_bytes(after, before, frozen)
    for path in set(before) - set(frozen):
        assert after[path].dtype == np.dtype(dtype), path
        assert after[path].tobytes() != before[path].tobytes() or "bias" in path or "class_embedding" in path, path


def test_frozen_weights_leave_byte_for_byte_after_resuming(sets: dict[str, Any], tmp_path: Path):
    """From the stored base: the devices hold them in bfloat16 only."""
    init = hf_folder(tmp_path / "init", sets, "float32")
    values = settings(sets, init, frozen_dtype="bfloat16")
    once = stored(run(values, tmp_path / "once"))
    assert_same_bytes(once, stored(init), frozen_paths(init))
    run(values | {"steps": 1}, tmp_path / "twice")
    assert_same_bytes(stored(run(values, tmp_path / "twice")), once, list(once))


@pytest.mark.slow
def test_weights_cast_at_load_train_as_weights_cast_at_use(sets: dict[str, Any], tmp_path: Path):
    """With bfloat16 activations it makes no difference where float32 weights are rounded."""
    init = hf_folder(tmp_path / "init", sets, "float32")
    models = [
        stored(run(settings(sets, init, frozen_dtype=kind, dtype="bfloat16"), tmp_path / kind))
        for kind in ("source", "bfloat16")
    ]
    for path in models[0]:
        np.testing.assert_allclose(models[0][path], models[1][path], atol=1e-4)


@pytest.mark.slow
def test_masters_leave_where_asked_for(sets: dict[str, Any], tmp_path: Path):
    init = hf_folder(tmp_path / "init", sets, "bfloat16")
    masters = run(settings(sets, init, save_dtype="float32"), tmp_path / "masters")
    found, frozen = stored(masters), frozen_paths(init)
    assert {str(leaf.dtype) for path, leaf in found.items() if path not in frozen} == {"float32"}
    assert_same_bytes(found, stored(init), frozen)
    # A stage that continues from them saves in the dtype of the base from which all descend.
    last = stored(run(settings(sets, masters), tmp_path / "last"))
    assert {str(leaf.dtype) for leaf in last.values()} == {"bfloat16"}
    rounded = run(settings(sets, init), tmp_path / "rounded")
    for path, leaf in stored(rounded).items():
        assert leaf.tobytes() == found[path].astype(leaf.dtype).tobytes(), path


def test_frozen_layers_of_partly_trained_weights(sets: dict[str, Any], tmp_path: Path):
    init = hf_folder(tmp_path / "init", sets, "float32")
    values = settings(sets, init, trains=["visual_experts[1:2]"], frozen_dtype="bfloat16")
    before, after = stored(init), stored(run(values, tmp_path / "run"))
    path = "layers/visual_feed_forward/gate/kernel"
    assert after[path][0].tobytes() == before[path][0].tobytes()
    assert after[path][1].tobytes() != before[path][1].tobytes()
    assert_same_bytes(after, before, frozen_paths(init))


def test_clipping_may_be_turned_on_and_off_on_resume(sets: dict[str, Any], tmp_path: Path):
    init = hf_folder(tmp_path / "init", sets, "float32")
    for steps, norm in ((1, 0.0), (2, 1.0)):
        run(settings(sets, init, steps=steps, optim={"clip_norm": norm}), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "model" / "step.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 5000}, r"vocab_size is 5000, but the weights in .* have \d+: grow it first: .*=5000"),
        ({"vocab_size": 1030}, r"vocab_size is 1030, but the weights in .* have \d+: leave the key out"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the weights in .* have 2"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4},
            "num_attention_heads is 8, but the weights in .* have 4",
        ),
        ({"intermediate_size": 64}, "intermediate_size is 64, but the weights in .* have 128"),
        ({"hidden_size": 64}, "hidden_size is 64, but the weights in .* have 32"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, but the weights in .* have False"),
        ({"bias": True}, "bias is True, but the weights in .* have False"),
        ({"visual_attention_experts": True}, "visual_attention_experts is True.*--embed_experts"),
        ({"vision": {"patch_size": 4}}, r"vision\.patch_size is 4, but the weights in .* have 8"),
        ({"preset": "mono_internvl_2b"}, r"preset is 'mono_internvl_2b', but config\.init .* is another model"),
        ({"preset": "tiny_modular"}, "preset is 'tiny_modular', but config.init"),
    ],
)
def test_weights_of_other_shapes_are_refused_before_the_first_step(
    trained: tuple[Path, Path, dict[str, Any]], changes: dict[str, Any], message: str
):
    _, workdir, values = trained
    for init in (values["init"], str(workdir)):
        with pytest.raises(ConfigError, match=message) as caught:
            architecture_of(RunConfig.from_dict(values | {"init": init, "model": changes}))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rope_theta": 5e5}, "rope_theta is 1000000.0 in the preset, 500000.0 in init"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-05 in the preset, 1e-06 in init"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is None in the preset, .*factor"),
        ({"max_position_embeddings": 64}, "max_position_embeddings is 512 in the preset, 64 in init"),
        ({"vision": {"ps_version": "v1"}}, "vision.ps_version is v2 in the preset, v1 in init"),
    ],
)
def test_a_preset_that_differs_from_the_weights_in_any_key_is_refused(
    trained: tuple[Path, Path, dict[str, Any]], other: dict[str, Any], message: str, tmp_path: Path
):
    _, _, values = trained
    config, params, _ = open_model(values["init"])
    fields = config.to_dict()
    fields["vision"] |= other.get("vision", {})
    save_model(tmp_path, Architecture.from_dict(fields | {**other, "vision": fields["vision"]}), params)
    named = {"preset": "tiny_mono", "vocab_size": config.vocab_size, **BASE}
    with pytest.raises(ConfigError, match=message):
        architecture_of(RunConfig.from_dict(values | {"init": str(tmp_path), "model": named}))
    if "vision" not in other:
        architecture_of(RunConfig.from_dict(values | {"init": str(tmp_path), "model": named | other}))


def test_changes_that_the_weights_allow(trained: tuple[Path, Path, dict[str, Any]]):
    _, _, values = trained
    changes = {"rope_theta": 5e5, "max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    config = architecture_of(RunConfig.from_dict(values | {"model": changes}))
    assert (config.rope_theta, config.max_position_embeddings) == (5e5, 64)
    vocabulary = architecture_of(RunConfig.from_dict(values)).vocab_size
    named = {"preset": "tiny_mono", "vocab_size": vocabulary, **BASE}
    assert architecture_of(RunConfig.from_dict(values | {"model": named})).vocab_size == vocabulary
