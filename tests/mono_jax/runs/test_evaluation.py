"""Held-out loss during a run, and the checkpoint of the best step."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import DataError, StorageError
from data_pipelines.loading.packed_data import PackedData
from experiments import evaluate
from mono_jax.errors import ConfigError, PeerError
from mono_jax.evaluation import heldout
from mono_jax.evaluation.benchmarks import running
from mono_jax.evaluation.benchmarks.predictions import read_lines
from mono_jax.evaluation.blind import blinded
from mono_jax.evaluation.heldout import HeldoutLoss, HeldoutSources, Loss, with_modalities
from mono_jax.evaluation.in_training.asking import Asking
from mono_jax.evaluation.in_training.retention import Retention
from mono_jax.evaluation.in_training.task_config import TaskConfig
from mono_jax.evaluation.questions import answer, grade, read_questions, with_other_images
from mono_jax.generation.decode import Generator
from mono_jax.models.transformer import Model
from mono_jax.runs.config import RunConfig
from mono_jax.runs.evaluating import Measuring
from mono_jax.runs.stage import run_stage
from mono_jax.training.metrics import read_metrics
from mono_jax.weights.model_folder import load_model
from tests.mono_jax.evaluation import small_benchmarks
from tests.mono_jax.peers import Peers
from tests.mono_jax.runs.test_stage import run, same_weights, settings
from tests.mono_jax.training.test_meshes import mesh_of

pytestmark = pytest.mark.usefixtures("one_device")


def configured(sets: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """In S1.1 the text parameters are frozen, so the loss on text is constant and the first evaluation is the best."""
    text, pairs = sets["heldout"]["text"], sets["stages"]["s1_2"]["sources"][0]["spec"]
    evaluation = {"every": 3, "sources": {"text": text, "pairs": pairs}, "batches": 2, "keep_best": "heldout/text"}
    evaluation["blind"] = ("noise", "other")
    evaluation |= {"tasks": {"questions": {"examples": 5, "max_new_tokens": 3, **asked(sets)}}, "examples": 2}
    return settings(sets, steps=8, keep=2, evaluation=evaluation | changes)


def asked(sets: dict[str, Any]) -> dict[str, str]:
    return {key: sets["heldout"]["questions"][key] for key in ("path", "image_root")}


def measured(workdir: Path) -> dict[int, tuple[float, float]]:
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: (r["heldout/text"], r["heldout/pairs"]) for r in records if "heldout/text" in r}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.fixture(scope="module")
def finished(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(configured(sets), workdir)


def test_losses_are_recorded_and_the_best_checkpoint_stays(finished: tuple[Path, dict[str, Any]]) -> None:
    workdir, result = finished
    found = measured(workdir)
    assert list(found) == [3, 6, 8]
    assert len({text for text, _ in found.values()}) == 1, "what is frozen does not move"
    assert len({pairs for _, pairs in found.values()}) == 3
    known = {"metric": "heldout/text", "step": 3, "value": found[3][0]}
    assert result["best"] == known | {"model": str(workdir / "best")}
    assert json.loads((workdir / "best/step.json").read_text()) == known
    assert checkpoints(workdir) == [3, 6, 8]


def test_losses_by_modality_and_scores_are_recorded(finished: tuple[Path, dict[str, Any]]) -> None:
    """Captions follow their image, text has no image: the sources are the modalities."""
    records = [r for r in read_metrics(finished[0] / "metrics.jsonl") if "heldout/text" in r]
    for record in records:
        assert record["modality/text"] == record["heldout/text"] and record["modality/image"] == record["heldout/pairs"]
        assert [name for name in record if name.startswith("sight/")] == ["sight/pairs/noise", "sight/pairs/other"]
        assert 0 <= record["tasks/questions"] <= 100
        assert not any(name.startswith("retention/") for name in record), "random weights are no base"


def test_the_answers_are_those_of_the_model(sets: dict[str, Any], finished: tuple[Path, dict[str, Any]]) -> None:
    """Answered again from the model folder; those of two examples are shown at every step."""
    workdir, result = finished
    config, params = load_model(result["model"])
    builder = SampleBuilder(DataConfig.from_dict(configured(sets)["data"]), geometry=config.geometry)
    questions = read_questions(*asked(sets).values())[:5]
    answers = answer(Generator(config, params, jnp.float32), builder, questions, 3)
    score = read_metrics(workdir / "metrics.jsonl")[-1]["tasks/questions"]
    assert score == 100 * grade(questions, answers)["accuracy"]
    others = answer(Generator(config, params, jnp.float32), builder, with_other_images(questions), 3)
    sight = read_metrics(workdir / "metrics.jsonl")[-1]["tasks/questions/sight"]
    assert sight == score - 100 * grade(questions, others)["accuracy"] and others != answers
    shown = [json.loads(line) for line in (workdir / "evaluation/answers.jsonl").read_text().splitlines()]
    assert [each["step"] for each in shown] == [3, 3, 6, 6, 8, 8]
    assert [each["answer"] for each in shown[-2:]] == answers[:2]
    page = (workdir / "evaluation/answers.html").read_text()
    assert page.count("<img") == 2 and page.count("<td class='step'>8</td>") == 2


@pytest.mark.slow
def test_benchmarks_score_what_evaluate_says(
    sets: dict[str, Any],
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal answers and scores on whole sets from the run's own config and from the command on its model folder."""
    monkeypatch.setattr(running, "local_mesh", lambda model: None)
    folder, model = small_benchmarks.write(tmp_path), finished[1]["model"]
    config, params = load_model(model)
    builder = SampleBuilder(DataConfig.from_dict(configured(sets)["data"]), geometry=config.geometry)
    names = ("pope", "mme", "mmbench_dev_en", "textvqa_val", "mmmu_val")
    own = {"data": str(folder), "examples": 4, "max_new_tokens": 2, "batch_size": 4}
    tasks = {name: TaskConfig(name, **own) for name in names}
    values, answers = Asking(tasks, builder, jnp.float32, mesh_of(1), blind=True)(config, params)
    flags = ["--limit=4", "--max_new_tokens=2", "--batch_size=4", "--dtype=float32", "--json", "--blind"]
    given = [f"--model={model}", f"--tasks={','.join(names)}", f"--data={folder}", f"--out={tmp_path / 'out'}"]
    evaluate.main([*given, *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in names:
        label, blind = result["tasks"][name]["models"]
        of_model = result["tasks"][name]["models"][label]
        headline, *further = ((score, found["score"]) for score, found in of_model["scores"].items())
        expected = {f"tasks/{name}": headline[1]} | {f"tasks/{name}/{score}": value for score, value in further}
        assert {key: values[key] for key in expected} == expected
        sight = [each["difference"] for each in result["tasks"][name]["differences"] if each["score"] == headline[0]]
        assert sight == [pytest.approx(values[f"tasks/{name}/sight"])] and blind == f"{label}-blind"
        [file] = (tmp_path / "out").glob(f"{label}/{name}/predictions.jsonl")
        assert sorted(line["answer"] for line in read_lines(file)) == sorted(answers[name])
    assert values["tasks/pope"] > 0, "whoever says no no says yes"


@pytest.mark.slow
def test_the_document_s_example_runs(sets: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files of the names that it has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").mkdir()
    small_benchmarks.write(tmp_path / "benchmarks")
    (tmp_path / "heldout.txt").write_bytes(Path(sets["heldout"]["text"]).read_bytes()[:5000])
    (tmp_path / "images").symlink_to(sets["heldout"]["questions"]["image_root"])
    (tmp_path / "questions.jsonl").symlink_to(sets["heldout"]["questions"]["path"])
    (tmp_path / "heldout").mkdir()
    (tmp_path / "0.txt").write_text("a red wall")
    with tarfile.open("heldout/0.tar", "w") as shard:
        shard.add(next(Path("images").rglob("*.png")), "0.png")
        shard.add("0.txt")
    document = Path(__file__).parents[3] / "docs/evaluation_in_training.md"
    values: dict[str, Any] = {}
    exec(document.read_text().split("```")[1].removeprefix("python"), values)
    example = values["get_config"]().to_dict()
    run(settings(sets, steps=1, evaluation=example["evaluation"] | {"data": {"batch_size": 2}}), tmp_path / "run")
    [record] = read_metrics(tmp_path / "run/metrics.jsonl")
    names = ("heldout/prose", "heldout/captions", "sight/captions/other", "tasks/mine", "tasks/textvqa")
    assert not [name for name in names if name not in record]


def test_what_is_kept_of_the_base_is_measured(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """S2 changes the text side; another run is compared with the same base."""
    values = configured(sets, every=1, tasks={}, keep_best="retention/text/nats", data={"text_tokens": 80})
    values |= {"stage": "S2", "init": finished[1]["model"], "steps": 2, "optim": {"learning_rate": 1e-2}}
    values.pop("model")
    result = run(values, tmp_path / "first")
    kept = json.loads((tmp_path / "first/evaluation/base.json").read_text())
    assert list(kept) == ["text"], "captions are not compared"
    records = read_metrics(tmp_path / "first/metrics.jsonl")
    for record in records:
        assert record["retention/text/ratio"] == record["heldout/text"] / kept["text"]["loss"] != 1
        assert record["retention/text/nats"] == record["heldout/text"] - kept["text"]["loss"]
    assert result["best"]["value"] == min(record["retention/text/nats"] for record in records)

    values |= {"init": result["model"], "steps": 1}
    base, later = tmp_path / "first/evaluation/base.json", tmp_path / "later"
    run_stage(RunConfig.from_dict(values), later, base_losses=base, say=[].append)
    [record] = read_metrics(later / "metrics.jsonl")
    assert record["retention/text/nats"] == record["heldout/text"] - kept["text"]["loss"]
    assert json.loads((later / "evaluation/base.json").read_text())["text"]["loss"] != kept["text"]["loss"]


@pytest.mark.parametrize(("folder", "step"), [("", 8), ("model", 8), ("best", 3)])
def test_the_value_is_that_of_the_model(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path, folder: str, step: int
) -> None:
    """Measured again from a model folder, or the workdir for the last one, on batches read one by one."""
    workdir, _ = finished
    config, params = load_model(workdir / folder)
    total = HeldoutLoss(Model(config), jnp.float32)
    pairs = sets["stages"]["s1_2"]["sources"][0]["spec"]
    batches = {}
    for name, spec in {"text": {"kind": "text", "paths": sets["heldout"]["text"]}, "pairs": pairs}.items():
        values = configured(sets)["data"] | {"sources": [{"name": name, "spec": spec}]}
        values |= {"shuffle": "none", "seed": 0, "epochs": 1}
        data = PackedData(DataConfig.from_dict(values), tmp_path, config.geometry)
        batches[name] = [with_modalities(data.batch(step)) for step in range(2)]
    loss = {name: total(params, {}, of_source).mean for name, of_source in batches.items()}
    assert (loss["text"], loss["pairs"]) == pytest.approx(measured(workdir)[step], abs=1e-6)
    assert loss["pairs"] != pytest.approx(measured(workdir)[11 - step][1], abs=1e-3), "the other model's"
    record = {r["step"]: r for r in read_metrics(workdir / "metrics.jsonl")}[step]
    for blindness in ("noise", "other"):
        blind = total(params, {}, [blinded(batch, blindness) for batch in batches["pairs"]]).mean
        assert blind - loss["pairs"] == pytest.approx(record[f"sight/pairs/{blindness}"], abs=1e-6) != 0


def test_a_resumed_run_measures_the_same_and_knows_its_best(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    whole, first = finished
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    for step in (6, 8):  # as after a kill
        shutil.rmtree(copy / "checkpoints" / str(step))
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "best")
    result = run(configured(sets), copy)
    assert measured(copy) == measured(whole) and result["best"] == first["best"] | {"model": str(copy / "best")}
    assert same_weights(result["model"], first["model"])
    assert same_weights(result["best"]["model"], first["best"]["model"])
    assert checkpoints(copy) == [3, 6, 8]


def written(workdir: Path) -> dict[str, int]:
    return {name: (workdir / name / "step.json").stat().st_mtime_ns for name in ("model", "best")}


def test_a_finished_run_writes_the_best_model_if_it_is_not_there_whole(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Stopped while it was written, damaged afterwards, or lost with its checkpoint."""
    whole, first = finished
    copy, values, said = Path(shutil.copytree(whole, tmp_path / "copy")), configured(sets), []
    before = written(copy)
    assert run(values, copy)["best"]["step"] == 3 and written(copy) == before
    (copy / "best/step.json").unlink()
    run(values, copy, said)
    assert written(copy)["model"] == before["model"] and written(copy)["best"] != before["best"]
    assert f"the best model (step 3, heldout/text {measured(whole)[3][0]:.4f}): {copy / 'best'}" in said
    next((copy / "best/params").rglob("*/.zarray")).write_text("")
    run(values, copy)
    assert same_weights(str(copy / "best"), first["best"]["model"])
    shutil.rmtree(copy / "best")
    shutil.rmtree(copy / "checkpoints/3")
    assert run(values, copy, said)["best"] == first["best"] | {"model": None}
    assert any(f"is not written to {copy / 'best'}: " in line and "no checkpoint of step 3" in line for line in said)


@pytest.mark.slow
def test_the_last_step_as_the_best_shares_its_weights(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Another value's best is step 9, the last, and takes the place of step 3; it is unchanged when the run continues
    with a step that changes nothing."""
    copy, said = Path(shutil.copytree(finished[0], tmp_path / "copy")), []
    values = configured(sets, keep_best="heldout/pairs")
    result = run(values | {"steps": 9}, copy, said)
    line = f"the best model (step 9, heldout/pairs {result['best']['value']:.4f}, the last one): {copy / 'best'}"
    assert line in said
    files = [file.relative_to(copy / "best") for file in (copy / "best/params").rglob("*") if file.is_file()]
    assert files and all((copy / "best" / file).samefile(copy / "model" / file) for file in files)
    before = written(copy)
    again = run(values | {"steps": 10, "skip_steps": [[10, 10]]}, copy)
    assert again["best"] == result["best"] and again["step"] == 10
    assert written(copy)["best"] == before["best"] and written(copy)["model"] != before["model"]
    assert same_weights(again["model"], again["best"]["model"]) and not (copy / "best.partial").exists()


def test_another_run_starts_from_the_best_model(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workdir, result = finished
    said: list[str] = []
    values = configured(sets, tasks={}, keep_best=None) | {"init": result["best"]["model"], "steps": 1}
    values.pop("model")
    assert run(values, tmp_path / "run", said)["best"] is None and not (tmp_path / "run/best").exists()
    [line] = [line for line in said if line.startswith("step 0: ")]
    assert line.endswith(f"heldout/pairs {measured(workdir)[3][1]:.4f}")


def test_evaluating_leaves_the_training_alone(
    sets: dict[str, Any], finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    result = run(configured(sets, sources={}, keep_best=None), tmp_path / "run")
    assert same_weights(result["model"], finished[1]["model"]) and result["best"] is None


TASKS = {"c": {"data": "d", "benchmark": "coco"}, "q": {"path": "a"}, "p": {"data": "d", "benchmark": "pope"}}


@pytest.mark.parametrize(
    ("value", "lowest"),
    [
        ("tasks/c", False),
        ("tasks/c/BLEU-4", False),
        ("tasks/p/accuracy", False),
        ("tasks/q/sight", False),
        ("sight/pairs/noise", False),
        ("heldout/text", True),
        ("retention/text/ratio", True),
    ],
)
def test_a_value_that_picks_the_best_step(sets: dict[str, Any], value: str, lowest: bool) -> None:
    found = RunConfig.from_dict(configured(sets, tasks=TASKS, keep_best=value)).evaluation
    assert (found.keep_best, found.lower_is_better) == (value, lowest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "heldout/txt"}, r"evaluation\.keep_best.*txt.*heldout/text"),
        ({"sources": {"text": 3}}, r"evaluation\.sources\.text is 3"),
        ({"every": 0}, r"evaluation\.every"),
        ({"tasks": {"vqa": {}}, "keep_best": None}, r"evaluation\.tasks\.vqa: path or data is missing"),
        ({"tasks": {"vqa": {"benchmark": "mme"}}, "keep_best": None}, r"path or data is missing: name the file of mme"),
        ({"tasks": {"vqa": {"paths": "a"}}}, r"evaluation\.tasks\.vqa.*unknown key 'paths'"),
        ({"tasks": {"vqa": {"path": "a", "benchmark": "mmee"}}}, r"evaluation\.tasks\.vqa\.benchmark 'mmee'"),
        ({"tasks": {"vqa": {"path": "a", "metric": "mmee"}}}, r"evaluation\.tasks\.vqa\.metric 'mmee': .*'mme'"),
        ({"tasks": {"vqa": {"path": "a", "benchmark": "mmvet"}}}, r"evaluation\.tasks\.vqa: mm_vet needs a judge"),
        # Names of values that are recorded for another task, metric or source, or of which more is not better.
        ({"tasks": TASKS, "keep_best": "tasks/c/BLEU-5"}, r"keep_best 'tasks/c/BLEU-5': did you mean 'tasks/c/BLEU-"),
        ({"tasks": TASKS, "keep_best": "tasks/q/accuracy"}, r"keep_best 'tasks/q/accuracy'"),
        ({"tasks": TASKS, "keep_best": "tasks/p/yes"}, r"keep_best 'tasks/p/yes'"),
        # "a/text" would be the text of "a".
        ({"sources": {"a": "t", "a/text": "t"}}, r"evaluation\.sources: 'a/text' is not a valid name: .* no '/'"),
        ({"tasks": {"x/sight": {"path": "a"}}}, r"evaluation\.tasks: 'x/sight' is not a valid name: .* no '/'"),
        ({"sources": {"": "t"}}, r"evaluation\.sources: '' is not a valid name"),
    ],
)
def test_settings_that_make_no_sense_are_named(sets: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(configured(sets, **changes))


TEXT = Loss({"text": 6.0, "image": 0.0}, {"text": 2.0, "image": 0.0})
CAPTIONS = Loss({"text": 0.0, "image": 6.0}, {"text": 0.0, "image": 2.0})
BOTH = Loss({"text": 6.0, "image": 3.0}, {"text": 2.0, "image": 1.0})


@pytest.mark.parametrize(
    ("losses", "base", "others", "never"),
    [
        ({"a": TEXT}, True, True, ["heldout/a/text", "modality/image", "sight/a/noise"]),
        ({"a": TEXT}, False, False, ["retention/a/nats", "tasks/q/sight"]),
        ({"a": CAPTIONS}, True, True, ["heldout/a/image", "modality/text", "retention/a/ratio", "heldout/b"]),
        ({"a": BOTH, "b": TEXT}, True, True, ["retention/a/nats", "heldout/b/text", "sight/b/other"]),
        ({}, True, False, ["heldout/a", "modality/text", "tasks/q/sight"]),
    ],
)
@pytest.mark.parametrize("done", [0, 3])
def test_a_value_that_is_not_recorded_picks_no_best_step(
    tmp_path: Path, losses: dict[str, Loss], base: bool, others: bool, never: list[str], done: int
) -> None:
    """Before the first step after each start, whatever is recorded can be needed, and nothing else."""
    measuring, state = object.__new__(Measuring), SimpleNamespace(trainable={})
    progress = SimpleNamespace(done=0, state=state, frozen={})
    seen = {name: loss for name, loss in losses.items() if loss.weights["image"]}
    measuring._heldout = Sources(losses, {name: {"noise": loss, "other": loss} for name, loss in seen.items()})
    measuring._retention = Retention(tmp_path / "base.json", None, dict.fromkeys(losses, "batches") if base else {})
    measuring._asking = Asked(["tasks/q", *(["tasks/q/sight"] if others else [])])
    measuring._blind, measuring._needed, measuring._say, measuring._files = ("noise", "other"), None, print, tmp_path
    measuring._model = SimpleNamespace(config=None, plain=lambda params: params)
    measuring._examples = 0
    measuring.begin(progress)
    recorded = measuring(progress)
    progress.done = done
    for name in recorded:
        measuring._needed = name
        measuring.begin(progress)
    for name in never:
        measuring._needed = name
        with pytest.raises(ConfigError, match=f"evaluation.keep_best: value '{name}'"):
            measuring.begin(progress)


class Sources:
    """``HeldoutSources`` with known losses."""

    def __init__(self, losses: dict[str, Loss], blind: dict[str, dict[str, Loss]]):
        self._losses, self._blind = losses, blind

    def __call__(self, trainable: Any, frozen: Any) -> dict[str, Loss]:
        return self._losses

    def blind(self, trainable: Any, frozen: Any, seeing: Any) -> dict[str, dict[str, Loss]]:
        return self._blind


class Asked:
    """``Asking`` whose scores are all 50."""

    def __init__(self, names: list[str]):
        self.names = names

    def __call__(self, config: Any, params: Any) -> tuple[dict[str, float], dict[str, list[str]]]:
        return dict.fromkeys(self.names, 50.0), {}


def test_a_source_without_a_usable_sample_is_named(sets: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no picture")
    file = tmp_path / "bad.jsonl"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]
    file.write_text(json.dumps({"id": "1", "image": "broken.jpg", "conversations": turns}) + "\n")
    spec = {"kind": "jsonl", "paths": str(file), "image_root": str(tmp_path)}
    said: list[str] = []
    with pytest.raises(DataError, match=r"evaluation\.sources\.bad: .*not_an_image"):
        run(configured(sets, sources={"bad": spec}, tasks={}, keep_best=None), tmp_path / "run", said)


@pytest.mark.parametrize("failing", [None, 0, 1])
@pytest.mark.parametrize("most", [3, None])
def test_a_process_that_cannot_read_takes_part_to_the_end(
    monkeypatch: pytest.MonkeyPatch, failing: int | None, most: int | None
) -> None:
    """The others wait for it in each batch, then all raise. Processes are threads, and batches are only counted."""
    used: dict[int, list[Any]] = {}

    monkeypatch.setattr(heldout, "with_modalities", lambda batch: batch)

    class Data:
        spec = SimpleNamespace(empty=lambda rows: "empty")
        report = SimpleNamespace(bad=[("line 3", "no_caption", "")])

        def iterate(self, start: int, rows: list[int]) -> Iterator[tuple[int, str]]:
            for number in range(5):
                if number == 2 and rows == [failing]:
                    raise StorageError(["text"], "away")
                yield number, "batch"

        def steps_per_epoch(self) -> int:
            return 5

    said: list[str] = []

    def process(index: int) -> dict[str, Loss]:
        sources = object.__new__(HeldoutSources)
        sources._data, sources._batches, sources._told = {"text": Data()}, most, set()
        sources._rows = SimpleNamespace(numbers=[index], put=lambda batch: batch)
        sources._say = said.append

        def loss(trainable: Any, frozen: Any, batches: Any) -> Loss:
            count = float(len(used.setdefault(index, list(batches))))
            return Loss({"text": count, "image": 0.0}, {"text": 1.0, "image": 0.0})

        sources._loss = loss
        return sources({}, {})

    count = most or 5
    for index, result in enumerate(Peers(2, monkeypatch).run(process)):
        assert used[index] == ["batch"] * 2 + ["empty" if index == failing else "batch"] * (count - 2)
        if failing is None:
            assert result["text"].mean == count
            assert said == ["held-out text: 1 samples are skipped: line 3: no_caption"] * 2
        else:
            assert isinstance(result, StorageError if index == failing else PeerError) and "away" in str(result)
