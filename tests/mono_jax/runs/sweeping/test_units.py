"""Units of a sweep file, and what they share."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.runs.config import EvipConfig
from mono_jax.runs.sweeping import commands
from mono_jax.runs.sweeping.chain import plan, plans, repeated
from mono_jax.runs.sweeping.units import BY_STAGE, Unit, product, read_sweep, values


def test_units_of_a_file(sweep_file: Path):
    sweep = read_sweep(sweep_file)
    assert (sweep.title, sweep.groups) == ("Rates of learning", ["low", "high", "short"])
    assert [unit.name for unit in sweep.units] == ["low-seed0", "low-seed1", "high-seed0", "high-seed1", "short"]
    assert sweep.unit("3") == sweep.unit("high-seed1")
    assert sweep.unit("high-seed1").changes == {
        "stages.s2.optim.learning_rate": 1e-2,
        "common.seed": 1,
        "data.seed": 1,
    }
    read = sweep.unit("short").values()
    assert list(read["stages"]) == ["s0", "s2"] and "seed" not in read["data"]
    assert sweep.unit("2").values()["stages"]["s2"]["optim"]["learning_rate"] == 1e-2


def test_grids():
    grid = dict(product(values("common.optim.learning_rate", 1, 2, label="lr"), {"a": {"x": 1}, "b": {"x": 2, "y": 3}}))
    assert list(grid) == ["lr=1-a", "lr=1-b", "lr=2-a", "lr=2-b"]
    assert grid["lr=2-b"] == {"common.optim.learning_rate": 2, "x": 2, "y": 3}


@pytest.mark.parametrize(
    ("second", "lost"),
    [
        ({"b": {"y": 2}, "c": {"x": 3}}, "x"),
        ({"c": {"z": {"v": 3}}}, "z.v"),
        ({"c": {"z": {}}}, "z.v"),
        ({"c": {"z.v": 3}}, "z.v"),
    ],
)
def test_axes_of_a_grid_change_different_keys(second: dict[str, Any], lost: str):
    with pytest.raises(ConfigError, match=f"product: a-c: {lost} is overwritten by 'c': give it on one axis only"):
        list(product({"a": {"x": 1, "z": {"v": 1}}}, second))


def test_what_an_axis_adds_to_a_section_of_another_overwrites_nothing():
    ((_, changes),) = product({"a": {"z": {"v": 1}, "stages.s2.steps": 3}}, {"b": {"z.w": 2, "stages": ["s0", "s2"]}})
    assert list(changes) == ["z", "stages.s2.steps", "z.w", "stages"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", r"sweep\.py: a sweep file needs a function sweep\(add\)"),
        ("def sweep(add): pass", "added no unit"),
        ("def sweep(add): add('a'); add('a')", r"add\(\) is called twice for 'a': give each group a name of its own"),
        ("def sweep(add): add('a'); add('a', {'common.dtype': 'float32'}, seeds=2)", "called twice for 'a'"),
        ("def sweep(add): add('a-seed1'); add('a', seeds=2)", "two units are called 'a-seed1'"),
        ("def sweep(add): add('a', {'common.seed': 7}, seeds=2)", r"a: common\.seed is overwritten by seeds=2"),
        ("def sweep(add): add('a', {'data': {'seed': 7}}, seeds=2)", r"a: data\.seed is overwritten by seeds=2"),
        (
            "def sweep(add): add('a', {'stages.s2.optim.clip_norm': 2.0, 'stages.s2': {'steps': 3}})",
            r"a: stages\.s2\.optim\.clip_norm is overwritten by stages\.s2: give stages\.s2 first",
        ),
        ("def sweep(add): add('a', {'stages': ['s0', 's2', 's0']})", "^a: stages lists 's0' twice"),
        ("def sweep(add): add('a/b')", "'a/b' is not a valid name"),
        ("def sweep(add): add('a', seeds=0)", "seeds is 0"),
        ("def sweep(add): 1 / 0", r"sweep\.py: ZeroDivisionError"),
        ("x = y\ndef sweep(add): add('a')", r"sweep\.py: NameError"),
        ("def sweep(add): add('a', {'stages.s2.stepz': 1})", r"^a: .*unknown key 'stepz'.*did you mean 'steps'"),
        ("def sweep(add): add('a', {'stages.s2.optim.learning_rate': -1})", r"^a: .*optim\.learning_rate is -1"),
        ("def sweep(add): add('a', {'stages.s0.model.preset': 'tiny_ml'})", "^a: .*did you mean 'tiny_lm'"),
        ("def sweep(add): add('a', {'stages.s2.stage': 'S3'})", "^a: .*'S3'"),
        ("def sweep(add): add('a', {'data.batch_sise': 4})", "^a: .*did you mean 'batch_size'"),
        ("def sweep(add): add('a', {'visionn.image_size': 4})", "^a: .*did you mean 'vision'"),
        (
            "def sweep(add): add('a', {'stages': ['s0', 's9']})",
            "^a: stages: no stage 's9'; the config has s0, s1_1, s2",
        ),
        ("def sweep(add): add('a', {'stages': 's0'})", "^a: stages is 's0': list the folders"),
        ("def sweep(add): add('a', {'init.x': 1})", r"^a: config\.init is {'x': 1}: it must be a string"),
        ("CONFIG = None\ndef sweep(add): add('a')", r"give CONFIG = "),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_starts(
    write_sweep: Callable[[str], Path], body: str, message: str
):
    with pytest.raises(ConfigError) as error:
        plans(read_sweep(write_sweep(body + "\n")))
    assert re.search(message, str(error.value))


DEMO = {"sets": {"kind": "demo"}}
NO_DATA = {"sets": {"kind": "folder", "path": "there"}}  # there is none yet
BASE = {"init": "another"}  # nor this


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # What trains: names, groups that the model lacks, parts and layers.
        ({"stages.s2.trains": ["atention"]}, "stage s2: .*trains 'atention': did you mean 'attention'"),
        (BASE | {"stages.s2.trains": ["atention"]}, "stage s2: .*trains 'atention': did you mean 'attention'"),
        (BASE | {"stages.s2.trains": ["attention[5:2]"]}, "stage s2: .*'attention\\[5:2\\]': the range is empty"),
        ({"visual_experts": False}, r"stage s1_1: .*trains \['visual_experts'\], which this model does not have"),
        ({"stages.s2.trains": ["visual_attention"]}, "stage s2: .*'visual_attention'.*does not have"),
        ({"stages.s2.trains": ["attention/wq"]}, "stage s2: .*attention has no parameter named 'wq'"),
        ({"stages.s2.trains": ["attention[0:99]"]}, "stage s2: .*the model has layers 0 to"),
        ({"stages.s2.trains": ["lora"], "stages.s2.lora.targets": ["norms"]}, "stage s2: lora.targets: 'norms'"),
        (
            BASE | {"stages.s2.trains": ["lora"], "stages.s2.lora.targets": ["attn"]},
            "stage s2: .*lora.targets 'attn': did you mean 'attention'",
        ),
        (
            {"stages.s1_1.optim.groups": {"norms": {"learning_rate": 1.0}}},
            r"stage s1_1: optim.groups names \['norms'\]",
        ),
        # The model that a stage before has made.
        ({"stages.s2.model.num_hidden_layers": 9}, "stage s2: .*num_hidden_layers is 9, .* the model of s1_1 have"),
        ({"stages.s2.model.preset": "tiny_mono"}, "stage s2: .*preset is 'tiny_mono', .*the model of s1_1"),
        ({"stages.s2.model.rope_thta": 9.0}, "config.stages.s2.model: .*did you mean 'rope_theta'"),
        ({"stages": ["s1_1", "s2"]}, "stage s1_1: config.init is missing"),
        ({"stages.s0.data.visual_tokens": 8}, "stage s0: data.visual_tokens is above 0, but the model has no vision"),
        (
            {"stages.s2.data.boundary_block": 8, "stages.s2.execution.experts": "static"},
            "stage s2: data.boundary_block",
        ),
        ({"stages.s2.evaluation": {"data": {"max_tiles": 1, "min_tiles": 2}}}, "stage s2: data.max_tiles is 1"),
        # The sets.
        ({"replay": {"s2": {"s9": 0.1}}}, r"stage s2: unknown stage in config\.replay\.s2 's9'"),
        (DEMO | {"replay": {"s2": {"s9": 0.1}}}, r"stage s2: unknown stage in config\.replay\.s2 's9'"),
        (
            {"stages.s2.evaluation": {"sources": {"text": None}}},
            r"stage s2: unknown held-out set \(config\.evaluation\.sources\.text\) 'text'",
        ),
        (
            DEMO | {"stages.s2.evaluation": {"sources": {"nope": None}}},
            r"stage s2: unknown held-out set \(config\.evaluation\.sources\.nope\)",
        ),
        (
            DEMO | {"stages.s2.evaluation": {"tasks": {"nope": {}}}},
            r"stage s2: unknown held-out set \(config\.evaluation\.tasks\.nope\)",
        ),
        (DEMO | {"stages.s2.evaluation": {"tasks": {"text": {}}}}, "stage s2: .*tasks.text: .*contains no questions"),
        ({"data": {"tokenizer": "t"}}, r"stage s0: config\.stages\.s0\.data\.sources is missing, .*has no stage 's0'"),
        ({"data": {"sources": [{"spec": {"kind": "text"}}]}}, r"stage s0: config\.data\.tokenizer is missing"),
    ],
)
def test_what_a_later_stage_would_be_refused_for_is_named_before_anything_starts(
    config: Path, changes: dict[str, Any], message: str
):
    unit = Unit("u", "u", None, changes, str(config))
    with pytest.raises(ConfigError) as error:
        plan(unit)
    assert re.search(f"^u: {message}", str(error.value))


@pytest.mark.parametrize(
    "changes",
    [
        BASE | {"visual_experts": False},  # it may have experts
        BASE | {"stages.s2.trains": ["attention[3:]", "visual_experts[:2]"]},
        {"stages.s2.model": {"preset": "tiny_lm"}, "visual_experts": False, "stages": ["s0"]},
        DEMO | {"stages.s2.evaluation": {"sources": {"text": None, "captions": None}, "tasks": {"questions": {}}}},
        NO_DATA | {"stages.s2.evaluation": {"sources": {"any": None}}, "replay": {"s2": {"any": 0.5}}},
        {"stages.s2.model.vocab_size": 999},  # the tokenizer decides
    ],
)
def test_what_is_not_known_yet_is_not_refused(config: Path, changes: dict[str, Any]):
    plan(Unit("u", "u", None, changes, str(config)))


def test_sets_that_exist_say_what_they_have(tmp_path: Path, config: Path):
    made = {"sources": [{"name": "made", "spec": {"kind": "text", "paths": "x"}}]}
    manifest = {
        "tokenizer": "t",
        "stages": dict.fromkeys(["s0", "s1_1", "s2", "own"], made),
        "heldout": {"quiz": {"path": "q"}},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    changes = {"sets": {"kind": "folder", "path": str(tmp_path)}, "data": {}, "replay": {"s2": {"own": 0.5}}}
    plan(Unit("u", "u", None, changes, str(config)))
    with pytest.raises(ConfigError, match=r"config\.replay\.s2 'onw': did you mean 'own'"):
        plan(Unit("u", "u", None, changes | {"replay": {"s2": {"onw": 1.0}}}, str(config)))
    with pytest.raises(ConfigError, match=r"evaluation\.tasks\.quizz\) 'quizz': did you mean 'quiz'"):
        plan(Unit("u", "u", None, changes | {"stages.s2.evaluation": {"tasks": {"quizz": {}}}}, str(config)))


def digests(config: Path, changes: dict[str, Any]) -> dict[str, str]:
    found = plan(Unit("u", "u", None, changes, str(config)))
    return {link.folder: link.digest for link in found.stages}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"s0", "s1_1", "s2"}),
        ({"stages.s2.steps": 3}, {"s0", "s1_1"}),
        ({"stages.s1_1.data.seed": 3}, {"s0"}),
        ({"attention_experts": True}, {"s0"}),
        ({"vision.hidden_size": 64}, {"s0"}),
        ({"visual_experts": False, "stages.s1_1.stage": "full"}, {"s0"}),
        ({"replay": {"s2": {"s0": 0.1}}}, {"s0", "s1_1"}),
        ({"filters": {"s2": {"min_size": 8}}}, {"s0", "s1_1"}),
        ({"scores": {"s2": "s1_1"}}, {"s0", "s1_1"}),
        ({"init": "another"}, set()),
        ({"sets": {"kind": "folder", "path": "there"}}, set()),
        ({"stages.s0.steps": 5}, set()),
        ({"common.dtype": "float32"}, set()),
        ({"data.batch_size": 3}, set()),
        ({"stages": ["s0", "s2"]}, {"s0"}),
        ({"stages": ["s0", "s1_1"]}, {"s0"}),  # the last stage saves in the base's dtype, the others their masters
        (
            {"gallery": 3, "answer_tokens": 8, "heldout_batches": 2, "heldout_questions": 9},
            {"s0", "s1_1", "s2"},
        ),  # how a model is prompted
    ],
)
def test_what_is_decided_by_the_same_is_shared(config: Path, changes: dict[str, Any], kept: set[str]):
    before, after = digests(config, {}), digests(config, changes)
    assert {folder for folder in after if after[folder] == before[folder]} == kept


def test_units_whose_changes_have_no_effect_are_named(
    write_sweep: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    """A key of ``common`` that each stage replaces, the value that it has anyway, or the order of changes."""
    body = """
def sweep(add):
    both = {"stages.s1_1.steps": 3, "stages.s2.steps": 3}
    add("a", seeds=2)
    add("common", {"common.steps": 9}, seeds=2)
    add("both", both)
    add("again", dict(reversed(both.items())))
    add("asked", {"heldout_batches": 3})
"""
    sweep = read_sweep(write_sweep(body))
    same = {"common-seed0": "a-seed0", "common-seed1": "a-seed1", "again": "both"}
    assert repeated(plans(sweep)) == same
    commands.expand(sweep)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE")]
    assert notes == [
        "NOTE: common: common.steps has no effect, since every stage has its own",
        *(f"NOTE: {a} is the same as {b}: what it changes has no effect" for a, b in same.items()),
    ]


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        ({"stages": ["s0", "s2"], "stages.s1_1.steps": 3}, {"stages.s1_1.steps": "the unit does not run s1_1"}),
        ({"stages.s1_1": {"optim": {"clip_norm": 3.0}}}, {"stages.s1_1.optim.clip_norm": "the unit does not run s1_1"}),
        (
            {"replay": {"s1_1": {"s0": 0.1}, "s2": {"s0": 0.1}}, "filters.s1_1": {"min_size": 8}},
            {
                "replay.s1_1.s0": "the unit does not run s1_1",
                "replay.s2.s0": "s2 has sources of its own, not those of the sets",
                "filters.s1_1.min_size": "the unit does not run s1_1",
            },
        ),
        ({"stages.s2.steps": 3, "common": {"steps": 7}}, {"common.steps": "every stage has its own"}),
        ({"stages.s2.log_every": 3, "common.log_every": 7}, {}),
    ],
)
def test_keys_that_a_unit_changes_in_vain_are_named_once(
    write_sweep: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    idle: dict[str, str],
):
    changes = {"stages": ["s0", "s2"], **changes, "common.dtype": "float32"}
    commands.expand(read_sweep(write_sweep(f"def sweep(add): add('a', {changes!r}, seeds=2)\n")))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE")]
    assert notes == [f"NOTE: a: {key} has no effect, since {why}" for key, why in idle.items()]


def test_stages_that_are_left_out_take_with_them_what_the_config_says_of_them(tmp_path: Path, config: Path):
    kept = {"replay": {"s2": {"s0": 0.1}}, "filters": {"s2": {"min_size": 8}}, "scores": {"s2": "s0"}}
    more = {"replay": {"s1_1": {"s0": 0.2}}, "filters": {"s1_1": {"min_size": 9}}, "scores": {"s1_1": "s0"}}
    given = {key: kept[key] | more[key] for key in BY_STAGE}
    changed = tmp_path / "changed.py"
    changed.write_text(
        config.read_text() + f"\n\n_plain = get_config\n\n\ndef get_config():\n"
        f"    config = _plain()\n    config.update({given!r})\n    return config\n"
    )
    unit = Unit("u", "u", None, {"stages": ["s0", "s2"]}, str(changed))
    assert {key: unit.values()[key] for key in BY_STAGE} == kept
    of_stages = {f.name for f in dataclasses.fields(EvipConfig) if f.metadata["strict"].help.startswith("{stage:")}
    assert of_stages == set(BY_STAGE)
    plan(unit)
    wrong = Unit("u", "u", None, {"stages": ["s0", "s2"], "replay.s9": {"s0": 0.1}}, str(changed))
    with pytest.raises(ConfigError, match=r"stage of config\.replay 's9'"):
        plan(wrong)


def test_every_key_of_a_sequence_is_tried_above():
    (marks,) = (mark for mark in test_what_is_decided_by_the_same_is_shared.pytestmark if mark.name == "parametrize")
    tried = {key.split(".")[0] for changes, _ in marks.args[1] for key in changes}
    assert tried == {field.name for field in dataclasses.fields(EvipConfig)}


def test_stages_are_shared_if_and_only_if_all_up_to_them_is_equal(config: Path):
    keys = ("stages.s0.seed", "stages.s1_1.seed", "stages.s2.seed")
    chains = {choice: digests(config, dict(zip(keys, choice))) for choice in itertools.product((1, 2), repeat=3)}
    for one, other in itertools.combinations(chains, 2):
        for place, folder in enumerate(("s0", "s1_1", "s2"), 1):
            assert (chains[one][folder] == chains[other][folder]) == (one[:place] == other[:place])


def test_a_config_of_one_stage(tmp_path: Path, write_sweep: Callable[[str], Path]):
    (tmp_path / "one.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    data = {'sources': [{'spec': {'kind': 'text', 'paths': 'x'}}], 'tokenizer': 't', 'visual_tokens': 0}\n"
        "    return ConfigDict({'stage': 'S0', 'steps': 4, 'model': {'preset': 'tiny_lm'}, 'data': data})\n"
    )
    file = write_sweep(f"CONFIG = {str(tmp_path / 'one.py')!r}\ndef sweep(add): add('a', {{'steps': 2}}, seeds=2)\n")
    first, second = plans(read_sweep(file))
    assert [link.folder for link in first.stages] == ["run"] and first.stages != second.stages
    assert (second.config.seed, second.config.data.seed, second.config.steps) == (1, 1, 2)
