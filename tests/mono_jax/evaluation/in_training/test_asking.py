"""Questions during training: the same answers on any mesh; what cannot be asked is named; what is shown of them."""

from __future__ import annotations

import json
from functools import cache
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
from mono_jax.evaluation.in_training import answers_page
from mono_jax.evaluation.in_training.asking import Asking, scores
from mono_jax.evaluation.in_training.task_config import TaskConfig
from mono_jax.evaluation.questions import Question
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.specs import param_shardings
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import RunConfig
from mono_jax.training.groups import split
from mono_jax.training.stages import get_stage
from tests.mono_jax.helpers import random_params
from tests.mono_jax.runs.test_stage import settings
from tests.mono_jax.training.test_meshes import mesh_of


def model_and_builder(sets: dict[str, Any]) -> tuple[Architecture, SampleBuilder]:
    values = settings(sets)
    config = architecture_of(RunConfig.from_dict(values))
    return config, SampleBuilder(DataConfig.from_dict(values["data"]), geometry=config.geometry)


ANSWERS: dict[str, Any] = {}


@cache
def random_weights(config: Architecture) -> Any:
    return random_params(config)


@pytest.mark.parametrize(("axes", "trains"), [((1,), "S1.1"), ((2, 2, 2), "S1.1"), ((1, 2, 1, 4), "S2")], ids=str)
def test_answers_are_one_device_s_on_any_mesh(sets: dict[str, Any], axes: tuple[int, ...], trains: str):
    """The state is asked as it lies, trainable and frozen parts apart, also where devices share rows in training."""
    config, builder = model_and_builder(sets)
    mesh, entry = mesh_of(*axes), sets["heldout"]["questions"]
    params = random_weights(config)
    params = jax.device_put(params, param_shardings(config, params, mesh))
    trainable, frozen = split(get_stage(trains), config, params)
    task = TaskConfig(entry["path"], entry["image_root"], examples=5, max_new_tokens=4, batch_size=3)
    found, answers = Asking({"vqa": task}, builder, jnp.float32, mesh)(config, tree.merge(trainable, frozen))
    assert found == {"tasks/vqa": 0.0} and len(set(answers["vqa"])) > 1
    assert answers == ANSWERS.setdefault("one device", answers)


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"id": "q7", "image": "none.png"}, {}, r"tasks\.vqa: question 'q7', .*none\.png"),
        ({"id": "q8", "image": "text.png"}, {}, r"tasks\.vqa: question 'q8', .*text\.png.*not_an_image"),
        ({}, {}, r"questions\.jsonl:1: not a LLaVA record"),
        (None, {}, r"tasks\.vqa\.path: .* holds no question"),
        ({"id": "q9"}, {"path": "none.jsonl"}, r"tasks\.vqa\.path: none\.jsonl: No such file"),
        (
            {"id": "q10", "image": "right.png"},
            {"metric": "grounding"},
            r"vqa\.metric: grounding: example q10: no 'width'",
        ),
        ({"id": "q9"}, {"metric": "exact_mach"}, r"tasks\.vqa\.metric 'exact_mach': did you mean 'exact_match'"),
    ],
)
def test_what_cannot_be_asked_is_named_at_once(
    sets: dict[str, Any], tmp_path: Path, record: dict[str, str] | None, changes: dict[str, str], message: str
):
    _, builder = model_and_builder(sets)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "right.png")
    file = tmp_path / "questions.jsonl"
    file.write_text("" if record is None else json.dumps(record and record | {"conversations": TURNS}) + "\n")
    task = TaskConfig(**({"path": str(file), "image_root": str(tmp_path)} | changes))
    with pytest.raises((DataError, ConfigError), match=message):
        Asking({"vqa": task}, builder, jnp.float32, mesh_of(1))


def test_the_headline_of_a_metric_comes_first():
    questions = [Question(str(n), Path("a"), (("human", "?"),), truth, "") for n, truth in enumerate(("yes", "no"))]
    assert scores("exact_match", questions, ["Yes", "yes"]) == {"accuracy": 50.0}
    assert list(scores("pope", questions, ["yes", "yes"]).items())[:2] == [
        ("f1", pytest.approx(200 / 3)),
        ("accuracy", 50.0),
    ]


def test_answers_are_shown_by_step_and_those_of_a_lost_future_go(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    questions = [
        Question(str(number), tmp_path / name, (("human", "<b>?"),), "yes", "")
        for number, name in enumerate(("a.png", "gone.jpg"))
    ]
    images = {("vqa", "0"): tmp_path / "a.png"}  # the second is not asked any more
    for step, given in ((10, ["no", "&"]), (20, ["lost", "lost"]), (20, ["yes", "a <b>"])):
        answers_page.add(tmp_path / "shown", answers_page.shown(step, "vqa", questions, given), images)
    lines = [json.loads(line) for line in (tmp_path / "shown/answers.jsonl").read_text().splitlines()]
    assert [(each["step"], each["answer"]) for each in lines] == [(10, "no"), (10, "&"), (20, "yes"), (20, "a <b>")]
    page = (tmp_path / "shown/answers.html").read_text()
    assert page.count("<img alt='' src='data:image/png;base64,") == 1 and "lost" not in page
    assert "a &lt;b&gt;" in page and "&lt;b&gt;?" in page and page.count("class='card'") == 2
