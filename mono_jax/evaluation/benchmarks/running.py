"""Evaluates models on tasks: each process answers its share of the examples with its own copy of the model."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.io import publish
from data_pipelines.io.blobs import content_mark
from data_pipelines.io.digests import digest
from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.evaluation.benchmarks import page, submissions
from mono_jax.evaluation.benchmarks.answering import Asker
from mono_jax.evaluation.benchmarks.catalogue import Task, find_tasks, need_files
from mono_jax.evaluation.benchmarks.other_pictures import with_other_pictures
from mono_jax.evaluation.benchmarks.predictions import Predictions, Replies
from mono_jax.evaluation.benchmarks.preparing import Prepared, prepare
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.evaluation.benchmarks.scoring import Scored, differences
from mono_jax.evaluation.judges import JudgeError, find_judge
from mono_jax.evaluation.metrics.judged import Memory
from mono_jax.evaluation.metrics.registry import JUDGED
from mono_jax.generation.chat import PROMPT_FLAGS, Opened, model_flags, open_model, prompt_format, tiling_of
from mono_jax.generation.decode import default_dtype
from mono_jax.parallel.agreement import barrier, first_process_first, together
from mono_jax.parallel.mesh import make_mesh
from mono_jax.storage.places import Place
from mono_jax.weights.model_folder import MODEL_FILE, PARAMS_FOLDER, TOKENIZER_FILES, find_model
from mono_jax.weights.model_folder import open_model as open_weights

Say = Callable[[str], None]
BLIND = "-blind"  # after a model's label where it is asked about other pictures
_WEIGHTS = (MODEL_FILE, "config.json", *TOKENIZER_FILES, f"{PARAMS_FOLDER}/**/*", "*.safetensors", "*.bin")


def evaluate(args: Any) -> dict[str, Any]:
    """Runs ``experiments/evaluate.py``; returns what ``--json`` prints, on the first process ({} on the others).

    Raises DataError, ConfigError, WeightsError or GenerationError with the fix in the message; JudgeError after all
    tasks that the judge did not fail are scored and reported.
    """
    out, data = Path(args.out), Path(args.data)
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
    tasks, models = find_tasks(args.tasks), labels(args.model)
    judge = find_judge(args.judge, args.judge_model)
    if not args.judge and (judged := [task.name for task in tasks if task.benchmark.metric in JUDGED]):
        judge(judged[0])  # raises before anything is answered
    with together():
        need_files(tasks, data)
        prepared = {task.name: prepare(task, data, args.limit) for task in tasks}
    examples = {name: each.examples for name, each in prepared.items()}
    for task in tasks:
        if task.benchmark.hides(examples[task.name]):
            submissions.check(task.benchmark.submission)
        for note in prepared[task.name].notes:
            say(f"NOTE: {note}")
    rounds = {"": examples} | ({BLIND: _blind(tasks, examples, models, say)} if args.blind else {})
    answers: dict[str, dict[str, dict[str, str]]] = {task.name: {} for task in tasks}
    for label, model in models.items():
        for name, suffix, found in _answers(args, label, model, tasks, rounds, out, say):
            answers[name][label + suffix] = found
    if jax.process_index() != 0:
        return {}
    result: dict[str, Any] = {"models": models, "data": str(data), "tasks": {}}
    shown: dict[str, page.Shown] = {}
    failed: list[JudgeError] = []
    for task in tasks:
        folder = functools.partial(_folder, out, task.name)
        try:
            found = _scored(task, prepared[task.name], answers[task.name], folder, judge, models)
            result["tasks"][task.name], shown[task.name] = found
        except JudgeError as error:
            failed.append(JudgeError(f"{task.name} is not scored: {error}: run again to continue"))
    publish.write_json(out / "scores.json", result)
    publish.write_text(out / "report.html", page.page(result, shown))
    say(page.table(result))
    say(f"{out / 'report.html'}, {out / 'scores.json'}")
    if failed:
        raise failed[0]
    return result


def _folder(out: Path, task: str, label: str) -> Path:
    return out / label / task


def labels(models: Sequence[str]) -> dict[str, str]:
    """{short name: folder}: the shortest end of each folder's path that distinguishes it from the others."""
    paths = [Path(model).absolute().parts[1:] for model in models]
    if len(set(paths)) < len(paths):
        raise ConfigError("--model names the same folder twice")
    for length in range(1, max(map(len, paths)) + 1):
        short = ["-".join(part for part in path[-length:]) for path in paths]
        if len(set(short)) == len(short) and "model" not in short:
            break
    return dict(zip(short, models))


def _blind(
    tasks: Sequence[Task], examples: Mapping[str, Sequence[Example]], models: Mapping[str, str], say: Say
) -> dict[str, list[Example]]:
    """The examples of each task about other pictures; without the tasks that have none, or hide their answers."""
    if taken := [label for label in models if label + BLIND in models]:
        raise ConfigError(f"--blind: {taken[0] + BLIND} is a model's own name: rename its folder")
    scored = [task.name for task in tasks if not task.benchmark.hides(examples[task.name])]
    exchanged, notes = with_other_pictures({name: examples[name] for name in scored})
    for note in notes:
        say(f"NOTE: {note}")
    return exchanged


def _answers(
    args: Any,
    label: str,
    model: str,
    tasks: Sequence[Task],
    rounds: Mapping[str, Mapping[str, Sequence[Example]]],
    out: Path,
    say: Say,
) -> list[tuple[str, str, dict[str, str]]]:
    """One model's answers to all tasks; the model is loaded only if any answers are missing."""
    opened, known = None, identity(find_model(model))
    form = prompt_format(find_model(model), **{name: getattr(args, name) for name in PROMPT_FLAGS})
    found = []
    for suffix, task in itertools.product(rounds, tasks):
        if task.name not in rounds[suffix]:
            continue
        decides = {
            "model": known,
            "prompt": form.to_dict(),
            "max_new_tokens": args.max_new_tokens or task.benchmark.max_new_tokens,
            "dtype": jnp.dtype(args.dtype or default_dtype()).name,
            "tokenizer": digest(*map(content_mark, _tokenizer_files(args.tokenizer))),
        }
        with first_process_first():
            kept = Predictions(_folder(out, task.name, label + suffix), decides, jax.process_index())
            kept.begin()
        asked = rounds[suffix][task.name]
        there = kept.of(asked)
        mine = [example for example in asked[jax.process_index() :: jax.process_count()] if example.id not in there]
        barrier()  # no process adds answers before all have read the existing ones
        if len(there) < len(asked):
            opened = opened or open_model(model, local_mesh(model), **model_flags(args))
            asker = asker_of(opened)
            say(f"{label + suffix}, {task.name}: {len(asked)} examples, {len(there)} already answered")
            done = 0
            for batch in asker.answers(mine, decides["max_new_tokens"], args.batch_size):
                kept.add(batch)
                done += len(batch)
                if done * 10 // len(mine) > (done - len(batch)) * 10 // len(mine):
                    say(f"{label + suffix}, {task.name}: {done} of {len(mine)}")
        barrier()
        there = kept.of(asked)
        if lost := [example.id for example in asked if example.id not in there]:
            raise ConfigError(
                f"{kept.folder}: the answers to {lost[0]} and {len(lost) - 1} other examples are missing: "
                "--out must be a folder that all processes share"
            )
        found.append((task.name, suffix, there))
    return found


def asker_of(opened: Opened) -> Asker:
    """Asks for greedy answers in the model's own prompt format."""
    chat = ChatEncoder(opened.tokenizer, opened.form.template, opened.form.system_message)
    tiling = tiling_of(opened.generator.config, opened.form)
    return Asker(opened.generator, opened.tokenizer, chat, tiling)


def identity(folder: Place) -> str:
    """An identity that changes with the weights, the architecture or the tokenizer of a model."""
    if not isinstance(folder, Path):
        return digest(str(folder), (folder / MODEL_FILE).read_bytes())
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    return digest(*(part for f in files for part in (f.relative_to(folder).as_posix(), content_mark(str(f)))))


def _tokenizer_files(path: str | None) -> list[str]:
    if path is None:
        return []
    place = Path(path)
    files = [place / name for name in TOKENIZER_FILES] if place.is_dir() else [place]
    return [str(file) for file in files if file.is_file()]


def local_mesh(model: str) -> Mesh | None:
    """This process's devices, with one copy of the model on as few of them as its size allows; None = one device."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    _, lazy, _ = open_weights(model, verify=False)
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tree.flatten(lazy).values())
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return make_mesh(devices=devices, state_bytes=held, memory=memory)


def _scored(
    task: Task,
    prepared: Prepared,
    answers: Mapping[str, Mapping[str, str]],
    folder: Callable[[str], Path],
    judge: Any,
    models: Collection[str],
) -> tuple[dict[str, Any], page.Shown]:
    """({"examples", "metric", "notes", "models": {label: scores or submission}, "differences"}, data for the page).

    "notes" and "differences" are left out if empty.
    """
    benchmark, examples = task.benchmark, prepared.examples
    result: dict[str, Any] = {"metric": benchmark.metric, "examples": len(examples), "models": {}}
    if prepared.notes:
        result["notes"] = prepared.notes
    if hidden := benchmark.hides(examples):
        for label, given in answers.items():
            written = submissions.write(folder(label), benchmark.submission, [(e, given[e.id]) for e in examples])
            result["models"][label] = {"submission": str(written)}
        scored = {}
    else:
        scored = {
            label: Scored(task, examples, given, Memory(judge, Replies(folder(label) / "judged.jsonl", judge.name)))
            for label, given in answers.items()
        }
        result["models"] = {label: each.to_json() for label, each in scored.items()}
        result["differences"] = differences(scored, _pairs(models, scored))
    if benchmark.metric in JUDGED and not hidden:
        result["judge"] = judge.name
    right = {label: scored[label].is_right() for label in models if label in scored}
    return result, page.Shown(examples, answers, right)


def _pairs(models: Collection[str], scored: Collection[str]) -> list[tuple[str, str]]:
    """Models are compared with those before them, and each with itself about other pictures."""
    blind = [(label, label + BLIND) for label in models if label + BLIND in scored]
    return [(second, first) for first, second in itertools.combinations(models, 2)] + blind
