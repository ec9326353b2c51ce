"""Every command: ``--help`` is instant, and the command accepts its own examples."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mono_jax.runs import config_file
from mono_jax.runs.config import EvipConfig, RunConfig

ROOT = Path(__file__).parent.parent
# Each takes longer to import than the rest of a command's --help.
HEAVY = (
    *("jax", "flax", "optax", "orbax", "grain", "tensorstore", "pyarrow", "matplotlib", "torch"),
    *("tensorflow_datasets", "tokenizers", "sentencepiece", "fsspec"),
)
# Stands in for the user's configs, my.py and my_config.py, in examples.
OWN_CONFIG = """
from ml_collections import ConfigDict
def get_config():
    source = {"name": "laion", "spec": {"kind": "tar", "paths": "laion/*.tar"}}
    data = {"tokenizer": "tokenizer", "sources": [source]}
    return ConfigDict({"stage": "S2", "steps": 9, "model": {"preset": "tiny_mono"}, "data": data})
"""
HELP = f"""
import contextlib, io, runpy, sys
sys.argv = [sys.argv[1], "--help"]
with contextlib.suppress(SystemExit):
    runpy.run_path(sys.argv[0], run_name="__main__")
heavy = [name for name in {HEAVY} if name in sys.modules]
print(*heavy, file=sys.stderr)
"""


def has_main(file: Path) -> bool:
    return any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) and "__name__" in ast.unparse(node.test)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
    )


COMMANDS = [
    str(file.relative_to(ROOT))
    for package in ("data_pipelines", "experiments", "mono_jax", "pallas_kernels")
    for file in sorted((ROOT / package).rglob("*.py"))
    if has_main(file)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant(command: str):
    done = subprocess.run([sys.executable, "-c", HELP, command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("usage:"), done.stderr
    assert done.stderr.split() == [], f"{command}: imported before the arguments are parsed"


def test_training_starts_without_what_it_does_not_use():
    """Plotting, and other imports that libraries pull in, would cost seconds at every start of a run."""
    unused = "{'matplotlib', 'scipy.stats', 'torch', 'tensorflow', 'tensorboardX', 'boto3'}"
    program = f"import sys, mono_jax.runs.evip; print(*{unused} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


class Parsed(Exception):
    """The arguments have been read; the command would start its work now."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end with ``Parsed`` once their arguments, and their config if they have one, have been read."""
    inside = [False]  # of one of the functions below, which call each other

    def ends(function: Callable[..., Any]) -> Callable[..., Any]:
        def ending(*args: Any, **options: Any) -> Any:
            if inside[0]:
                return function(*args, **options)
            inside[0] = True
            try:
                result = function(*args, **options)
            finally:
                inside[0] = False
            raise Parsed(result)

        return ending

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ends(argparse.ArgumentParser.parse_args))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", ends(argparse.ArgumentParser.parse_known_args))
    monkeypatch.setattr(config_file, "parse", ends(config_file.parse))


COMMAND_LINE = re.compile(
    r"^\s*(?:examples?: )?python (?:-m )?((?:experiments|data_pipelines|pallas_kernels|mono_jax)[./].*)", re.M
)


def examples(text: str) -> list[tuple[str, list[str]]]:
    """(file of the command, arguments) of the command lines in a --help text, without comments."""
    found = []
    for line in COMMAND_LINE.findall(re.sub(r"\s*\\\n\s*", " ", text)):
        words = shlex.split(re.split(r"\s{3,}|\s#\s", line)[0])
        file = words[0] if words[0].endswith(".py") else f"{words[0].replace('.', '/')}.py"
        package = f"{file.removesuffix('.py')}/__main__.py"
        found.append((package if (ROOT / package).is_file() else file, words[1:]))
    return found


def module_of(file: str) -> ModuleType:
    return importlib.import_module(file.removesuffix(".py").replace("/", "."))


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with ``experiments`` and the user's configs that examples name."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    for name in ("my.py", "my_config.py"):
        (tmp_path / name).write_text(OWN_CONFIG)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_taken(
    command: str, parse_only: None, own_configs: None, capsys: pytest.CaptureFixture
):
    with pytest.raises(SystemExit):
        module_of(command).main(["--help"])
    found = examples(capsys.readouterr().out.partition("\n\n")[2])  # without the usage
    assert found, f"{command} --help has no example"
    for file, arguments in found:
        check_example(file, arguments)


@pytest.mark.parametrize("file", sorted((ROOT / "experiments" / "configs").glob("*.py")), ids=lambda file: file.name)
def test_examples_in_the_docstrings_of_configs_are_taken(file: Path, parse_only: None, own_configs: None):
    for command, arguments in examples(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""):
        check_example(command, arguments)


def check_example(file: str, arguments: list[str]) -> None:
    """Fails if the command rejects the arguments or its dataclass rejects the config."""
    try:
        module_of(file).main(arguments)
    except Parsed as parsed:
        check_config(parsed.args[0])
    except SystemExit as stop:
        pytest.fail(f"{file} {shlex.join(arguments)}: exit code {stop.code}")
    else:
        pytest.fail(f"{file} {shlex.join(arguments)}: the command did not parse")


def check_config(parsed: Any) -> None:
    """Raises if ``parsed`` has a config that cannot be converted to its dataclass."""
    if isinstance(parsed, tuple) and isinstance(parsed[1], dict):
        (EvipConfig if "stages" in parsed[1] else RunConfig).from_dict(parsed[1])


def test_examples_are_found_in_help_texts():
    text = """Does, as `python -m data_pipelines.index x`, this:

  python experiments/train.py --a=1 \\
      --b='2 3'   # the reason
  example: python -m data_pipelines.index 'a/*.tar'
"""
    assert examples(text) == [
        ("experiments/train.py", ["--a=1", "--b=2 3"]),
        ("data_pipelines/index.py", ["a/*.tar"]),
    ]
