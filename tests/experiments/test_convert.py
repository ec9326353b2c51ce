"""The convert command: options, one-line errors, no leftovers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import convert
from mono_jax import cli
from mono_jax.weights.model_folder import model_config
from tests.mono_jax.weights.hf_folders import write_dense, write_mono


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


@pytest.fixture
def source(golden_dir, tmp_path) -> Path:
    return write_mono(tmp_path / "source", golden_dir)


@pytest.fixture
def dense(golden_dir, tmp_path) -> Path:
    return write_dense(tmp_path / "dense", golden_dir)


def test_options_reach_the_conversion(dense, tmp_path, capsys):
    run(
        "--embed_experts",
        "--attention_experts",
        "--seed=3",
        "--vision.image_size=56",
        "--to=hf",
        dense,
        tmp_path / "mono",
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{tmp_path / 'mono'}: Mono-InternVL-1.5, ")
    assert printed[1] == "vocabulary: 9 rows added, each the mean of the old ones"
    options = ["--from=hf", "--to=hf", "--shard_size=0.1MB", "--dtype=float16", "--image_token_id=9", "--json"]
    run(*options, tmp_path / "mono", tmp_path / "again")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["from"], report["to"], report["dtypes"]) == ("hf", "hf", ["float16"])
    assert (tmp_path / "again" / "model.safetensors.index.json").is_file()
    config = model_config(tmp_path / "again", image_token_id=9)
    assert config.visual_attention_experts and config.vision.image_size == 56


def test_unusable_sources_and_targets(source, dense, golden_dir, tmp_path, capsys):
    run(source, tmp_path / "orbax")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    new = tmp_path / "new"
    assert "exists and is not empty" in fails(capsys, source, tmp_path / "full")
    assert "nowhere: no such folder" in fails(capsys, tmp_path / "nowhere", new)
    assert "use --from=hf?" in fails(capsys, "--from=orbax", source, new)
    assert "use --from=orbax" in fails(capsys, "--from=hf", tmp_path / "orbax", new)
    assert "config.json" in fails(capsys, tmp_path / "full", new)
    assert "invalid choice" in fails(capsys, "--to=onnx", source, new)
    assert "--attention_experts needs --embed_experts" in fails(capsys, "--attention_experts", source, new)
    assert "already has these visual experts" in fails(capsys, "--embed_experts", source, new)
    assert "a modular model has a vision encoder" in fails(capsys, "--embed_experts", golden_dir / "modular_tiny", new)
    assert "image_size is 50" in fails(capsys, "--embed_experts", "--vision.image_size=50", dense, new)
    assert "'lots' is not a size" in fails(capsys, "--shard_size=lots", source, new)
    assert "names.json: no such file" in fails(capsys, f"--names={tmp_path / 'names.json'}", source, new)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"layers/visual_attention/wqkv/kernel": "visual.{n}"}))
    error = fails(capsys, f"--names={names}", source, new)
    assert "no such parameter in this model: layers/visual_attention/wqkv/kernel" in error
    assert (tmp_path / "full" / "file").read_text() == "kept"
    assert not new.exists()


def test_weights_that_do_not_fit_are_listed(source, tmp_path, capsys):
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = 2
    (source / "config.json").write_text(json.dumps(config))
    error = fails(capsys, source, tmp_path / "new")
    assert "10 unexpected" in error
    assert "language_model.model.layers.2.feed_forward.w2.weight and 5 more)" in error


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
