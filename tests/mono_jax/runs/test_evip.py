"""Configs of the stages of a sequence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io.publish import write_json
from mono_jax.errors import ConfigError, MonoJaxError
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.runs import evip as module
from mono_jax.runs import scoring
from mono_jax.runs.config import EvipConfig
from mono_jax.runs.evip import Evip, run_and_report
from mono_jax.runs.heldout import Heldout
from mono_jax.runs.sets import with_heldout
from mono_jax.runs.sweeping.running import SharingEvip
from mono_jax.weights.model_folder import Origin, companion_files, model_config, read_origin, save_model
from mono_jax.weights.prompt_format import PromptFormat


@pytest.fixture
def evip(tmp_path: Path, golden_dir: Path) -> Evip:
    data = {"sources": [{"spec": {"kind": "text", "paths": "x"}}], "tokenizer": str(golden_dir / "chat")}
    stages = {"a": {"stage": "S1.1", "steps": 1}, "b": {"stage": "S2", "steps": 1}}
    common = {"model": {"preset": "tiny_mono", "rope_theta": 5e5}}
    config = EvipConfig.from_dict({"stages": stages, "common": common, "data": data, "vision": {"image_size": 56}})
    return Evip(config, tmp_path, {"tokenizer": None, "stages": {}, "heldout": {}})


def test_stages_hand_on_masters_and_the_last_leaves_as_the_base_came(evip: Evip):
    assert [evip.stage_config(name, "init").save_dtype for name in ("a", "b")] == ["float32", "source"]
    evip.config.stages["a"]["save_dtype"] = "bfloat16"
    assert evip.stage_config("a", "init").save_dtype == "bfloat16"


def test_sections_for_all_stages_are_joined_with_those_of_a_stage():
    """Each key of ``common.optim`` counts that a stage's ``optim`` does not have."""
    stages = {
        "a": {"stage": "S1.1", "optim": {"learning_rate": 1.0}, "data": {"batch_size": 4}, "steps": 1},
        "b": {"stage": "S2", "model": {"rope_theta": 1.0}, "evaluation": {"every": 5}},
    }
    common = {
        "optim": {"learning_rate": 2.0, "clip_norm": 3.0},
        "data": {"block_samples": 7},
        "model": {"preset": "tiny_mono", "rms_norm_eps": 1.0},
        "evaluation": {"batches": 3},
        "steps": 9,
    }
    data = {"batch_size": 8, "text_tokens": 100}
    config = EvipConfig.from_dict({"stages": stages, "common": common, "data": data})
    shared = {"block_samples": 7, "text_tokens": 100}
    assert config.stage_values("a", "before") == {
        "stage": "S1.1",
        "steps": 1,
        "init": "before",
        "save_dtype": "float32",
        "model": {"rms_norm_eps": 1.0},
        "optim": {"learning_rate": 1.0, "clip_norm": 3.0},
        "evaluation": {"batches": 3},
        "data": shared | {"batch_size": 4},
    }
    assert config.stage_values("b", "") == {
        "stage": "S2",
        "steps": 9,
        "init": "",
        "optim": common["optim"],
        "data": shared | {"batch_size": 8},
        "model": {"preset": "tiny_mono", "rms_norm_eps": 1.0, "rope_theta": 1.0},
        "evaluation": {"batches": 3, "every": 5},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {"s2": {"trains": ["atention"]}}}, "stage s2: .*did you mean 'attention'"),
        ({"visual_experts": False}, "stage s1_1: .*'visual_experts'.* does not have"),
        ({"replay": {"s2": {"s9": 0.1}}}, r"stage s2: .*config\.replay\.s2 's9'"),
        ({"stages": {"s2": {"evaluation": {"tasks": {"nope": {}}}}}}, r"stage s2: .*evaluation\.tasks\.nope"),
        ({"stages": {"s2": {"data": {"batch_size": 3}}}}, "stage s2: data.batch_size is 3: it must be a multiple of 2"),
        (
            {"stages": {"s2": {"evaluation": {"data": {"batch_size": 3}, "sources": {"text": None}}}}},
            r"stage s2: config\.evaluation\.data\.batch_size is 3",
        ),
        ({"scores": {"s2": "s9"}}, "stage s2: s9: no such folder"),
        ({"stages": {"s2": {"steps": None}}}, "stage s2: .*config.steps and config.epochs: give one"),
        ({"init": "nowhere"}, "nowhere: no such folder"),
    ],
)
@pytest.mark.parametrize("kind", [Evip, SharingEvip])
def test_nothing_is_built_or_trained_if_a_later_stage_would_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str, kind: type[Evip]
):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    base = {"stage": "S0", "model": {"preset": "tiny_lm"}, "data": {"visual_tokens": 0}}
    stages = {"s0": base, "s1_1": {"stage": "S1.1"}, "s2": {"stage": "S2"}}
    for folder, own in changes.get("stages", {}).items():
        stages[folder] = stages[folder] | own
    values = {"sets": {"kind": "demo"}, "common": {"steps": 2}, "data": {"batch_size": 4}, "vision": {"image_size": 56}}
    config = EvipConfig.from_dict({**values, **changes, "stages": stages})
    monkeypatch.setattr(module, "prepare_sets", lambda *_: pytest.fail("sets are built"))
    with pytest.raises(MonoJaxError, match=message):
        run_and_report(config, tmp_path / "run", kind)
    assert not (tmp_path / "run").exists()


def test_keys_that_every_stage_replaces_are_named(tmp_path: Path):
    """They have no effect, for example a rate for all stages in the demo."""
    stages = {
        "a": {"stage": "S1.1", "steps": 1, "optim": {"learning_rate": 1.0}, "data": {"batch_size": 4, "seed": 1}},
        "b": {"stage": "S2", "steps": 2, "optim": {"learning_rate": 2.0, "clip_norm": 1.0}, "data": {"batch_size": 5}},
    }
    common = {"steps": 3, "log_every": 1, "optim": {"learning_rate": 3.0, "clip_norm": 2.0}, "data": {"max_tiles": 1}}
    data = {"batch_size": 8, "text_tokens": 100, "seed": 2, "max_tiles": 2}
    config = EvipConfig.from_dict({"stages": stages, "common": common, "data": data, "sets": {"kind": "nowhere"}})
    said: list[str] = []
    with pytest.raises(ConfigError, match="nowhere"):
        Evip.open(config, tmp_path, said.append)
    keys = ("common.steps", "common.optim.learning_rate", "common.data.max_tiles", "data.batch_size")
    assert said == [f"NOTE: config.{key} has no effect, since every stage has its own" for key in keys]


def test_what_is_mixed_into_sources_of_the_sets_has_no_effect_on_a_stage_with_its_own(tmp_path: Path):
    own = {"sources": [{"spec": {"kind": "text", "paths": "x"}}]}
    stages = {"a": {"stage": "S1.1"}, "b": {"stage": "S2", "data": own}}
    mixed = {"replay": {"a": {"s0": 0.1}, "b": {"s0": 0.1}}, "scores": {"b": "a"}, "filters": {"b": {"min_size": 8}}}
    values = {"stages": stages, "sets": {"kind": "nowhere"}}
    said: list[str] = []
    with pytest.raises(ConfigError, match="nowhere"):
        Evip.open(EvipConfig.from_dict(values | mixed), tmp_path, said.append)
    why = "has no effect, since b has sources of its own, not those of the sets"
    assert said == [f"NOTE: config.{key}.b {why}" for key in ("replay", "scores", "filters")]


EXPERTS = [(False, False), (True, False), (True, True)]  # in the FFN, in attention


@pytest.mark.parametrize(("has_ffn", "has_attention"), EXPERTS)
@pytest.mark.parametrize(("ffn", "attention"), EXPERTS)
def test_a_base_gets_the_experts_that_it_lacks(
    evip: Evip, has_ffn: bool, has_attention: bool, ffn: bool, attention: bool
):
    """Also those of attention alone, as from Mono-InternVL to 1.5; none is taken away."""
    base = preset("tiny_mono", visual_ffn_experts=has_ffn, visual_attention_experts=has_attention)
    config = dataclasses.replace(evip.config, visual_experts=ffn, attention_experts=attention)
    found = dataclasses.replace(evip, config=config).with_vision("there", base)
    experts = {"visual_ffn_experts": has_ffn or ffn, "visual_attention_experts": has_attention or attention}
    assert found == base.replace(**experts)


def test_a_common_preset_is_that_of_the_stage_without_weights(evip: Evip):
    assert evip.stage_config("a", "init").model == {"rope_theta": 5e5}
    assert evip.stage_config("a", "").model["preset"] == "tiny_mono"


def test_embedded_experts_keep_what_the_base_says(evip: Evip, tmp_path: Path):
    """From a workdir: its prompt format, dtype, unknown keys of config.json and companions."""
    with pytest.raises(ConfigError, match=r"config\.init is missing"):
        evip.with_experts("")
    config = preset("tiny_lm")
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), Model(config).init(jax.random.key(0)))
    origin = Origin({"model_type": "internlm2", "bos_token_id": 1}, PromptFormat(max_tiles=2), "bfloat16")
    save_model(tmp_path / "s0" / "model", config, params, origin=origin)
    (tmp_path / "s0" / "model" / "generation_config.json").write_text("{}")
    mono = Path(evip.with_experts(str(tmp_path / "s0")))
    found = read_origin(mono)
    assert (found.prompt, found.dtype) == (origin.prompt, "bfloat16")
    assert found.config_json["llm_config"]["bos_token_id"] == 1
    assert (found.config_json["torch_dtype"], found.config_json["max_dynamic_patch"]) == ("bfloat16", 2)
    assert [file.name for file in companion_files(mono)] == ["generation_config.json"]
    tokenizer = Tokenizer(evip.tokenizer())
    assert model_config(mono).visual_ffn_experts and model_config(mono).vocab_size == tokenizer.vocab_size
    assert evip.with_experts(str(mono)) == str(mono)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"step": 3}'])
def test_damaged_summaries_are_made_again(evip: Evip, monkeypatch: pytest.MonkeyPatch, content: bytes):
    """Also the loss before the stage, and the stage itself decides whether it is finished."""
    asked = []

    def run_stage(run, workdir, base_dir, shared_cache, base_losses):
        asked.append(workdir.place.name)
        return {"step": 1, "loss": 2.0, "model": "model", "skipped_updates": 0, "best": None, "data": {}}

    monkeypatch.setattr(module, "run_stage", run_stage)
    monkeypatch.setattr(module, "open_model", lambda folder, verify: (preset("tiny_lm"), {}, {}))
    monkeypatch.setattr(module, "parameter_counts", lambda *_: {})
    monkeypatch.setattr(Heldout, "text_loss", lambda *_: 4.0)
    first = evip.run_stage("a", "init")
    assert evip.run_stage("a", "init") == first and asked == ["a"], "finished"
    for name in ("summary.json", "text_loss_before.json"):
        (evip.workdir / "a" / name).write_bytes(content)
    again = evip.run_stage("a", "init")
    assert asked == ["a", "a"] and again.keys() == first.keys()
    assert (again["text_loss_before"], again["text_loss_after"]) == (4.0, 4.0)
    assert evip.run_stage("a", "init")["config"] == first["config"] and asked == ["a", "a"]


def test_a_stage_without_a_finite_loss_is_finished(evip: Evip):
    config, said = evip.stage_config("a", "init").to_dict(), []
    summary = {"config": config, "steps": 3, "loss": None, "text_asked": evip.heldout.asked("text")}
    write_json(evip.workdir / "a" / "summary.json", summary)
    assert dataclasses.replace(evip, say=said.append).run_stage("a", "init")["loss"] is None
    assert said == ["finished: 3 steps, loss unknown"]


def test_the_last_stage_is_asked_more_and_nothing_twice(evip: Evip):
    evip.manifest["heldout"] = {"captions": {}, "questions": {}, "text": ""}
    assert evip.unasked("a", {}) == ["captions"] and evip.unasked("b", {}) == ["captions", "questions"]
    summary = {"evaluation": {"captions": {"asked": evip.heldout.asked("captions")}}}
    assert evip.unasked("b", summary) == ["questions"]
    del evip.config.stages["b"]
    assert evip.unasked("a", summary) == ["questions"], "trained for another sequence of stages"


@pytest.mark.parametrize(
    ("change", "asks"),
    [
        ({}, ""),
        ({"heldout_questions": 3}, "captions questions"),
        ({"answer_tokens": 3}, "captions questions"),
        ({"gallery": 3}, "captions questions"),
        ({"heldout_batches": 3}, "text"),
        ({"heldout_batches": 3, "gallery": 3}, "text captions questions"),
        ({"captions": {"path": "others"}}, "captions"),
        ({"text": "other.txt"}, "text"),
    ],
)
def test_a_finished_stage_is_measured_again_only_where_it_is_asked_otherwise(
    evip: Evip, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], asks: str
):
    """Without training, and with the results of the settings now."""
    did: list[str] = []

    def run_stage(run, workdir, **_):
        did.append("train")
        return {"step": 1, "loss": 2.0, "model": "model", "skipped_updates": 0, "best": None, "data": {}}

    def text_loss(self: Heldout, *_) -> float:
        did.append("text")
        return float(self.config.heldout_batches or 9)

    def answers(self: Heldout, model, run, names):
        did.extend(names)
        return {name: {"answers": self.config.heldout_questions} for name in names}

    monkeypatch.setattr(module, "run_stage", run_stage)
    monkeypatch.setattr(module, "open_model", lambda folder, verify: (preset("tiny_lm"), {}, {}))
    monkeypatch.setattr(module, "parameter_counts", lambda *_: {})
    monkeypatch.setattr(Heldout, "text_loss", text_loss)
    monkeypatch.setattr(Heldout, "answers", answers)
    evip.manifest["heldout"] = {"captions": {}, "questions": {}, "text": "text.txt"}
    first = evip.run_stage("b", "init")
    assert did == ["text", "train", "text", "captions", "questions"]
    did.clear()
    keys = {key: value for key, value in change.items() if key not in evip.manifest["heldout"]}
    sets = {key: value for key, value in change.items() if key not in keys}
    manifest = {**evip.manifest, "heldout": evip.manifest["heldout"] | sets}
    other = Evip(dataclasses.replace(evip.config, **keys), evip.workdir, manifest)
    found = other.run_stage("b", "init")
    assert did == asks.replace("text", "text text").split(), "text before and after"
    assert found["text_loss_before"] == found["text_loss_after"] == keys.get("heldout_batches", 9)
    assert {graded["answers"] for graded in found["evaluation"].values()} == {keys.get("heldout_questions")}
    did.clear()
    assert other.run_stage("b", "init") == found and did == []
    assert evip.run_stage("b", "init") == first, "another unit of a sweep has asked otherwise in between"


def test_a_summary_has_only_what_this_sequence_of_stages_asks(evip: Evip):
    evip.manifest["heldout"] = {"captions": {}, "questions": {}}
    config = evip.stage_config("a", "init").to_dict()
    graded = {name: {"asked": evip.heldout.asked(name)} for name in ("captions", "questions")}
    summary = {
        "config": config,
        "steps": 3,
        "loss": 2.0,
        "text_asked": evip.heldout.asked("text"),
        "evaluation": graded,
    }
    write_json(evip.workdir / "a" / "summary.json", summary)
    assert list(evip.run_stage("a", "init")["evaluation"]) == ["captions"]


def test_what_is_measured_on_the_way_comes_from_the_sets(evip: Evip):
    """Sources that are None and tasks without a path; all stages after the first are compared with its base."""
    asked = {"path": "q.jsonl", "image_root": "images", "samples": 3}
    evip.manifest["heldout"] = {"text": "prose.txt", "captions": {**asked, "path": "c.jsonl"}, "questions": asked}
    own = {"kind": "text", "paths": "own.txt"}
    evaluation = {"sources": {"text": None, "captions": None, "own": own}, "tasks": {"questions": {"examples": 2}}}
    stages = {"s0": {"stage": "S0", "steps": 1}, **evip.config.stages}
    stages["a"] = {**stages["a"], "evaluation": evaluation}
    evip = dataclasses.replace(evip, config=dataclasses.replace(evip.config, stages=stages))
    found = evip.stage_config("a", "init").evaluation
    captions = {"kind": "jsonl", "paths": "c.jsonl", "image_root": "images"}
    assert found.sources == {"text": "prose.txt", "captions": captions, "own": own}
    task = found.tasks["questions"]
    assert (task.path, task.image_root, task.examples) == ("q.jsonl", "images", 2)
    first = evip.place("a") / "evaluation/base.json"
    assert [evip.base_losses(name) for name in stages] == [None, None, first]
    assert with_heldout(evaluation, None)["sources"].keys() == evaluation["sources"].keys()
    benchmark = {"benchmark": "mme", "data": "folder"}
    assert with_heldout({"tasks": {"mme": benchmark}}, evip.manifest["heldout"])["tasks"] == {"mme": benchmark}
    for wrong, message in (
        ({"sources": {"pairs": None}}, r"evaluation\.sources\.pairs"),
        ({"tasks": {"text": {}}}, r"evaluation\.tasks\.text: prose\.txt is plain text"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_heldout(wrong, evip.manifest["heldout"])


def test_sources_of_other_stages_are_mixed_in(evip: Evip):
    spec = {"kind": "text", "paths": "x"}
    evip.manifest["stages"] = {
        "a": {"sources": [{"name": "pairs", "spec": spec, "weight": 3}, {"name": "ocr", "spec": spec, "weight": 1}]},
        "b": {"sources": [{"name": "talk", "spec": spec}]},
        "s0": {"sources": [{"name": "books", "spec": spec}, {"name": "chat", "spec": spec}]},
    }
    del evip.config.data["sources"]
    config = dataclasses.replace(evip.config, replay={"a": {"s0": 0.2}, "b": {"s0": 0.1, "a": 0.4}})
    mixed = dataclasses.replace(evip, config=config)
    found = {
        stage: {source.name: source.weight for source in mixed.stage_config(stage, "init").data.sources}
        for stage in ("a", "b")
    }
    assert found["a"] == pytest.approx({"pairs": 0.6, "ocr": 0.2, "s0_books": 0.1, "s0_chat": 0.1})
    shares = {"s0_books": 0.05, "s0_chat": 0.05, "a_pairs": 0.3, "a_ocr": 0.1}
    assert found["b"].pop("talk") is None and found["b"] == pytest.approx(shares)
    config = dataclasses.replace(evip.config, replay={"b": {"a": 1}}, filters={"b": {"min_size": 8}})
    others = dataclasses.replace(evip, config=config).mixed_sources("b")
    filtered = {**spec, "filters": {"min_size": 8}}
    assert others == [
        {"name": "a_pairs", "spec": filtered, "weight": 0.75},
        {"name": "a_ocr", "spec": filtered, "weight": 0.25},
    ]


@pytest.mark.parametrize(("named", "expected"), [("a", "a/model"), ("models/base", "models/base")])
def test_filters_have_the_scores_of_the_model_that_is_named(
    evip: Evip, monkeypatch: pytest.MonkeyPatch, named: str, expected: str
):
    calls = []

    def with_scores(sources, data, model, *_):
        calls.append((str(model), data.text_tokens, [source.name for source in data.sources]))
        return [{**source, "spec": {**source["spec"], "scores": "file"}} for source in sources]

    monkeypatch.setattr(scoring, "with_scores", with_scores)
    evip.manifest["stages"] = {"b": {"sources": [{"name": "talk", "spec": {"kind": "text", "paths": "x"}}]}}
    del evip.config.data["sources"]
    evip.config.stages["b"]["data"] = {"text_tokens": 77}
    config = dataclasses.replace(evip.config, scores={"b": named}, filters={"b": {"max_loss": "50%"}})
    [source] = dataclasses.replace(evip, config=config).stage_config("b", "init").data.sources
    assert source.spec["scores"] == "file" and source.spec["filters"] == {"max_loss": "50%"}
    [(model, *others)] = calls
    assert model.endswith(expected) and others == [77, ["talk"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay": {"c": {"s0": 0.1}}}, r"config\.replay.*'c'"),
        ({"replay": {"b": {"s0": 1.1}}}, r"replay\.b: shares sum to 1.1"),
        ({"filters": {"c": {"min_size": 8}}}, r"config\.filters.*'c'"),
        ({"filters": {"b": {"max_loss": 2}}}, r"config\.filters\.b.*'max_loss'"),
        ({"scores": {"c": "a"}}, r"config\.scores.*'c'"),
        ({"scores": {"a": "b"}}, r"config\.scores\.a is 'b': name an earlier stage"),
        ({"filters": {"b": {"min_sise": 8}}}, r"config\.filters\.b.*'min_sise'.*'min_size'"),
    ],
)
def test_replay_and_filters_that_cannot_be_are_named(evip: Evip, changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(evip.config, **changes)
