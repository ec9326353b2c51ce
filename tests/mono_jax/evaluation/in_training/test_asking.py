"""Questions during training: equal answers on any mesh, errors that name bad settings, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import DataError
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture
from mono_jax.evaluation.in_training import answers_page
from mono_jax.evaluation.in_training.asking import Asking
from mono_jax.evaluation.in_training.task_config import TaskConfig
from mono_jax.evaluation.metrics.metric import Answered
from mono_jax.evaluation.metrics.registry import FURTHER, METRICS
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.specs import param_shardings
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import RunConfig
from mono_jax.runs.evaluation_config import EvaluationConfig
from mono_jax.training.groups import split
from mono_jax.training.stages import get_stage
from tests.mono_jax.evaluation import small_benchmarks
from tests.mono_jax.helpers import random_params
from tests.mono_jax.runs.test_stage import settings
from tests.mono_jax.training.test_meshes import mesh_of


def model_and_builder(sets: dict[str, Any]) -> tuple[Architecture, SampleBuilder]:
    values = settings(sets)
    config = architecture_of(RunConfig.from_dict(values))
    return config, SampleBuilder(DataConfig.from_dict(values["data"]), geometry=config.geometry)


@pytest.fixture(scope="module")
def tasks(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskConfig]:
    entry = sets["heldout"]["questions"]
    files = {"path": entry["path"], "image_root": entry["image_root"]}
    data = str(small_benchmarks.write(tmp_path_factory.mktemp("benchmarks")))
    return {
        "vqa": TaskConfig(**files, examples=5, max_new_tokens=4, batch_size=3),
        "pope": TaskConfig("pope", data=data, examples=3, max_new_tokens=4, batch_size=3),
    }


def answered(sets: dict[str, Any], tasks: dict[str, TaskConfig], axes: tuple[int, ...], trains: str) -> Any:
    """(scores, answers) of random weights on a mesh, trainable and frozen parts separate."""
    config, builder = model_and_builder(sets)
    mesh, params = mesh_of(*axes), random_params(config)
    params = jax.device_put(params, param_shardings(config, params, mesh))
    trainable, frozen = split(get_stage(trains), config, params)
    return Asking(tasks, builder, jnp.float32, mesh)(config, tree.merge(trainable, frozen))


@pytest.fixture(scope="module")
def on_one_device(sets: dict[str, Any], tasks: dict[str, TaskConfig]) -> Any:
    return answered(sets, tasks, (1,), "S1.1")


@pytest.mark.parametrize(
    ("axes", "trains"), [((2, 2, 2), "S1.1"), pytest.param((1, 2, 1, 4), "S2", marks=pytest.mark.slow)], ids=str
)
def test_answers_are_one_device_s_on_any_mesh(
    sets: dict[str, Any], tasks: dict[str, TaskConfig], on_one_device: Any, axes: tuple[int, ...], trains: str
):
    """The state is used in place, also if devices share rows in training."""
    scores, answers = answered(sets, tasks, axes, trains)
    assert scores["tasks/vqa"] == 0 and len(set(answers["vqa"])) > 1
    assert list(scores) == ["tasks/vqa", "tasks/pope", "tasks/pope/accuracy", "tasks/pope/yes"]
    assert (scores, answers) == on_one_device


def test_values_are_named_before_they_are_measured(
    sets: dict[str, Any], tasks: dict[str, TaskConfig], on_one_device: Any
):
    _, builder = model_and_builder(sets)
    assert {*Asking(tasks, builder, jnp.float32, mesh_of(1)).names} == {*on_one_device[0]}


def test_a_score_that_the_examples_do_not_have_is_not_named(sets: dict[str, Any], tmp_path: Path):
    """The pictures of the small file are not of MME's categories, which alone count for perception and cognition."""
    _, builder = model_and_builder(sets)
    task = TaskConfig("mme", data=str(small_benchmarks.write(tmp_path)))
    nameable = EvaluationConfig(tasks={"it": task}).value_names()
    assert nameable == ["tasks/it", "tasks/it/perception", "tasks/it/cognition"]
    assert Asking({"it": task}, builder, jnp.float32, mesh_of(1)).names == ["tasks/it"]
    asked = [Answered(str(n), "yes", ("yes",), c, c) for n, c in enumerate(["OCR"] * 2 + ["code_reasoning"] * 2)]
    assert [*METRICS["mme"](asked)] == ["total", *FURTHER["mme"]]


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"id": "q7", "image": "none.png"}, {}, r"tasks\.vqa: .*questions\.jsonl:1: none\.png: no such picture"),
        ({"id": "q8", "image": "text.png"}, {}, r"tasks\.vqa: example q8: .*text\.png.*not_an_image"),
        ({"conversations": "x"}, {}, r"questions\.jsonl:1: .*a LLaVA record is needed"),
        (None, {}, r"tasks\.vqa: .*questions\.jsonl: contains no examples"),
        ({}, {"path": "none.jsonl"}, r"tasks\.vqa: none\.jsonl: No such file"),
        ({}, {"metric": "exact_mach"}, r"tasks\.vqa\.metric 'exact_mach': did you mean 'exact_match'"),
        ({}, {"benchmark": "textvqa"}, r"tasks\.vqa\.benchmark 'textvqa': did you mean 'textvqa_"),
        ({}, {"benchmark": "mme", "path": "", "data": "none"}, r"tasks\.vqa: none: has none of MME\.tsv"),
        ({}, {"benchmark": "mmvet"}, r"tasks\.vqa: mm_vet needs a judge, .* use experiments/evaluate\.py with --judge"),
        # Tasks that cannot be scored, each with its fix.
        ({}, {"metric": "grounding"}, r"tasks\.vqa: .*example q10: no 'width'"),
        ({}, {"metric": "multiple_choice"}, r"tasks\.vqa: .*example q10: no options, .* or use the metric exact_match"),
        ({}, {"metric": "circular"}, r"tasks\.vqa: .*example q10: no options"),
        ({}, {"metric": "vqa_accuracy"}, r"tasks\.vqa: .*needs the answers of several people .* exact_match"),
        ({}, {"metric": "mme"}, r"tasks\.vqa: .*example q10: the right answer is 'this': it must be yes or no"),
        ({}, {"metric": "pope"}, r"tasks\.vqa: .*it must be yes or no"),
        ({}, {"metric": "hallusion"}, r"tasks\.vqa: .*example q10: no 'set_id'"),
        (
            {"conversations": [TURNS[0], {"from": "gpt", "value": "a."}]},
            {"metric": "gqa"},
            r"gqa scores even right answers as 0",
        ),
    ],
)
def test_what_cannot_be_asked_is_named_at_once(
    sets: dict[str, Any], tmp_path: Path, record: dict[str, Any] | None, changes: dict[str, str], message: str
):
    _, builder = model_and_builder(sets)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "right.png")
    file = tmp_path / "questions.jsonl"
    usual = {"id": "q10", "image": "right.png", "conversations": TURNS}
    file.write_text("" if record is None else json.dumps(usual | record) + "\n")
    task = TaskConfig(**({"path": str(file), "image_root": str(tmp_path)} | changes))
    with pytest.raises((DataError, ConfigError), match=message):
        Asking({"vqa": task}, builder, jnp.float32, mesh_of(1))


@pytest.mark.parametrize("name", small_benchmarks.TASKS)
def test_benchmarks_of_any_metric_can_be_asked(sets: dict[str, Any], tmp_path: Path, name: str):
    """Read, turned into prompts and scored, with perfect answers."""
    _, builder = model_and_builder(sets)
    task = TaskConfig(name, data=str(small_benchmarks.write(tmp_path)))
    asking = Asking({"it": task}, builder, jnp.float32, mesh_of(1))
    assert len(asking.examples["it"]) in (4, 8) and asking.notes == []
    # Each score can pick the best step, and no other, except the share of the answer "yes".
    absent = {"tasks/it/perception", "tasks/it/cognition"} if name == "mme" else set()
    nameable = {*EvaluationConfig(tasks={"it": task}).value_names()}
    assert {*asking.names} - {"tasks/it/yes"} == nameable - absent


def test_hidden_answers_cannot_be_scored_in_training(sets: dict[str, Any], tmp_path: Path):
    _, builder = model_and_builder(sets)
    small_benchmarks.write(tmp_path)
    task = TaskConfig("vqav2_testdev", path=str(tmp_path / "textvqa/textvqa_val.jsonl"), data=str(tmp_path))
    with pytest.raises(DataError, match=r"tasks\.vqa: the right answers of vqav2_testdev are hidden: evaluate\.py"):
        Asking({"vqa": task}, builder, jnp.float32, mesh_of(1))


def test_answers_are_shown_by_step_and_those_of_a_lost_future_go(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    examples = [Example(str(number), (("human", "<b>?"),), truths=("yes", "no")) for number in range(2)]
    pictures = {("vqa", "0"): [Picture("a", "", "a", tmp_path / "a.png")]}  # the second is no longer asked
    for step, given in ((10, ["no", "&"]), (20, ["lost", "lost"]), (20, ["yes", "a <b>"])):
        answers_page.add(tmp_path / "shown", answers_page.shown(step, "vqa", examples, given), pictures)
    lines = [json.loads(line) for line in (tmp_path / "shown/answers.jsonl").read_text().splitlines()]
    assert [(each["step"], each["answer"]) for each in lines] == [(10, "no"), (10, "&"), (20, "yes"), (20, "a <b>")]
    page = (tmp_path / "shown/answers.html").read_text()
    assert page.count("<img alt='' src='data:image/png;base64,") == 1 and "lost" not in page
    assert "a &lt;b&gt;" in page and "&lt;b&gt;?" in page and page.count("class='card'") == 2
