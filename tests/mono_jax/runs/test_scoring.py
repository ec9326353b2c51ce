"""Scores of samples equal those of each sample by itself, computed from the model's logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import Sample, SampleBuilder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import DataError
from data_pipelines.sources.source import open_source
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax.errors import ConfigError
from mono_jax.evaluation.sample_losses import by_sample
from mono_jax.generation.prompts import Prompt, check_prompt, pack
from mono_jax.models.architecture import Architecture
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.runs import scoring
from mono_jax.runs.scoring import Scorer, score, with_scores
from mono_jax.weights.model_folder import load_model, save_model
from tests.data_pipelines.shard_tools import TALK, encoded, pairs, write_jsonl, write_tar
from tests.mono_jax.evaluation.test_heldout import mixed_batch
from tests.mono_jax.helpers import random_params


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path, golden_dir: Path) -> DataConfig:
    """Web pairs, one with a broken image; a conversation about an image, and one without, which has two turns."""
    write_tar(tmp_path / "pairs.tar", [*pairs(5), ("cut.jpg", encoded(90, 90)[:900]), ("cut.txt", b"words")])
    (tmp_path / "a.jpg").write_bytes(encoded())
    plain = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "nobody"}]
    talks = write_jsonl(
        tmp_path / "talks.jsonl", {"image": "a.jpg", "conversations": TALK}, {"conversations": [*plain, *plain]}
    )
    sources = {
        "pairs": {"spec": {"kind": "tar", "paths": str(tmp_path / "pairs.tar")}, "prompts": ["one", "two"]},
        "talks": {"spec": {"kind": "jsonl", "paths": str(talks), "image_root": str(tmp_path)}},
    }
    rows = {"visual_tokens": 64, "text_tokens": 160, "batch_size": 3, "max_tiles": 1, "loss_weighting": "sqrt"}
    tokenizer = str(golden_dir / "chat")
    return DataConfig.from_dict({"sources": sources, "tokenizer": tokenizer, "system_message": "", **rows})


def model_of(folder: Path, data: DataConfig, name: str) -> Architecture:
    tokenizer = Tokenizer(data.tokenizer)
    config = preset(name).replace(vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.id(IMAGE_CONTEXT))
    save_model(folder, config, jax.tree.map(np.asarray, random_params(config)))
    return config


def alone(folder: Path, ids: np.ndarray, mask: np.ndarray, sample: Sample | None = None) -> float:
    """Mean of -log p over the ids where ``mask`` is 1, in float64, from the logits of the sample by itself."""
    config, params = load_model(folder)
    prompt = Prompt(ids) if sample is None else Prompt(ids, sample.patches, sample.patch_cells)
    batch, _ = pack(config, [check_prompt(config, prompt, "")], np.zeros(1, np.int64), rows=1)
    model = Model(config)
    logits = np.float64(model.logits(params, model(params, batch, np.float32).hidden))[0]
    logs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    is_text = np.ones(len(ids), bool) if sample is None else ~sample.visual
    places = np.flatnonzero(is_text[:-1] & (mask[1:] > 0))
    slots = np.cumsum(is_text) - 1
    return float(-logs[slots[places], ids[places + 1]].mean())


def test_a_seeing_models_losses_are_those_of_samples_alone(tmp_path: Path, data: DataConfig, capsys):
    config = model_of(tmp_path / "model", data, "tiny_mono")
    scorer = Scorer(str(tmp_path / "model"), data, tmp_path / "cache", print)
    builder = SampleBuilder(data, geometry=config.geometry)
    found = {}
    for source in data.sources:
        scores = scorer(source)
        opened, prompts = open_source(source.spec), source.prompts
        for index in range(len(opened)):
            raw = opened.read(index)
            if raw.key == "pairs/cut":
                continue
            candidates = [builder.build(raw, prompt=prompt) for prompt in prompts]  # which one is up to the index
            expected = [alone(tmp_path / "model", s.input_ids, s.loss_mask, s) for s in candidates]
            nearest = min(expected, key=lambda value: abs(value - scores[raw.key]["loss"]))
            assert scores[raw.key]["loss"] == pytest.approx(nearest, abs=2e-4)
            assert scores[raw.key]["tokens"] == candidates[0].loss_mask[1:].sum()
        found |= scores
    assert set(found) == {*(f"pairs/{i:05d}" for i in range(5)), "talks.jsonl:1", "talks.jsonl:2"}
    assert found["talks.jsonl:2"]["sight"] == 0
    assert all(abs(value["sight"]) > 1e-4 for key, value in found.items() if key != "talks.jsonl:2")
    assert "pairs: 5 samples scored" in (said := capsys.readouterr().out) and "1 without: truncated_image" in said


def test_a_model_without_vision_reads_the_texts_alone(tmp_path: Path, data: DataConfig):
    model_of(tmp_path / "model", data, "tiny_lm")
    result = score(str(tmp_path / "model"), data, tmp_path / "out", tmp_path / "cache", print)
    assert {name: each["samples"] for name, each in result["sources"].items()} == {"pairs": 6, "talks": 2}
    chat = SampleBuilder(data).chat
    texts = {"talks.jsonl:1": "what?\nnoise", **{f"pairs/{i:05d}": f"caption {i}" for i in range(5)}}
    lines = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    found = {line["key"]: line for line in lines}
    for key, text in texts.items():
        ids, mask = chat.piece(chat.plain(text), 0, 160)
        assert found[key]["loss"] == pytest.approx(alone(tmp_path / "model", ids, mask), abs=2e-4)
        assert found[key]["tokens"] == len(ids) - 1 and "sight" not in found[key]
    losses = sorted((line["loss"], key) for key, line in found.items() if key.startswith("pairs/"))
    spec = {**data.sources[0].spec, "scores": result["sources"]["pairs"]["file"], "filters": {"max_loss": "40%"}}
    easy = open_source(spec)
    assert sorted(easy.key(i) for i in range(len(easy))) == sorted(key for _, key in losses[:3])


def test_scores_are_made_once(tmp_path: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch):
    model_of(tmp_path / "model", data, "tiny_lm")
    sources = [{"name": source.name, "spec": dict(source.spec)} for source in data.sources]
    arguments = (str(tmp_path / "model"), tmp_path / "work", print, "float32")
    first = with_scores(sources, data, *arguments)
    scored = []

    def counted(self: Scorer, source: object) -> dict:
        scored.append(source.name)
        return {"k": {"loss": 1.0}}

    monkeypatch.setattr(scoring.Scorer, "__call__", counted)
    assert with_scores(sources, data, *arguments) == first and not scored
    assert all(len(open_source(source["spec"])) for source in first)
    with_scores(sources, dataclasses.replace(data, max_caption_chars=5), *arguments)
    assert scored == ["pairs", "talks"], "other texts"
    save_model(tmp_path / "model", *load_model_changed(tmp_path / "model"))
    with_scores(sources, data, *arguments)
    assert scored == ["pairs", "talks"] * 2, "another model"


def load_model_changed(folder: Path) -> tuple[Architecture, dict]:
    config, params = load_model(folder)
    return config, jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, params)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, data: DataConfig):
    config = preset("tiny_mono")  # whose vocabulary is smaller than the tokenizer's
    save_model(tmp_path / "model", config, jax.tree.map(np.asarray, random_params(config)))
    with pytest.raises(ConfigError, match="vocabulary has"):
        Scorer(str(tmp_path / "model"), data, tmp_path / "cache", print)(data.sources[0])


def test_losses_that_are_no_numbers_are_refused(tmp_path: Path, data: DataConfig):
    config = model_of(tmp_path / "model", data, "tiny_lm")
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), random_params(config))
    save_model(tmp_path / "model", config, params)
    with pytest.raises(DataError, match=r"pairs: not scored by .*model: the losses are not finite"):
        Scorer(str(tmp_path / "model"), data, tmp_path / "cache", print)(data.sources[0])


def test_sums_are_of_the_right_samples():
    batch = mixed_batch(3)
    values, visual = batch["loss_weights"], 16
    expected = np.zeros((3, 5))
    for row in range(3):
        for slot, segment in zip(batch["order"][row], batch["segments"][row]):
            if segment and slot >= visual:
                expected[row, segment - 1] += values[row, slot - visual]
    np.testing.assert_allclose(by_sample(batch, values, 5), expected, rtol=1e-6)
