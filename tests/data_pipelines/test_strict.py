from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from data_pipelines import strict
from data_pipelines.errors import DataError
from data_pipelines.strict import field


class OtherError(Exception):
    pass


@dataclasses.dataclass(frozen=True)
class Source:
    name: str = field(help="label")
    weight: float | None = field(None, gt=0, help="share")
    spec: Mapping[str, Any] = field(default_factory=dict, help="what to open")


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float | None = field(None, gt=0, help="peak")
    b1: float = field(0.9, ge=0, lt=1, help="decay of the mean")
    warmup_steps: int = field(0, ge=0, help="steps")
    schedule: Literal["constant", "cosine"] | None = field(None, help="after the warm-up")
    rates: Mapping[str, float] = field(default_factory=dict, gt=0, choices=("text", "visual"), help="per group")

    def __post_init__(self) -> None:
        strict.check(self, "optim")
        if self.schedule == "constant" and self.warmup_steps > 100:
            raise DataError(f"warmup_steps is {self.warmup_steps}: too many")
        if self.b1 == 0.5:
            raise DataError("odd settings")
        if self.b1 == 0.25:
            raise DataError("optim.b1 is 0.25: no")


@dataclasses.dataclass(frozen=True)
class Run:
    stage: str = field(choices=("S0", "S1.1"), help="stage")
    steps: int | None = field(None, ge=1, help="updates", on_resume="free")
    remat: Literal["none", "full"] = field("none", help="recomputation")
    flag: bool = field(False, help="a switch")
    optim: Optim = field(default_factory=Optim, help="the optimizer", on_resume="free")
    vision: Optim | None = field(None, help="another section")
    sources: tuple[Source, ...] = field((), help="where data comes from")
    paths: str | list[str] = field("", help="one or more")
    pair: tuple[int, str] = field((1, "a"), help="two")
    ways: Literal["auto"] | int = field("auto", ge=1, help="auto or a number")
    stages: Mapping[str, Optim] = field(default_factory=dict, help="several sections")
    extra: Any = field(None, help="anything")
    model: Changes = field(default_factory=dict, help="changes")
    many: Mapping[str, strict.Part[Optim]] = field(default_factory=dict, help="more changes")


Changes = strict.Part[Run, "preset"]


def run(**values: Any) -> Run:
    return strict.build(Run, {"stage": "S0", **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage": "S2"}, "config.stage is 'S2': did you mean 'S0'?"),
        ({"stage": "x"}, "config.stage is 'x': valid: S0, S1.1"),
        ({"stage": 3}, "config.stage is 3: it must be 'S0' or 'S1.1'"),
        ({"steps": 0}, "config.steps is 0: it must be None or a whole number, at least 1"),
        ({"steps": 2e3}, "config.steps is 2000.0: it must be a whole number, at least 1 (write 2000)"),
        ({"steps": True}, "config.steps is True: it must be None or a whole number, at least 1"),
        ({"steps": "7"}, "config.steps is '7': it must be None or a whole number, at least 1"),
        ({"flag": "no"}, "config.flag is 'no': it must be True or False"),
        ({"flag": 0}, "config.flag is 0: it must be True or False"),
        ({"flag": 1}, "config.flag is 1: it must be True or False"),
        ({"remat": "ful"}, "config.remat is 'ful': did you mean 'full'?"),
        ({"remat": True}, "config.remat is True: it must be 'none' or 'full'"),
        ({"optim": 3}, "config.optim is 3: it must be a mapping with keys learning_rate, b1, "),
        ({"optim": None}, "config.optim is None: it must be a mapping with keys learning_rate, b1, "),
        ({"optim": [1]}, "config.optim is [1]: it must be a mapping with keys learning_rate, b1, "),
        ({"optim": {"b1": 1}}, "config.optim.b1 is 1: it must be a number, at least 0 and below 1"),
        ({"optim": {"b1": math.nan}}, "config.optim.b1 is nan: it must be a number, at least 0 and below 1"),
        ({"optim": {"learning_rate": "abc"}}, "config.optim.learning_rate is 'abc': it must be None or a number"),
        ({"optim": {"learning_rate": math.inf}}, "config.optim.learning_rate is inf: it must be"),
        ({"optim": {"learning_rate": 10**400}}, "config.optim.learning_rate is 1000"),
        ({"optim": {"warmup_steps": 3.0}}, "config.optim.warmup_steps is 3.0: it must be a whole number, at least 0 ("),
        ({"optim": {"lerning_rate": 1}}, "config.optim: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"learning_rate": 1}, "config: unknown key 'learning_rate'; did you mean 'config.optim.learning_rate'?"),
        ({"vision": {"remat": "full"}}, "config.vision: unknown key 'remat'; did you mean 'config.remat'?"),
        ({3: 1}, "config: unknown key 3; valid: extra, "),
        ({"optim": {"rates": {"txt": 1}}}, "config.optim.rates: unknown key 'txt'; did you mean 'text'?"),
        ({"optim": {"rates": {"text": -1}}}, "config.optim.rates.text is -1: it must be a number, above 0"),
        ({"optim": {"rates": {5: 1}}}, "config.optim.rates: key 5 must be a string"),
        ({"optim": {"rates": [1]}}, "config.optim.rates is [1]: it must be a mapping with keys 'text' or 'visual'"),
        ({"vision": 3}, "config.vision is 3: it must be None or a mapping with keys"),
        ({"vision": {"b1": 2}}, "config.vision.b1 is 2: it must be a number"),
        ({"sources": 3}, "config.sources is 3: it must be a list (each item a mapping with keys name, weight, spec)"),
        ({"sources": "ab"}, "config.sources is 'ab': it must be a list"),
        ({"sources": [{"weight": 1}]}, "config.sources.0.name is missing: it must be a string"),
        ({"sources": [{"name": "laion", "weight": 0}]}, "config.sources.laion.weight is 0: it must be None or a"),
        ({"sources": {"laion": {"weight": 0}}}, "config.sources.laion.weight is 0: it must be None or a"),
        ({"sources": {"laion": 3}}, "config.sources.laion is 3: it must be a mapping with keys name"),
        ({"sources": [{"name": "a", "spec": {"x": {1, 2}}}]}, "config.sources.a.spec.x is {1, 2}: it must be a plain"),
        ({"paths": ["a", 3]}, "config.paths.1 is 3: it must be a string"),
        ({"paths": 3}, "config.paths is 3: it must be a string or a list (each item a string)"),
        ({"pair": [1]}, "config.pair is [1]: it must be a list of 2 (a whole number, a string)"),
        ({"pair": [1, 2]}, "config.pair.1 is 2: it must be a string"),
        ({"ways": 0}, "config.ways is 0: it must be 'auto' or a whole number, at least 1"),
        ({"ways": "aut"}, "config.ways is 'aut': did you mean 'auto'?"),
        ({"stages": {"a": {"b1": 3}}}, "config.stages.a.b1 is 3: it must be"),
        ({"extra": {"a": [1, object]}}, "config.extra.a.1 is <class 'object'>: it must be a plain value"),
        ({"extra": math.nan}, "config.extra is nan: it must be a finite number"),
        ({"model": 3}, "config.model is 3: it must be a mapping with some of the keys preset, stage, steps, "),
        ({"model": {"presets": 3}}, "config.model: unknown key 'presets'; did you mean 'preset'?"),
        ({"model": {"preset": object}}, "config.model.preset is <class 'object'>: it must be a plain value"),
        ({"model": {"steps": 0}}, "config.model.steps is 0: it must be None or a whole number, at least 1"),
        ({"model": {"optim": {"b1": 3}}}, "config.model.optim.b1 is 3: it must be a number, at least 0 and below 1"),
        ({"model": {"optim": {"b": 3}}}, "config.model.optim: unknown key 'b'; did you mean 'b1'?"),
        ({"model": {"vision": {"b1": 3}}}, "config.model.vision.b1 is 3: it must be a number, at least 0 and below 1"),
        ({"model": {"vision": 3}}, "config.model.vision is 3: it must be None or a mapping with keys"),
        ({"model": {"sources": [{}]}}, "config.model.sources.0.name is missing"),
        ({"many": {"a": {"b1": 3}}}, "config.many.a.b1 is 3: it must be a number, at least 0 and below 1"),
        ({"many": {"a": 3}}, "config.many.a is 3: it must be a mapping with some of the keys learning_rate, b1"),
        ({"optim": {"schedule": "constant", "warmup_steps": 101}}, "config.optim.warmup_steps is 101: too many"),
        ({"optim": {"b1": 0.5}}, "config.optim: odd settings"),
        ({"optim": {"b1": 0.25}}, "config.optim.b1 is 0.25: no"),
        ({"paths": "x" * 500 + "\n", "steps": "\n" + "x" * 500}, "config.steps is '\\nxxx"),
        ({"a\nb": 1}, "config: unknown key 'a\\nb'; valid: "),
        ({"stages": {"a\nb": 1}}, "config.stages.'a\\nb' is 1: it must be a mapping"),
        ({"flag": np.array([1, 2])}, "config.flag is array([1, 2]): it must be True or False"),
        ({"remat": np.array([1, 2])}, "config.remat is array([1, 2]): it must be 'none' or 'full'"),
    ],
)  # fmt: skip
def test_errors_name_the_key_the_value_and_what_is_expected(values: dict, message: str):
    with pytest.raises(DataError) as caught:
        strict.build(Run, {"stage": "S0", **values})
    text = str(caught.value)
    assert text.startswith(message) and "\n" not in text and len(text) < 300


def test_the_error_class_and_the_name_in_front_are_the_callers():
    with pytest.raises(OtherError, match=r"^stage is missing: it must be 'S0' or 'S1\.1'$"):
        strict.build(Run, {}, "", OtherError)
    with pytest.raises(OtherError, match=r"^config is 3: it must be a mapping with keys stage, "):
        strict.build(Run, 3, "", OtherError)  # type: ignore[arg-type]
    with pytest.raises(OtherError, match=r"^run\.optim\.b1 is 0\.25: no$"):  # __post_init__ raises DataError
        strict.build(Run, {"stage": "S0", "optim": {"b1": 0.25}}, "run", OtherError)


def test_values_become_the_annotated_types():
    made = run(
        optim={"learning_rate": 1, "rates": {"text": 2}},
        sources=[{"name": "a", "spec": {"paths": (Path("x"), "y")}}],
        paths=("a", "b"),
        pair=[2, "b"],
        ways=3,
        vision={},
        remat=None,  # what the command line makes of "none"
    )
    assert made == Run(
        stage="S0",
        optim=Optim(learning_rate=1.0, rates={"text": 2.0}),
        sources=(Source("a", spec={"paths": ["x", "y"]}),),
        paths=["a", "b"],
        pair=(2, "b"),
        ways=3,
        vision=Optim(),
    )
    assert type(made.optim.learning_rate) is float and type(made.optim.rates["text"]) is float
    assert run(sources={"a": {"weight": 2}}) == run(sources=[{"name": "a", "weight": 2.0}])
    assert run(optim=made.optim).optim is made.optim


def test_a_part_has_some_keys_and_stays_a_mapping():
    made = run(model={"preset": "big", "optim": {"learning_rate": 1}, "vision": None, "sources": {"a": {"weight": 1}}})
    assert made.model == {
        "preset": "big",
        "optim": {"learning_rate": 1.0},
        "vision": None,
        "sources": [{"name": "a", "weight": 1.0, "spec": {}}],
    }
    old, new = (strict.to_dict(run(model=model)) for model in ({"optim": {}}, {"optim": {"b1": 0.9}, "flag": False}))
    assert strict.changes(old, new, Run) == [
        ("model.optim.b1", None, 0.9, "free"),
        ("model.flag", None, False, "fixed"),
    ]


def test_config_dicts_references_and_numpy_scalars_are_the_values_they_hold():
    config = config_dict.ConfigDict({"stage": "S0", "steps": config_dict.placeholder(int), "optim": {}})
    config.sources = [config_dict.ConfigDict({"name": "b"})]
    config.optim.warmup_steps = config.get_ref("steps") * 2
    config.steps = 3
    assert strict.build(Run, config) == run(steps=3, optim={"warmup_steps": 6}, sources=[{"name": "b"}])
    config.steps = -1
    with pytest.raises(DataError, match=r"config\.steps is -1: "):
        strict.build(Run, config)
    config = config_dict.ConfigDict({"stage": "S0", "steps": config_dict.required_placeholder(int)})
    with pytest.raises(DataError, match=r"^config\.steps has no value: "):
        strict.build(Run, config)
    assert strict.build(Run, config_dict.FrozenConfigDict({"stage": "S0", "paths": ["a"]})).paths == ["a"]
    made = run(
        steps=np.int32(3), flag=np.bool_(True), optim={"b1": np.float64(0.5) / 2 + 0.25 + 0.1}, paths=np.str_("a")
    )
    assert [type(value) for value in (made.steps, made.flag, made.optim.b1, made.paths)] == [int, bool, float, str]


def test_a_dataclass_made_by_hand_is_checked_too():
    made = Optim(learning_rate=1, rates=config_dict.ConfigDict({"text": 1}))
    assert type(made.learning_rate) is float and made.rates == {"text": 1.0}
    with pytest.raises(DataError, match=r"^optim\.b1 is 1\.5: it must be a number, at least 0 and below 1$"):
        Optim(b1=1.5)


names = st.text() | st.sampled_from(["name", "weight", "spec", "b1", "text", "rates"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["S0", "none", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*(f.name for f in dataclasses.fields(Run)), "optm", ""])


@settings(deadline=None, max_examples=1000)
@given(st.dictionaries(keys, json_values, max_size=4) | json_values)
def test_any_json_value_builds_or_is_refused_in_one_line(values: Any):
    for given_values in (values, {"stage": "S0", **values} if isinstance(values, dict) else values):
        try:
            made = strict.build(Run, given_values)
        except DataError as error:
            assert len(str(error).splitlines()) == 1 and str(error).startswith("config")
        else:
            assert strict.build(Run, json.loads(json.dumps(strict.to_dict(made), allow_nan=False))) == made


def test_to_dict_is_the_inverse_of_build():
    made = run(
        optim={"rates": {"text": 1}}, sources={"a": {}, "b": {"weight": 2}}, stages={"x": {}}, extra=[{"a": None}]
    )
    values = strict.to_dict(made)
    assert json.loads(json.dumps(values)) == values
    assert strict.build(Run, values) == made


def test_changes_know_what_a_resumed_run_may_change():
    old = strict.to_dict(run(optim={"b1": 0.1}, sources={"a": {}, "b": {"weight": 1}}, extra={"x": 1}))
    new = strict.to_dict(
        run(optim={"b1": 0.2}, sources={"a": {}, "b": {"weight": 2}}, steps=3, extra={"x": 2}, vision={"b1": 0.1})
    )
    assert strict.changes(old, new, Run) == [
        ("steps", None, 3, "free"),
        ("optim.b1", 0.1, 0.2, "free"),
        ("vision", None, new["vision"], "fixed"),
        ("sources.b.weight", 1.0, 2.0, "fixed"),
        ("extra.x", 1, 2, "fixed"),
    ]
    assert strict.changes(old, old, Run) == []
    del old["optim"]["b1"], old["paths"], old["flag"]  # written before these fields existed: defaults
    assert [change.key for change in strict.changes(old, strict.to_dict(run(**old)), Run)] == []
    order = dict(old, sources=old["sources"][::-1])
    assert [change.key for change in strict.changes(old, order, Run)] == ["sources"]
    assert strict.changes({"gone": 1}, {}, Run) == [("gone", 1, None, "fixed")]


def test_the_reference_has_a_row_for_every_field():
    rows = {row.key: row for row in strict.reference(Run)}
    assert list(rows)[:6] == ["stage", "steps", "remat", "flag", "optim", "optim.learning_rate"]
    assert rows["stage"] == ("stage", "a string", "required", "'S0', 'S1.1'", "stage", "fixed", False)
    assert rows["steps"] == ("steps", "None or a whole number", "None", "at least 1", "updates", "free", False)
    assert rows["optim"] == ("optim", "a section", "", "", "the optimizer", "free", True)
    assert rows["optim.b1"][:5] == ("optim.b1", "a number", "0.9", "at least 0 and below 1", "decay of the mean")
    assert rows["optim.b1"].on_resume == "free"
    assert rows["optim.rates"].limits == "above 0; 'text', 'visual'"
    assert rows["optim.rates"].type == "a mapping (each value a number)"
    assert rows["vision"].default == "None" and rows["vision.b1"].on_resume == "fixed"
    assert rows["sources.NAME.weight"].type == "None or a number" and "stages.NAME.b1" in rows
    assert rows["extra"].type == "any plain value" and rows["model"].type == "a mapping with keys of Run"
    assert [key for key, row in rows.items() if row.section] == ["optim", "vision", "sources", "stages"]


def test_it_is_a_leaf():
    code = (
        "import sys, data_pipelines.strict; print([m for m in ('numpy', 'jax', 'ml_collections') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
