"""experiments/evaluate.py: a tiny model answers, is stopped, continues, is compared and reported."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import DataError
from experiments import evaluate as command
from mono_jax.errors import ConfigError
from mono_jax.evaluation import judges
from mono_jax.evaluation.benchmarks import predictions, running
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.benchmarks.catalogue import find_tasks
from mono_jax.evaluation.benchmarks.page import _categories, difference_rows, page
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.benchmarks.scoring import Scored, differences
from mono_jax.evaluation.judges import JudgeError
from mono_jax.evaluation.metrics import judged
from mono_jax.generation import chat
from mono_jax.models.architecture import VisionConfig
from mono_jax.models.presets import preset
from mono_jax.weights.writers import save_hf
from tests.mono_jax.helpers import random_params
from tests.mono_jax.parallel.clusters import Cluster, clusters

__all__ = ["clusters"]

QUESTIONS = 7


@pytest.fixture(scope="module")
def models(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models of one architecture that answer at random."""
    tokenizer = Tokenizer(golden_dir / "chat")
    config = preset(
        "tiny_mono",
        vocab_size=tokenizer.vocab_size,
        image_token_id=tokenizer.id("<IMG_CONTEXT>"),
        vision=VisionConfig(hidden_size=32, patch_size=4, image_size=32),
    )
    folders = []
    for seed, name in enumerate(("first", "second")):
        folders.append(folder := tmp_path_factory.mktemp("models") / name)
        save_hf(folder, config, random_params(config, seed))
        values = json.loads((folder / "config.json").read_text())
        values |= {"min_dynamic_patch": 1, "max_dynamic_patch": 2, "template": "internlm2-chat"}
        (folder / "config.json").write_text(json.dumps(values))
        for file in ("tokenizer.model", "added_tokens.json"):
            (folder / file).write_bytes((golden_dir / "chat" / file).read_bytes())
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of two kinds about images of two sizes; one has no image."""
    folder = tmp_path_factory.mktemp("data")
    rng, lines = np.random.default_rng(0), []
    for i in range(QUESTIONS):
        asked = [{"from": "human", "value": f"what is {i}?"}, {"from": "gpt", "value": "yes" if i % 2 else "no"}]
        record = {"id": f"q{i}", "conversations": asked, "kind": "ab"[i % 2]}
        if i:
            Image.fromarray(rng.integers(0, 256, (32, 32 + 32 * (i % 2), 3), np.uint8)).save(folder / f"{i}.png")
            record["image"] = f"{i}.png"
        lines.append(json.dumps(record))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model on one of the simulated devices."""
    monkeypatch.setattr(running, "local_mesh", lambda model: None)


def run(capsys: pytest.CaptureFixture[str], data: Path, out: Path, *models: Path, **flags: Any) -> dict[str, Any]:
    values = {"tasks": "questions", "batch_size": 4, "max_new_tokens": 5, "dtype": "float32"} | flags
    given = [f"--{name}" if value is None else f"--{name}={value}" for name, value in values.items()]
    command.main(["--model", *map(str, models), f"--data={data}", f"--out={out}", *given, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def answers(folder: Path) -> dict[str, str]:
    return {line["id"]: line["answer"] for line in predictions.read_lines(folder / "predictions.jsonl")}


@pytest.mark.usefixtures("one_copy")
def test_a_stopped_evaluation_continues_with_the_same_answers(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    whole = run(capsys, data, tmp_path / "whole", *models)
    first = answers(tmp_path / "whole/first/questions")
    assert len(first) == QUESTIONS and len(set(first.values())) > 1
    scores = whole["tasks"]["questions"]["models"]["first"]["scores"]["accuracy"]
    assert scores["n"] == QUESTIONS and 0 <= scores["low"] <= scores["score"] <= scores["high"] <= 100
    [difference] = whole["tasks"]["questions"]["differences"]
    assert (difference["model"], difference["against"], difference["units"]) == ("second", "first", QUESTIONS)

    folder = tmp_path / "stopped/first/questions"
    asked, ask = [], Asker.answers

    def stops(self: Asker, examples: Any, *rest: Any) -> Any:
        for batch in ask(self, examples, *rest):
            asked.append([example.id for example, _ in batch])
            yield batch
            if stop:
                raise KeyboardInterrupt

    monkeypatch.setattr(Asker, "answers", stops)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        run(capsys, data, tmp_path / "stopped", models[0])
    with (folder / "predictions.jsonl").open("a") as file:
        file.write('{"id": "q5", "digest": "x", "ans')  # cut off by the kill
    stop = False
    continued = run(capsys, data, tmp_path / "stopped", models[0])
    assert len(asked) == 2 and sorted(itertools.chain(*asked)) == sorted(first), "nothing is asked twice"
    assert answers(folder) == first
    assert continued["tasks"]["questions"]["models"] == {"first": whole["tasks"]["questions"]["models"]["first"]}
    run(capsys, data, tmp_path / "stopped", models[0])
    assert len(asked) == 2, "a finished evaluation asks nothing"


@pytest.mark.usefixtures("one_copy")
def test_answers_of_another_model_or_prompt_are_not_mixed_in(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(capsys, data, tmp_path, models[0], limit=2)
    with pytest.raises(
        ConfigError, match="questions: contains answers for a different max_new_tokens: give another --out"
    ):
        run(capsys, data, tmp_path, models[0], limit=2, max_new_tokens=6)
    with pytest.raises(ConfigError, match="a different prompt"):
        run(capsys, data, tmp_path, models[0], limit=2, max_tiles=1)
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(ConfigError, match="a different model"):
        run(capsys, data, tmp_path, models[1], limit=2)


@pytest.mark.usefixtures("one_copy")
def test_the_default_dtype_is_that_of_the_device(
    models: list[Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A resume on another device does not mix dtypes."""
    flags = [f"--model={models[0]}", f"--data={data}", f"--out={tmp_path}", "--tasks=questions"]
    flags += ["--limit=1", "--max_new_tokens=2"]
    command.main([*flags, "--dtype=float32"])
    command.main(flags)
    monkeypatch.setattr(running, "default_dtype", lambda: jnp.bfloat16)  # as on an accelerator
    with pytest.raises(ConfigError, match="contains answers for a different dtype"):
        command.main(flags)


@pytest.mark.usefixtures("one_copy")
def test_answers_are_those_of_generate(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One by one, by the code of experiments/generate.py."""
    run(capsys, data, tmp_path, models[0])
    found = answers(tmp_path / "first/questions")
    from experiments.generate import build_parser

    args = build_parser().parse_args([f"--model={models[0]}", "--prompt=x", "--dtype=float32", "--max_new_tokens=5"])
    for i in (0, 1):
        images = [str(data / f"{i}.png")] if i else []
        assert chat.open_chat(args).ask(f"what is {i}?", images).text == found[f"q{i}"]


@pytest.mark.usefixtures("one_copy")
def test_blind_answers_are_those_about_the_pictures_of_others(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """As if the file of questions had the exchanged pictures; the difference is the right picture's."""
    result = run(capsys, data, tmp_path / "out", *models, blind=None)["tasks"]["questions"]
    pairs = [(each["model"], each["against"]) for each in result["differences"]]
    assert pairs == [("second", "first"), ("first", "first-blind"), ("second", "second-blind")]
    found = answers(tmp_path / "out/first-blind/questions")
    assert len(found) == QUESTIONS and found["q0"] == answers(tmp_path / "out/first/questions")["q0"]
    lines = [json.loads(line) for line in (data / "questions.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines[1:]):
        line["image"] = f"{1 + (i + 3) % 6}.png"
    exchanged = data / "exchanged.jsonl"
    exchanged.write_text("\n".join(map(json.dumps, lines)))
    other = run(capsys, data, tmp_path / "other", models[0], tasks=f"questions={exchanged}")["tasks"]["questions"]
    assert answers(tmp_path / "other/first/questions") == found
    assert other["models"]["first"] == result["models"]["first-blind"]
    assert "first-blind" in (tmp_path / "out/report.html").read_text()
    alone = run(capsys, data, tmp_path / "alone", models[0], blind=None, limit=2)
    assert list(alone["tasks"]["questions"]["models"]) == ["first"], "one picture has no other"


def test_copies_on_several_devices_answer_the_same(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = []
    for name, devices in (("two", 2), ("one", 1)):
        monkeypatch.setattr(running.jax, "local_devices", lambda devices=devices: jax.devices()[:devices])
        run(capsys, data, tmp_path / name, models[0])
        found.append(answers(tmp_path / name / "first/questions"))
    assert found[0] == found[1]


@pytest.mark.usefixtures("one_copy")
def test_report_and_categories(models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = run(capsys, data, tmp_path, *models)
    of_model = result["tasks"]["questions"]["models"]["second"]
    assert {name: score["n"] for name, score in of_model["by_category"].items()} == {"a": 4, "b": 3}
    assert of_model["constant"]["answer"] == "no" and of_model["constant"]["score"] == pytest.approx(100 * 4 / 7)
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") >= 6 and "what is 3?" in text and "Differences" in text


def test_categories_are_compared_with_their_own_constant_and_with_the_other_model():
    """All in all the models are equal, and so is "yes" in one category and nothing in the other."""
    truths = {"color": ["red", "red", "blue", "teal"], "has_color": ["yes", "no"] * 2}
    examples = [
        Example(f"{kind}{number}", (("human", "?"),), truths=(truth,), category=kind)
        for kind, all_truths in truths.items()
        for number, truth in enumerate(all_truths)
    ]
    right = {example.id: example.truths[0] for example in examples}
    sees = right | {f"has_color{number}": "yes" for number in range(4)}
    reads = right | {f"color{number}": "red" for number in range(4)}
    [task] = find_tasks("questions")
    scored = {
        name: Scored(task, examples, answers, judged.Memory(judges.NoJudge()))
        for name, answers in (("sees", sees), ("reads", reads))
    }
    found = {name: each.to_json()["by_category"] for name, each in scored.items()}
    assert {name: [of["score"] for of in each.values()] for name, each in found.items()} == {
        "sees": [100, 50], "reads": [50, 100],
    }  # fmt: skip
    assert found["sees"]["color"]["constant"] == {"answer": "red", "score": 50}
    assert found["reads"]["has_color"]["constant"]["score"] == 50
    [difference] = differences(scored, [("sees", "reads")])
    assert difference["difference"] == 0
    gains = {
        name: (each["difference"], each["better"], each["worse"]) for name, each in difference["by_category"].items()
    }
    assert gains == {"color": (50, 2, 0), "has_color": (-50, 0, 2)}
    models = {name: each.to_json() for name, each in scored.items()}
    [shown] = _categories({"models": models, "differences": [difference]})
    assert "<th>sees minus reads</th>" in shown and "()" not in shown and "50.00 (red)" in shown and "+50.00 (" in shown


def test_a_question_of_several_categories_counts_in_each():
    """POPE's, about the pictures of two; the difference by category is of the same questions."""
    rows = [("adversarial,popular", "Yes"), ("adversarial", "No"), ("popular", "No")] * 2
    examples = [
        Example(str(number), (("human", "?"),), truths=(truth,), category=categories, group=f"{number // 3}.png")
        for number, (categories, truth) in enumerate(rows)
    ]
    right = {example.id: example.truths[0] for example in examples}
    [task] = find_tasks("pope")
    scored = {
        name: Scored(task, examples, answers, judged.Memory(judges.NoJudge()))
        for name, answers in (("sees", right), ("errs", right | {"2": "Yes", "5": "Yes"}))
    }
    found = {name: each.to_json() for name, each in scored.items()}
    assert found["sees"]["scores"]["f1"]["score"] == 100
    assert {name: (of["score"], of["n"]) for name, of in found["sees"]["by_category"].items()} == {
        "adversarial": (100, 4), "popular": (100, 4),
    }  # fmt: skip
    assert found["errs"]["by_category"]["adversarial"]["score"] == 100
    assert found["errs"]["by_category"]["popular"]["score"] == pytest.approx(200 / 3)
    assert all(scored["sees"].is_right().values()) and not scored["errs"].is_right()["2"]
    difference, *_ = differences(scored, [("sees", "errs")])
    assert (difference["units"], difference["better"], difference["worse"]) == (2, 2, 0)
    by_category = difference["by_category"]
    assert {name: (each["better"], each["worse"]) for name, each in by_category.items()} == {
        "adversarial": (0, 0), "popular": (2, 0),
    }  # fmt: skip


def test_examples_are_called_right_or_wrong_by_themselves():
    """POPE's F1 of a single right no would be 0; captions and MME score examples together."""
    said = {"1": ("no", "no"), "2": ("yes", "no")}
    examples = [Example(name, (("human", "?"),), truths=(truth,), category="x") for name, (truth, _) in said.items()]
    answers, judge = {name: answer for name, (_, answer) in said.items()}, judged.Memory(judges.NoJudge())
    for task, right in (("pope", {"1": True, "2": False}), ("questions", {"1": True, "2": False}), ("captions", {})):
        [found] = find_tasks(task)
        assert Scored(found, examples, answers, judge).is_right() == right


@pytest.mark.usefixtures("one_copy")
def test_what_scores_lack_is_said(models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = {"index": 1, "image": "1.png", "question": "which?", "A": "cat", "B": "dog", "answer": "A"}
    (data / "one_order.jsonl").write_text(json.dumps(row))
    result = run(capsys, data, tmp_path, models[0], tasks=f"mmbench_dev_en={data / 'one_order.jsonl'}")
    task = result["tasks"]["mmbench_dev_en"]
    assert list(task["models"]["first"]["scores"]) == ["accuracy"]
    [note] = task["notes"]
    assert (
        "no question occurs in several orders" in note and note.split(",")[0] in (tmp_path / "report.html").read_text()
    )


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    found = {"score": "x", "model": "b", "against": "a", "difference": -0.001, "low": -0.004, "high": 0.001}
    difference = {**found, "better": 1, "worse": 2, "p": 1.0}
    [_, row] = difference_rows({"tasks": {"t": {"differences": [difference]}}})
    assert row[4:6] == ["+0.00", "0.00 to 0.00"]


@pytest.mark.slow
def test_two_processes_are_one(models: list[Path], data: Path, tmp_path: Path, clusters: list[Cluster]):
    """One set of answers, scores and report; a second start asks nothing and finds what a process lost."""

    def evaluated(out: str, processes: int) -> dict[str, Any]:
        options = [f"--model={models[0]}", f"--data={data}", "--tasks=questions", "--max_new_tokens=5", "--json"]
        options += ["--dtype=float32", "--batch_size=2", f"--out={tmp_path / out}"]
        workdir = tmp_path / f"log-{out}-{len(clusters)}"
        clusters.append(cluster := Cluster(None, workdir, processes, options, command="evaluate.py", devices=2))
        assert cluster.wait() == [0] * processes, cluster.said(0)
        return json.loads(cluster.said(0).splitlines()[-1])

    one, two = evaluated("one", 1), evaluated("two", 2)
    assert two == one
    folder = tmp_path / "two/first/questions"
    shares = [predictions.read_lines(folder / name) for name in ("predictions.jsonl", "predictions.1.jsonl")]
    assert [len(share) for share in shares] == [4, 3]
    found = {line["id"]: line["answer"] for share in shares for line in share}
    assert found == answers(tmp_path / "one/first/questions")
    whole = (folder / "predictions.jsonl").read_text()
    lines = (folder / "predictions.1.jsonl").read_text().splitlines(keepends=True)
    (folder / "predictions.1.jsonl").write_text("".join(lines[:1]))  # as after a kill
    assert evaluated("two", 2) == one
    assert (folder / "predictions.jsonl").read_text().startswith(whole)
    kept = [line["id"] for file in folder.glob("predictions*.jsonl") for line in predictions.read_lines(file)]
    assert sorted(kept) == sorted(found), "nothing is asked twice"


def test_texts_are_escaped_on_the_page():
    result = {"models": {"<b>": "x"}, "tasks": {}}
    assert "<h1>Evaluation of &lt;b&gt;</h1>" in page(result, {})


def test_mistakes_are_told_before_a_model_is_loaded(models: list[Path], data: Path, tmp_path: Path):
    def refused(error: type[Exception], message: str, *flags: str) -> None:
        with pytest.raises(error, match=message):
            command.main([f"--data={data}", f"--out={tmp_path}", *flags])

    one = f"--model={models[0]}"
    refused(ConfigError, "unknown task 'question'", one, "--tasks=question")
    refused(ConfigError, "graded by a language model: give --judge=", one, "--tasks=mmvet")
    refused(DataError, r"has none of MME\.tsv", one, "--tasks=mme")
    refused(DataError, r"MME\.tsv.*\(mme\).* what is missing: --tasks=questions", one, "--tasks=mme,questions")
    row = {"index": 1, "image": "1.png", "question": "is it?", "answer": "yes", "category": "color"}
    (data / "half.jsonl").write_text(json.dumps(row))
    refused(DataError, "1 questions, and acc\\+ needs two of each image", one, f"--tasks=mme={data / 'half.jsonl'}")
    refused(ConfigError, "names the same folder twice", "--model", str(models[0]), str(models[0]), "--tasks=questions")
    refused(ConfigError, "name its model with --judge_model", one, "--tasks=mmvet", "--judge=http://localhost/v1")


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/a/s2"], ["s2"]),
        (["/runs/a/s2", "/runs/b/s2"], ["a-s2", "b-s2"]),
        (["/runs/a/model", "/runs/b/s2"], ["a-model", "b-s2"]),
    ],
)
def test_models_are_called_by_what_tells_them_apart(folders: list[str], names: list[str]):
    assert running.labels(folders) == dict(zip(names, folders))


def test_a_judge_is_asked_once(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running, "local_mesh", lambda model: None)
    line = {"index": 1, "image": "1.png", "question": "what?", "answer": "cat", "category": "rec"}
    (data / "MMVet.jsonl").write_text(json.dumps(line))
    script = tmp_path / "judge.sh"
    script.write_text(f"cat > /dev/null; echo x >> {tmp_path}/asked; echo 0.5")
    for _ in range(2):
        result = run(capsys, data, tmp_path / "out", models[0], tasks="mmvet", judge=f"sh {script}")
        assert result["tasks"]["mmvet"]["models"]["first"]["scores"]["rec"]["score"] == 50
    assert (tmp_path / "asked").read_text() == "x\n"
    assert result["tasks"]["mmvet"]["judge"].startswith("sh ")


@pytest.mark.usefixtures("one_copy")
@pytest.mark.parametrize(("says", "message"), [("echo nothing", "no grade in its reply 'nothing'"), ("exit 3", "3")])
def test_a_judge_that_fails_costs_only_its_own_task(
    models: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], says: str, message: str
):
    line = {"index": 1, "image": "1.png", "question": "what?", "answer": "cat", "category": "rec"}
    (data / "MMVet.jsonl").write_text(json.dumps(line))
    script = tmp_path / "judge.sh"
    script.write_text(f"cat > /dev/null; {says}")
    flags = {"tasks": "mmvet,questions", "judge": f"sh {script}", "limit": 2}
    with pytest.raises(JudgeError, match=f"mmvet is not scored: judge .*{message}.*: run again to continue"):
        run(capsys, data, tmp_path / "out", models[0], **flags)
    assert list(json.loads((tmp_path / "out/scores.json").read_text())["tasks"]) == ["questions"]
    script.write_text("cat > /dev/null; echo 1")
    assert list(run(capsys, data, tmp_path / "out", models[0], **flags)["tasks"]) == ["mmvet", "questions"]
