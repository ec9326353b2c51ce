"""The convert command: bit-exact both ways, visual experts embedded in dense models, one-line errors."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.batch import BatchSpec
from data_pipelines.encoding.tokenizer import Tokenizer
from experiments import convert
from mono_jax import cli, tree
from mono_jax.checkpoints import checkpoint
from mono_jax.models.architecture import preset
from mono_jax.models.transformer import Model
from mono_jax.weights import hf

SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def run(*argv: Any) -> None:
    convert.main([str(argument) for argument in argv])


def fails(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """The one line that the command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: run(*argv))
    assert caught.value.code == cli.USER_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_folder(found: Path, expected: Path) -> None:
    a, b = tensors_of(found), tensors_of(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes()
    assert json.loads((found / "config.json").read_text()) == json.loads((expected / "config.json").read_text())


@pytest.fixture
def source(golden_dir, tmp_path) -> Path:
    """A Hugging Face folder with weights, a tokenizer and a pickle that nobody may touch."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(golden_dir / "mono_tiny" / file, folder)
    for file in ("tokenizer.model", "added_tokens.json"):
        shutil.copy(golden_dir / "chat" / file, folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def dense(golden_dir, tmp_path) -> Path:
    """A dense InternLM2 folder: the language model of a golden one, biases in, tokenizer without image tokens."""
    folder = tmp_path / "dense"
    folder.mkdir()
    config = json.loads((golden_dir / "mono_tiny" / "config.json").read_text())["llm_config"]
    config |= {"architectures": ["InternLM2ForCausalLM"], "bias": True, "vocab_size": 602, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, tensor in load_file(golden_dir / "mono_tiny" / "model.safetensors").items():
        if name.startswith("language_model.") and "_ve." not in name:
            rows = 602 if "tok_embeddings" in name or "output" in name else tensor.shape[0]
            shape = (rows, *tensor.shape[1:])
            tensors[name.removeprefix("language_model.")] = rng.standard_normal(shape, np.float32) * 0.2
    for n in range(3):
        for name, size in (("wqkv", 80), ("wo", 48)):
            tensors[f"model.layers.{n}.attention.{name}.bias"] = rng.standard_normal(size, np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(golden_dir / "chat" / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 600, "<|im_end|>": 601}))
    return folder


# ----------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", ["mono_tiny", "mono_tiny_ntk", "modular_tiny"])
def test_golden_models_come_back_bit_for_bit(golden_dir, tmp_path, capsys, name):
    run("--from=hf", "--to=orbax", golden_dir / name, tmp_path / "orbax")
    run("--from=orbax", "--to=hf", tmp_path / "orbax", tmp_path / "hf", "--json")
    assert_same_folder(tmp_path / "hf", golden_dir / name)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tensors"] == len(tensors_of(golden_dir / name))
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors_of(golden_dir / name).values())
    assert report["dtypes"] == ["float32"]


def test_companions_travel_and_pickles_do_not(source, tmp_path):
    run(source, tmp_path / "orbax")
    assert checkpoint.model_config(tmp_path / "orbax").image_token_id == 604
    run(tmp_path / "orbax", tmp_path / "hf")
    for folder in (tmp_path / "orbax", tmp_path / "hf"):
        for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert not (folder / "optimizer.pt").exists()
        assert not (folder / "model.json").exists() or folder.name == "orbax"


def test_sharded_export_and_import(source, tmp_path):
    run("--to=hf", source, tmp_path / "sharded", "--shard_size=0.1MB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert all(file.stat().st_size < 110_000 for file in (tmp_path / "sharded").glob("*.safetensors"))
    run(tmp_path / "sharded", tmp_path / "orbax")
    run(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == tensors_of(source).keys()
    for name, tensor in tensors_of(source).items():
        assert tensors_of(tmp_path / "hf")[name].tobytes() == tensor.tobytes()


def test_name_table_is_remembered(source, tmp_path):
    """1.5 weights under names of another release: imported with a table, exported under the same names."""
    tensors = load_file(source / "model.safetensors")
    for n in range(3):
        tensors[f"language_model.model.layers.{n}.attention.visual.weight"] = np.full((80, 48), n, np.float32)
    save_file(tensors, source / "model.safetensors")
    names = tmp_path / "names.json"
    pattern = "language_model.model.layers.{n}.attention.visual.weight"
    names.write_text(json.dumps({"layers/visual_attention/wqkv/kernel": pattern}))
    run(source, tmp_path / "orbax", f"--names={names}")
    config, _ = checkpoint.load_model(tmp_path / "orbax")
    assert config.visual_attention_experts
    run(tmp_path / "orbax", tmp_path / "hf")
    assert tensors_of(tmp_path / "hf").keys() == tensors.keys()


def test_weights_are_cast_when_asked_for(source, tmp_path, capsys):
    run("--to=hf", "--dtype=bfloat16", source, tmp_path / "bf16", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["dtypes"] == ["bfloat16"]
    before, after = tensors_of(source), tensors_of(tmp_path / "bf16")
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(jnp.bfloat16), strict=True)
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ----------------------------------------------------------------------------------------------------- visual experts


@pytest.mark.parametrize("target", ["orbax", "hf"])
@pytest.mark.parametrize("attention", [False, True])
def test_embedded_experts_are_copies_of_the_text_experts(dense, tmp_path, capsys, attention, target):
    options = ["--embed_experts", f"--to={target}", "--vision.image_size=56", "--vision.hidden_size=32", "--json"]
    run(*options, *["--attention_experts"] * attention, dense, tmp_path / "mono")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == "Mono-InternVL" + ("-1.5" if attention else "")
    assert report["vocabulary_rows_added"] == 9
    old_config, old = checkpoint.load_model(dense)
    config, new = checkpoint.load_model(tmp_path / "mono")
    assert config.visual_ffn_experts and config.visual_attention_experts is attention
    assert (config.vision.image_size, config.vision.hidden_size, config.vision.patch_size) == (56, 32, 14)
    assert (config.vocab_size, old_config.vocab_size) == (611, 602)
    old, new = tree.flatten(old), tree.flatten(new)
    for path, leaf in old.items():
        found = new[path][:602] if path == "embed/embedding" else new[path][:, :602] if "lm_head" in path else new[path]
        np.testing.assert_array_equal(found, leaf, strict=True)
    for name in ("gate", "up", "down"):
        text = old[f"layers/feed_forward/{name}/kernel"]
        np.testing.assert_array_equal(new[f"layers/visual_feed_forward/{name}/kernel"], text)
    for name in ("kernel", "bias"):
        path = f"layers/visual_attention/wqkv/{name}"
        assert (path in new) is attention
        if attention:
            np.testing.assert_array_equal(new[path], old[f"layers/attention/wqkv/{name}"])
    mean = np.asarray(old["embed/embedding"], np.float64).mean(0)
    np.testing.assert_allclose(new["embed/embedding"][602:], np.tile(mean, (9, 1)), rtol=1e-6, atol=1e-7)
    mean = np.asarray(old["lm_head/kernel"], np.float64).mean(1)
    np.testing.assert_allclose(new["lm_head/kernel"][:, 602:], np.tile(mean[:, None], 9), rtol=1e-6, atol=1e-7)
    assert np.std(new["vision/patch_embedding/kernel"]) > 0 and np.std(new["projector/fc1/kernel"]) > 0


def test_embedded_model_reads_text_as_before(dense, tmp_path):
    run("--embed_experts", "--vision.image_size=56", "--vision.hidden_size=32", dense, tmp_path / "mono")
    batch = BatchSpec(0, 16).empty(1)
    batch["tokens"][:] = np.arange(16) * 7 % 128
    batch["positions"][:], batch["segments"][:] = np.arange(16), 1
    logits = []
    for folder in (dense, tmp_path / "mono"):
        config, params = checkpoint.load_model(folder)
        model = Model(config)
        logits.append(np.asarray(model.logits(params, model(params, batch, jnp.float32).hidden)))
    np.testing.assert_array_equal(logits[1][..., :602], logits[0])


def test_added_tokens_of_the_embedded_model(dense, tmp_path):
    run("--embed_experts", "--vision.image_size=56", "--vision.hidden_size=32", dense, tmp_path / "mono")
    tokenizer = Tokenizer(tmp_path / "mono")
    assert [tokenizer.id(token) for token in SPECIAL] == [600, 601, 602, 603, 604]
    config = checkpoint.model_config(tmp_path / "mono")
    assert config.vocab_size == tokenizer.vocab_size == 611
    assert config.image_token_id == 604
    values = json.loads((tmp_path / "mono" / "config.json").read_text())
    assert values["model_type"] == "internvl_chat" and values["template"] == "internlm2-chat"
    assert values["llm_config"]["architectures"] == ["InternLM2VEForCausalLM"]
    assert values["torch_dtype"] == "float32"
    assert values["llm_config"]["bos_token_id"] == 1  # a key of the base that this project does not know


def test_tokens_of_internlm2_follow_the_release(tmp_path):
    """Without a tokenizer: the ids that the public release of Mono-InternVL has."""
    added, vocab_size = convert.add_tokens(tmp_path, preset("internlm2_1_8b").vocab_size)
    assert vocab_size == preset("mono_internvl_2b").vocab_size == 92553
    assert [added[token] for token in SPECIAL] == [92543, 92542, 92544, 92545, 92546]
    assert added["</box>"] == 92552


def test_known_tokens_keep_their_ids(source):
    added, vocab_size = convert.add_tokens(source, 700)
    assert added == json.loads((source / "added_tokens.json").read_text())
    assert vocab_size == 700


def test_attention_experts_can_be_added_to_a_mono_model(source, tmp_path):
    run("--embed_experts", "--attention_experts", "--to=hf", source, tmp_path / "new", "--image_token_id=100")
    before, after = tensors_of(source), tensors_of(tmp_path / "new")
    for name, tensor in before.items():
        if "tok_embeddings" in name or "output" in name:
            np.testing.assert_array_equal(after[name][: len(tensor)], tensor)
        else:
            assert after[name].tobytes() == tensor.tobytes()
    for n in range(3):
        attention = f"language_model.model.layers.{n}.attention."
        np.testing.assert_array_equal(after[attention + "wqkv_ve.weight"], before[attention + "wqkv.weight"])


def test_same_seed_same_patch_embedding(dense, tmp_path):
    options = ["--embed_experts", "--vision.image_size=56", "--vision.hidden_size=32"]
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*options, f"--seed={seed}", dense, tmp_path / name)
        hashes.append(checkpoint.tree_hash(checkpoint.load_model(tmp_path / name)[1]))
    assert hashes[0] == hashes[1] != hashes[2]


# ----------------------------------------------------------------------------------------------------- bad input


def test_unusable_sources_and_targets(source, dense, golden_dir, tmp_path, capsys):
    run(source, tmp_path / "orbax")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    new = tmp_path / "new"
    assert "exists and is not empty" in fails(capsys, source, tmp_path / "full")
    assert "nowhere: no such folder" in fails(capsys, tmp_path / "nowhere", new)
    assert "use --from=hf?" in fails(capsys, "--from=orbax", source, new)
    assert "use --from=orbax" in fails(capsys, "--from=hf", tmp_path / "orbax", new)
    assert "config.json" in fails(capsys, tmp_path / "full", new)
    assert "invalid choice" in fails(capsys, "--to=onnx", source, new)
    assert "--attention_experts needs --embed_experts" in fails(capsys, "--attention_experts", source, new)
    assert "has these visual experts already" in fails(capsys, "--embed_experts", source, new)
    assert "a modular model has a vision encoder" in fails(capsys, "--embed_experts", golden_dir / "modular_tiny", new)
    assert "image_size is 50" in fails(capsys, "--embed_experts", "--vision.image_size=50", dense, new)
    assert "'lots' is no size" in fails(capsys, "--shard_size=lots", source, new)
    assert "names.json: no such file" in fails(capsys, f"--names={tmp_path / 'names.json'}", source, new)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"layers/visual_attention/wqkv/kernel": "visual.{n}"}))
    error = fails(capsys, f"--names={names}", source, new)
    assert "no such parameter in this model: layers/visual_attention/wqkv/kernel" in error
    assert (tmp_path / "full" / "file").read_text() == "mine"
    assert not new.exists()


def test_weights_that_do_not_fit_are_listed(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 2
    (source / "config.json").write_text(json.dumps(config))
    error = fails(capsys, source, tmp_path / "new")
    assert "10 unexpected" in error
    assert "language_model.model.layers.2.feed_forward_ve.w1.weight" in error


def test_full_disk_is_one_line_and_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    run(source, tmp_path / "orbax")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    assert "needs 0.0 GB, the disk has 0.0 GB free" in fails(capsys, source, tmp_path / "new")
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        errors = [fails(capsys, source, tmp_path / "new"), fails(capsys, tmp_path / "orbax", tmp_path / "new")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all("not written" in error or "was not saved" in error for error in errors)
    assert sorted(tmp_path.iterdir()) == before


def test_command_line_from_a_shell(source, tmp_path):
    """The real process: exit codes, help, one JSON line, no traceback."""
    root = Path(convert.__file__).parent.parent
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}

    def command(*argv: Any) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, root / "experiments" / "convert.py", *argv]
        return subprocess.run([str(part) for part in script], env=env, capture_output=True, text=True, check=False)

    good = command("--from=hf", "--to=orbax", source, tmp_path / "new", "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout.splitlines()[-1])["tensors"] == 43
    assert good.stderr == ""
    bad = command("--from=hf", "--to=orbax", source, tmp_path / "new")
    assert bad.returncode == cli.USER_ERROR
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- memory

_MEASURE = """
import sys, threading, time
from experiments import convert
from mono_jax import hf
from mono_jax.checkpoints.checkpoint import model_config

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))

hf.param_shapes(model_config(sys.argv[1]))  # what JAX itself needs is there before measuring
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
convert.main(sys.argv[1:])
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_near_the_largest_slice(tmp_path):
    """A model of 500 MB, 67 MB in its largest stack of layers, converts in well under one such stack and a half."""
    config = preset(
        "mono_internvl_2b",
        num_hidden_layers=8,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
    )
    shapes = hf.param_shapes(config)
    rng = np.random.default_rng(0)

    def lazy(path: str, shape: tuple[int, ...]) -> hf.LazyArray:
        stacked = hf.is_stacked(path)
        one = shape[1:] if stacked else shape
        return hf.LazyArray(
            shape, np.dtype(jnp.bfloat16), stacked, lambda n: rng.random(one, np.float32).astype(jnp.bfloat16)
        )

    hf.save_hf(tmp_path / "hf", config, tree.unflatten({path: lazy(path, shape) for path, shape in shapes.items()}))
    stack = max(2 * int(np.prod(shape)) for shape in shapes.values())
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    root = Path(convert.__file__).parent.parent
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    for source, target in (("hf", "orbax"), ("orbax", "back")):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / source), str(tmp_path / target)]
        output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        grown = int(output.splitlines()[-1])
        assert grown < 1.5 * stack + (50 << 20) < 0.4 * total
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
