from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mono_jax import cli
from mono_jax.errors import ConfigError
from mono_jax.runs import config_file
from mono_jax.runs.config import EvipConfig

TEXT = """
from ml_collections import ConfigDict
def get_config(arg="a"):
    return ConfigDict({"steps": 1, "rate": 0.5, "name": arg, "data": {"rows": 2, "none": None}})
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(TEXT)
    return path


def parse(*argv: str) -> dict:
    return config_file.parse(cli.parser("test"), argv)[1]


def test_overrides_reach_every_key(file: Path):
    values = parse(
        f"--config={file}:b", "--config.steps=7", "--config.data.none=3", "--config.data.new.key=[1,2]",
        "--config.rate=1", "--config.flag=true",
    )  # fmt: skip
    assert values == {
        "steps": 7,
        "rate": 1,
        "name": "b",
        "flag": True,
        "data": {"rows": 2, "none": 3, "new": {"key": [1, 2]}},
    }
    assert parse(f"--config={file}", "--config.name=12")["name"] == "12"  # a string stays one
    assert parse(f"--config={file}", "--config.data.rows=none")["data"]["rows"] is None


def test_a_file_is_read_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "changing.py"
    for steps in (1, 2):  # of one length, in the same second
        file.write_text(
            f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({{'n': {steps}}})\n"
        )
        os.utime(file, (1_800_000_000, 1_800_000_000))
        assert config_file.load(str(file)).n == steps


def test_keys_keep_the_order_of_the_file(tmp_path: Path):
    file = tmp_path / "stages.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    config = ConfigDict({'init': 'base', 'common': {'steps': 1}})\n"
        "    config.stages = {'second_lesson': {'stage': 'S2'}, 'first': {'stage': 'S1.1'}, 'a': {'stage': 'S1.2'}}\n"
        "    return config\n"
    )
    order = ["second_lesson", "first", "a", "new"]
    values = parse(f"--config={file}", "--config.stages.new.stage=S1.3", "--config.stages.first.steps=2")
    assert list(values["stages"]) == list(EvipConfig.from_dict(values).stages) == order
    assert list(EvipConfig.from_dict(config_file.load(str(file))).stages) == order[:3]


def test_values_that_follow_others_and_values_left_open(tmp_path: Path):
    file = tmp_path / "references.py"
    file.write_text(
        "from ml_collections import ConfigDict, config_dict\n"
        "def get_config():\n"
        "    config = ConfigDict({'steps': 4, 'data': {'rows': config_dict.required_placeholder(int)}})\n"
        "    config.warmup = config.get_ref('steps') * 2\n"
        "    return config\n"
    )
    values = parse(f"--config={file}", "--config.steps=5", "--config.data.rows=3")
    assert values == {"steps": 5, "data": {"rows": 3}, "warmup": 10}
    with pytest.raises(ConfigError, match=r"references\.py: config\.data\.rows has no value: give --config\.data"):
        parse(f"--config={file}")


def test_errors_name_file_and_key(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(ConfigError, match=r"absent\.py"):
        config_file.load(str(tmp_path / "absent.py"))
    with pytest.raises(ConfigError, match="rows holds a value"):
        parse(f"--config={file}", "--config.data.rows.x=1")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 3")
    with pytest.raises(ConfigError, match="ConfigDict"):
        config_file.load(str(broken))
    broken.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        config_file.load(str(broken))
    for wrong in ("--confg.steps=3", "--config.steps", "extra"):
        with pytest.raises(SystemExit):
            parse(f"--config={file}", wrong)
        assert "unrecognized argument" in capsys.readouterr().err


LISTS = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"data": {"sources": [{"name": "laion", "weight": 1}, {"name": "coyo", "spec": {"paths": "a"}}],
                                "sizes": [1, 2], "fixed": ({"name": "a"}, 3), "empty": []}})
"""


def test_entries_of_a_list_go_by_name_or_number(tmp_path: Path):
    file = tmp_path / "lists.py"
    file.write_text(LISTS)
    data = parse(
        f"--config={file}", "--config.data.sources.laion.weight=2.5", "--config.data.sources.1.weight=3",
        "--config.data.sources.coyo.spec.paths=12", "--config.data.sources.coyo.spec.new.key=[1]",
        "--config.data.sizes.1=7", "--config.data.fixed.1=8",
    )["data"]  # fmt: skip
    assert data["sources"] == [
        {"name": "laion", "weight": 2.5},
        {"name": "coyo", "spec": {"paths": "12", "new": {"key": [1]}}, "weight": 3},
    ]
    assert data["sizes"] == [1, 7] and data["fixed"] == [{"name": "a"}, 8]
    for wrong, words in [
        ("sources.lion.weight=1", r"--config\.data\.sources\.lion\.weight: no entry 'lion'; the list has laion, coyo"),
        ("sources.2.weight=1", "no entry '2'; the list has laion, coyo"),
        ("sizes.-1=1", "no entry '-1'; the list has 0, 1"),
        ("empty.0=1", "the list has no entries"),
        ("sizes.0.a=1", r"data\.sizes\.0 holds a value"),
    ]:
        with pytest.raises(ConfigError, match=words):
            parse(f"--config={file}", f"--config.data.{wrong}")


def test_help_config_prints_the_reference(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        config_file.parse(cli.parser("test"), ["--help-config"], reference=lambda: "all keys")
    assert stop.value.code == 0 and capsys.readouterr().out == "all keys\n"


CONFIGS = ["demo.py", "demo.py:smoke", "real.py", "real.py:smoke", "mono_internvl.py:S2,v5e-16"]


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a config that is not a mapping or list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)):
        yield key, value
    for name, inner in entries:
        yield from leaves(inner, f"{key}.{name}".lstrip("."))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_override_changes_one_key_alone(name: str):
    """Configs may use one dict in several places; a change in one place does not affect the others."""
    config = f"experiments/configs/{name}"
    before = dict(leaves(parse(f"--config={config}")))
    assert len(before) > 10
    for key in before:
        after = dict(leaves(parse(f"--config={config}", f"--config.{key}=other")))
        assert after == before | {key: "other"}


def test_field_references_are_shared_and_entries_of_lists_are_not(tmp_path: Path):
    text = """
from ml_collections import ConfigDict, FieldReference
def get_config():
    rate = FieldReference(0.1)
    both, entry = {"rate": rate}, {"rows": {"n": 1}}
    return ConfigDict({"rate": rate, "a": both, "b": both, "sources": [entry, entry]})
"""
    (tmp_path / "config.py").write_text(text)
    values = parse(f"--config={tmp_path / 'config.py'}", "--config.rate=0.5", "--config.sources.0.rows.n=7")
    assert values["a"] == values["b"] == {"rate": 0.5}
    assert [source["rows"]["n"] for source in values["sources"]] == [7, 1]
