"""Model folders: saved models are restored on any devices, and damage is detected."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from mono_jax.errors import CheckpointError, ConfigError, WeightsError
from mono_jax.storage.places import upload
from mono_jax.weights.convert import convert
from mono_jax.weights.model_folder import (
    Origin,
    companion_files,
    find_model,
    load_model,
    model_config,
    open_model,
    read_origin,
    save_model,
)
from mono_jax.weights.prompt_format import PromptFormat
from tests.mono_jax.stored import abstract, assert_equal, flip_a_bit, largest_file, mesh

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize("streamed", [True, False])
def test_model_folder_comes_back_and_orbax_itself_restores_it(tmp_path, model, streamed):
    config, params, lazy = model
    save_model(tmp_path, config, lazy if streamed else jax.tree.map(jnp.asarray, params))
    found, loaded = load_model(tmp_path)
    assert found == config
    assert_equal(loaded, params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "params"), params)
    with ocp.StandardCheckpointer() as checkpointer:
        assert_equal(checkpointer.restore(tmp_path / "params", abstract(loaded)), params)


def test_sharded_parameters_are_saved_and_placed(place, model):
    config, params, _ = model
    devices = mesh(4, 1)
    shardings = jax.tree.map(
        lambda x: jax.NamedSharding(devices, P(*[None] * (x.ndim - 1), None if x.shape[-1] % 4 else "x")), params
    )
    save_model(place / "a", config, params)
    _, placed = load_model(place / "a", shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    save_model(place / "b", config, placed)
    assert_equal(load_model(place / "b")[1], params)


def test_dtype_is_cast_when_asked_for(place, model):
    config, params, lazy = model
    save_model(place, config, lazy)
    assert_equal(load_model(place, jnp.bfloat16)[1], jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params))


def test_huggingface_folder_is_loaded_directly(golden_dir, model):
    config, params, _ = model
    found, loaded = load_model(golden_dir / "mono_tiny", image_token_id=100)
    assert found == config
    assert_equal(loaded, params)


def test_saving_again_replaces_the_model_and_copies_extra_files(place, tmp_path, model):
    config, params, lazy = model
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    folder = place / "model"
    save_model(folder, config, lazy)
    changed = jax.tree.map(lambda x: x + 1, params)
    save_model(
        folder,
        config,
        changed,
        extra_files=[tmp_path / "tokenizer.model"],
        origin=Origin(names={"final_norm/scale": "n"}),
    )
    assert_equal(load_model(folder)[1], changed)
    assert (folder / "tokenizer.model").read_bytes() == b"pieces"
    assert open_model(folder)[2] == {"final_norm/scale": "n"}


def test_folders_that_are_no_models(tmp_path, model):
    config, params, lazy = model
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"empty: not a model folder: it has no model\.json"):
        load_model(tmp_path / "empty")
    folder = tmp_path / "model"
    save_model(folder, config, lazy)
    (folder / "config.json").write_text("{}")
    file = folder / "model.json"
    values = json.loads(file.read_text())
    for changes, message in (
        ({"format": 99}, "format is 99, this version reads 2"),
        ({"model": values["model"] | {"hiden_size": 3}}, "did you mean 'hidden_size'"),
        ({"model": values["model"] | {"remat": "some"}}, r"model\.json.*remat"),
    ):
        file.write_text(json.dumps(values | changes))
        with pytest.raises(ConfigError, match=message):
            load_model(folder)
    file.write_text(json.dumps(values | {"model": values["model"] | {"intermediate_size": 64}}))
    with pytest.raises(
        WeightsError, match=r"feed_forward/gate/kernel is \[3, 48, 96\], the config asks for \[3, 48, 64\]"
    ):
        load_model(folder)
    file.unlink()  # as left by an interrupted save
    with pytest.raises(WeightsError, match=r"not a model folder: it has no model\.json"):
        load_model(folder)
    del params["projector"]
    with pytest.raises(WeightsError, match="6 missing"):
        save_model(folder, config, params)


def test_a_folder_in_a_bucket_may_be_a_huggingface_one(bucket, golden_dir, tmp_path, monkeypatch, capsys):
    """Its files are fetched once; a model converted there and back is the same."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    upload(golden_dir / "mono_tiny", bucket / "hf", last=())
    config, expected = load_model(golden_dir / "mono_tiny")
    for _ in range(2):
        assert load_model(bucket / "hf")[0] == config
    assert capsys.readouterr().err.count("fetching") == 1
    report = convert(str(bucket / "hf"), str(bucket / "model"))
    assert report["dst"] == str(bucket / "model")
    assert_equal(load_model(bucket / "model")[1], expected)
    convert(str(bucket / "model"), str(bucket / "back"))
    assert_equal(load_model(bucket / "back")[1], expected)
    assert {file.name for file in companion_files(bucket / "model")} == {
        file.name for file in companion_files(golden_dir / "mono_tiny")
    }
    with pytest.raises(ConfigError, match=f"^{bucket}/back: exists and is not empty"):
        convert(str(bucket / "hf"), str(bucket / "back"))


@pytest.mark.parametrize("lost", [True, False])
def test_damaged_model_folders(place, model, lost):
    """zarr reads a missing chunk as zeros, which must not be accepted as weights."""
    config, _, lazy = model
    save_model(place, config, lazy)
    chunk = largest_file(place / "params" / "layers.attention.wqkv.kernel")
    if lost:
        chunk.unlink()
    else:
        flip_a_bit(chunk)
    with pytest.raises(WeightsError, match=r"layers\.attention\.wqkv\.kernel/.* (is missing|has changed)"):
        load_model(place)


def test_a_model_that_cannot_be_written_is_one_line(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/m.*was not saved") as caught:
        save_model(tmp_path / "file" / "m", model[0], model[2])
    assert "\n" not in str(caught.value)


def test_folders_of_the_first_format_are_read(tmp_path, model):
    """It also contained how the model was computed; that is ignored."""
    config, params, lazy = model
    save_model(tmp_path, config, lazy)
    file = tmp_path / "model.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"format": 1, "model": values["model"] | {"remat": "full"}}))
    found, loaded = load_model(tmp_path)
    assert found == config
    assert_equal(loaded, params)


def test_a_workdir_stands_for_its_model(place, model, golden_dir):
    config, params, lazy = model
    workdir = place / "run"
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "checkpoints" / "file").touch()  # in a bucket there are no empty folders
    (workdir / "config.json").write_text("{}")
    for read in (load_model, open_model, model_config):
        with pytest.raises(WeightsError, match="run: the workdir of a run that has no model yet"):
            read(workdir)
    save_model(workdir / "model", config, lazy)
    assert find_model(workdir) == find_model(workdir / "model") == workdir / "model"
    assert model_config(workdir) == config
    assert_equal(load_model(workdir)[1], params)
    with pytest.raises(WeightsError, match=f"several stages: use one of them: {workdir}"):
        open_model(place)
    assert find_model(golden_dir / "mono_tiny") == golden_dir / "mono_tiny"


def test_what_a_model_was_trained_with_is_kept(place, model):
    origin = Origin({"model_type": "x"}, PromptFormat("internlm2-chat", "Look.", 1, 2, False), "bfloat16", {})
    save_model(place, model[0], model[2], origin=origin)
    assert read_origin(place) == origin
    values = json.loads((place / "model.json").read_text())
    values["prompt"]["max_tile"] = 3
    (place / "model.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model\.json: .*max_tile"):
        read_origin(place)


def test_companions_of_a_model_and_of_a_tokenizer_of_its_own(tmp_path):
    init, tokenizer = tmp_path / "init", tmp_path / "tokenizer"
    for folder, names in (
        (init, ("tokenizer.model", "generation_config.json", "preprocessor_config.json", "modeling_mono.py", "a.bin")),
        (tokenizer, ("tokenizer.json", "generation_config.json", "chat_template.jinja")),
    ):
        folder.mkdir()
        for name in (*names, "config.json", "model.safetensors"):
            (folder / name).write_text(name)
    assert companion_files(init) == [
        init / name
        for name in ("generation_config.json", "modeling_mono.py", "preprocessor_config.json", "tokenizer.model")
    ]
    assert companion_files(init, tokenizer) == [
        tokenizer / "chat_template.jinja",
        init / "generation_config.json",
        init / "modeling_mono.py",
        init / "preprocessor_config.json",
        tokenizer / "tokenizer.json",
    ]
