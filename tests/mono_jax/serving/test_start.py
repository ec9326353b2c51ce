"""The command's flags, and its messages if it cannot start."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import serve
from mono_jax import cli
from mono_jax.errors import ConfigError
from mono_jax.models.presets import preset
from mono_jax.serving import engine, start
from mono_jax.serving.contract import EngineConfig
from mono_jax.weights.prompt_format import PromptFormat
from tests.tiny_folder import tiny_folder


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(ConfigError, match=r"^serving needs uvicorn: pip install '\.\[serve\]'$"):
        start.check_packages()


def test_as_many_files_may_be_open_as_the_system_permits():
    """In a process of its own, with a soft limit that is lower than the hard one."""
    code = """
import resource
from mono_jax.serving.start import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "200 200 200\n"


def test_a_system_without_a_limit_permits_any_number(monkeypatch: pytest.MonkeyPatch):
    """RLIM_INFINITY is -1: as a number of connections it would let none be opened."""
    monkeypatch.setattr(start.resource, "getrlimit", lambda which: (100, start.resource.RLIM_INFINITY))
    monkeypatch.setattr(start.resource, "setrlimit", lambda which, limits: None)
    assert start.raise_open_files() == 0


def test_configs_become_flags_and_back():
    parser = cli.parser("", "")
    cli.add_config_flags(parser, EngineConfig)
    assert cli.config_of(parser.parse_args([]), EngineConfig) == EngineConfig()
    flags = ["--max_rows=3", "--dtype=float32", "--no-reuse_prefixes", "--programs=x"]
    changed = EngineConfig(max_rows=3, dtype="float32", reuse_prefixes=False, programs="x")
    assert cli.config_of(parser.parse_args(flags), EngineConfig) == changed
    with pytest.raises(ConfigError, match=r"engine\.max_rows is 0"):
        cli.config_of(parser.parse_args(["--max_rows=0"]), EngineConfig)
    with pytest.raises(SystemExit):
        parser.parse_args(["--dtype=int8"])


def test_the_command_keeps_compiled_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They take minutes to compile, at every start."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path))
    found = [serve.build_parser().parse_args(["--model=m", *flags]).programs for flags in ([], ["--programs="])]
    assert found == [str(tmp_path / "serving"), ""]


def test_images_that_no_chunk_holds_are_refused_at_the_start():
    """For a model with bidirectional images: two tiles and a thumbnail of 16 tokens each."""
    model, form = preset("tiny_mono", bidirectional_images=True), PromptFormat(max_tiles=2)
    native = model.replace(vision=dataclasses.replace(model.vision, native=True))
    for config, most in ((model, 48), (native, 32)):
        message = rf"engine\.prefill_chunk is {most - 1}: .* {most} tokens .*: raise prefill_chunk to {most}, or lower"
        with pytest.raises(ConfigError, match=message):
            engine._check_images(config, form, EngineConfig(prefill_chunk=most - 1))
        engine._check_images(config, form, EngineConfig(prefill_chunk=most))
    engine._check_images(preset("tiny_mono"), form, EngineConfig(prefill_chunk=16))


@pytest.mark.parametrize(("key", "name"), [("suppress_tokens", "banned_tokens"), ("eos_token_id", "stop_tokens")])
def test_a_folder_with_more_tokens_than_a_request_may_have_is_refused_at_the_start(
    key: str, name: str, golden_dir: Path, tmp_path: Path
):
    """Otherwise the server would start, and refuse every request."""
    folder = tiny_folder(golden_dir, tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({key: [*range(70)]}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: 7\d {name}: .* fewer than 64"):
        engine.Engine.open(str(folder), EngineConfig())


def test_a_model_is_called_as_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "latest").symlink_to("there")
    monkeypatch.chdir(tmp_path / "there")
    given = {".": "there", "..": tmp_path.name, "../latest": "latest", "gs://bucket/m/": "m", "/": "model"}
    assert {model: engine.model_name(model) for model in given} == given
