"""Commands accept every shipped config with each argument that its docstring names."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import jax
import pytest

from mono_jax.errors import ConfigError
from mono_jax.models.presets import preset
from mono_jax.runs import config_file
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import EvipConfig, RunConfig
from mono_jax.runs.program import Program
from mono_jax.runs.sets import prepare_sets
from mono_jax.runs.stage_checks import check_stages

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"


def shipped() -> list[str]:
    """FILE and FILE:ARG of each config; a word such as STAGE in ARG stands for each key of the file's STAGES."""
    found = []
    for file in sorted(CONFIGS.glob("*.py")):
        if file.name != "__init__.py":
            tree = ast.parse(file.read_text(encoding="utf-8"))
            arguments = re.findall(rf"{re.escape(file.name)}(:[\w.+,-]*[\w+])", ast.get_docstring(tree))
            for argument in ("", *dict.fromkeys(arguments)):
                found += [f"{file.name}{filled}" for filled in fill(argument, tree)]
    return found


def fill(argument: str, tree: ast.Module) -> list[str]:
    """``argument`` with each word in capitals replaced by the keys of the table of that name."""
    filled = [argument]
    for word in re.findall(r"\b[A-Z]+\b", argument):
        tables = [
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"{word}S"
        ]
        for table in tables:
            filled = [old.replace(word, ast.literal_eval(key)) for old in filled for key in table.value.keys]
    return filled


def test_there_are_some():
    assert {"demo.py", "demo.py:smoke", "real.py:2b", "mono_internvl.py:S1.3,v5p-8"} <= set(shipped())


@pytest.mark.parametrize("name", shipped())
def test_shipped_configs_build(name: str):
    config = config_file.load(str(CONFIGS / name))
    if "stages" in config:
        sequence = EvipConfig.from_dict(config)
        if sequence.stage_name(next(iter(sequence.stages))) != "S0":
            sequence = dataclasses.replace(sequence, init=sequence.init or "given on the command line")
        check_stages(sequence, preset("demo_lm") if sequence.init else None)
    else:
        run = RunConfig.from_dict(config)
        assert run.init or architecture_of(run)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("s2", "many", "config.sets.s2 is 'many': it must be a whole number"),
        ("s2", 3, "at least 20"),
        ("seed", 0.5, "config.sets.seed is 0.5: it must be a whole number, at least 0"),
        ("s3", 100, "config.sets: unknown key 's3'; did you mean 's"),
        ("kind", "demos", "did you mean 'demo'?"),
    ],
)
def test_sets_that_cannot_be_made_are_refused(key: str, value: object, words: str, tmp_path: Path):
    config = config_file.load(str(CONFIGS / "demo.py"))
    with config.ignore_type():
        config.sets[key] = value
    with pytest.raises(ConfigError, match=re.escape(words)):
        prepare_sets(EvipConfig.from_dict(config), tmp_path)


@pytest.mark.parametrize(
    ("stage", "saved", "kept"), [("S1.1", "14.7", "3.8"), ("S1.3", "18.3", "3.2"), ("S2", "37.3", "0")]
)
def test_checkpoints_are_as_large_as_the_guide_says(stage: str, saved: str, kept: str):
    config = config_file.load(f"{CONFIGS / 'mono_internvl.py'}:{stage}").to_dict() | {"mesh": {}}
    state, frozen = Program.build(RunConfig.from_dict(config), steps=1).abstract_state()
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part)) for part in (vars(state), frozen)]
    assert [float(f"{size / 1e9:.1f}") for size in sizes] == [float(saved), float(kept)]
    text = (CONFIGS.parents[1] / "docs" / "resuming.md").read_text()
    assert f"{saved} GB" in text and re.search(rf"stored once,[^;]*\b{re.escape(kept)}\b", text)
