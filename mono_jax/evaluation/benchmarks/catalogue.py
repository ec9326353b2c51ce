"""The benchmarks: their files, how each is asked (as published for InternVL), and how its answers are scored."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError, unknown_key
from mono_jax.evaluation.benchmarks import submissions
from mono_jax.evaluation.benchmarks.reading import columns, forms
from mono_jax.evaluation.benchmarks.reading.annotations import captions_of, is_coco, with_answers
from mono_jax.evaluation.benchmarks.reading.columns import Pictures
from mono_jax.evaluation.benchmarks.reading.example import Example, Picture
from mono_jax.evaluation.benchmarks.reading.ids import Ids
from mono_jax.evaluation.benchmarks.reading.rows import Row, read_rows
from mono_jax.evaluation.metrics.registry import SETS


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task.

    Attributes:
      files: paths below the data folder, of which the first that exists is used; with a ``*``, all matching files.
      form: turns a row into an example.
      metric: a key of ``metrics.registry``.
      max_new_tokens: maximum length of an answer.
      annotations: file with the right answers, if the main file lacks them.
      category: column whose values are reported separately; None = the first of the usual ones that exists.
      keep: column values that the rows of the task must have.
      submission: format of the file to submit if the right answers are hidden.
      ids: columns that may hold ids, see ``Ids``; () = rows are numbered.
    """

    files: tuple[str, ...]
    form: forms.Form
    metric: str
    max_new_tokens: int
    annotations: str | None = None
    category: str | None = None
    keep: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    submission: str | None = None
    ids: tuple[str, ...] = columns.ID

    def find(self, data: Path) -> list[Path]:
        """The task's files below ``data``; [] if there are none."""
        for pattern in self.files:
            found = sorted(data.glob(pattern)) if "*" in pattern else [data / pattern]
            if found and all(file.is_file() for file in found):
                return found
        return []

    def read(
        self, data: Path, file: Path | None = None, limit: int | None = None, images: Path | None = None
    ) -> list[Example]:
        """All examples, or the first ones: at most ``limit``, but in whole sets if the metric scores sets of examples.

        ``images``: where pictures are looked up first. Raises DataError that names file, row, column and fix.
        """
        files = [file] if file is not None else self.find(data)
        if not files:
            raise DataError(f"{data}: has none of {', '.join(self.files)}: give the file as TASK=FILE")
        examples = self._of(files, data, images)
        if self.annotations and not self.lacks_annotations(data):
            examples = with_answers(examples, data / self.annotations)
        found = self._first(examples, limit)
        if not found:
            raise DataError(f"{files[0]}: contains no examples" + (f" with {dict(self.keep)}" if self.keep else ""))
        if file is None and self.lacks_annotations(data) and has_single_answers(found):
            raise DataError(
                f"{files[0]}: no question has more than one right answer, and {data / self.annotations}, which has all "
                "of them, does not exist: add it (TASK=FILE scores with the answers in the file itself)"
            )
        self._check(found, files[0])
        return found

    def _check(self, found: Sequence[Example], file: Path) -> None:
        seen: set[str] = set()
        for example in found:
            if example.id in seen:
                raise DataError(f"{file}: id {example.id!r} occurs twice: ids must be unique")
            seen.add(example.id)
            if not example.truths and not self.submission:
                raise DataError(f"{file}: example {example.id} has no right answer, and {self.metric} needs one")

    def lacks_annotations(self, data: Path) -> bool:
        """Whether the right answers are in a separate file, which is missing below ``data``."""
        return self.annotations is not None and not (data / self.annotations).is_file()

    def hides(self, examples: Sequence[Example]) -> bool:
        """Whether the right answers are missing, so that the model's answers are submitted to be scored."""
        return self.submission is not None and not all(example.truths for example in examples)

    def _first(self, examples: Iterator[Example], limit: int | None) -> list[Example]:
        """Takes sets in the order of their first examples; examples keep the order of the file; at least one set."""
        if limit is None or self.metric not in SETS:
            return list(itertools.islice(examples, limit))
        every = list(examples)
        names = [SETS[self.metric](example.answered("")) for example in every]
        sizes, taken, count = collections.Counter(names), set(), 0
        for name, size in sizes.items():  # in the order of the file
            if taken and count + size > limit:
                break
            taken.add(name)
            count += size
        return [example for example, name in zip(every, names) if name in taken]

    def _of(self, files: Sequence[Path], data: Path, images: Path | None) -> Iterator[Example]:
        ids, count = self._ids(files, data), 0
        for file in files:
            pictures = Pictures([*([images] if images else []), file.parent, data, file.parent.parent])
            for row in self._rows(file):
                count += 1
                shown = pictures.of(row)  # also for rows that are left out, since other rows may refer to their picture
                if self._keeps(row):
                    example = self._example(row, shown)
                    number = row.number if len(files) == 1 else count
                    yield dataclasses.replace(example, id=ids.of(row, number, example))

    def _example(self, row: Row, shown: tuple[Picture, ...]) -> Example:
        example = self.form(row, shown)
        if self.category is not None:
            example = dataclasses.replace(example, category=str(row.values.get(self.category, "")))
        is_hidden = self.submission is not None and not example.truths
        if is_hidden and (lacks := submissions.lacking(self.submission, row.values, example)):
            raise DataError(f"{row.place}: {lacks}: the server that scores the answers goes by it")
        return example

    def _ids(self, files: Sequence[Path], data: Path) -> Ids:
        """Where a server, an annotation or another order of the options goes by an id, no other column will do."""
        names = (*submissions.KEYS.get(self.submission or "", ()), *self.ids)
        has_answers_elsewhere = self.annotations and not self.lacks_annotations(data)
        if self.submission or has_answers_elsewhere or self.metric == "circular":
            return Ids(names)
        return Ids(names, (row for file in files for row in self._rows(file) if self._keeps(row)))

    def _rows(self, file: Path) -> Iterator[Row]:
        return captions_of(file) if is_coco(file) and self.metric == "captions" else read_rows(file)

    def _keeps(self, row: Row) -> bool:
        return all(str(row.values.get(column, values[0])) in values for column, values in self.keep.items())


def has_single_answers(examples: Sequence[Example]) -> bool:
    """Whether no example has more than one right answer."""
    return all(len(example.truths) < 2 for example in examples)


def _vqa(name: str, folder: str, annotations: str, metric: str = "vqa_accuracy", suffix: str = "", **rest) -> Benchmark:
    """InternVL's JSONL of questions with the benchmark's own annotations, or VLMEvalKit's TSV with several answers."""
    return Benchmark(
        (f"{folder}/{name}.jsonl", f"{name}.jsonl", f"{name}.tsv"),
        forms.short(f" {suffix}{forms.SHORT}"),
        metric,
        rest.pop("max_new_tokens", 10),
        annotations=f"{folder}/{annotations}" if annotations else None,
        **rest,
    )


def _table(name: str, form: forms.Form, metric: str, max_new_tokens: int, **rest) -> Benchmark:
    """VLMEvalKit's TSV, or the same columns as JSONL or Parquet."""
    files = (f"{name}.tsv", f"{name}.jsonl", f"{name}.json", f"{name}/*.parquet", f"{name}.parquet")
    return Benchmark(files, form, metric, max_new_tokens, **rest)


def _circular(name: str, **rest) -> Benchmark:
    return _table(name, forms.circular, "circular", 100, ids=columns.INDEX, **rest)


def _captions(*files: str, submission: str | None = None) -> Benchmark:
    return Benchmark(files, forms.caption, "captions", 30, submission=submission)


def _boxes(name: str) -> Benchmark:
    """Ids of pictures or boxes repeat, since a box has several sentences."""
    return Benchmark((f"refcoco/{name}.jsonl", f"{name}.jsonl"), forms.box, "grounding", 100, ids=())


_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'. "
_LINE = f"\n{forms.SHORT}"

BENCHMARKS: dict[str, Benchmark] = {
    "vqav2_val": _vqa("vqav2_val", "vqav2", "v2_mscoco_val2014_annotations.json"),
    "vqav2_testdev": _vqa("vqav2_testdev", "vqav2", "", submission="vqa"),
    "okvqa_val": _vqa("okvqa_val", "okvqa", "mscoco_val2014_annotations.json"),
    "vizwiz_val": _vqa("vizwiz_val", "vizwiz", "vizwiz_val_annotations.json", suffix=_UNANSWERABLE),
    "vizwiz_test": _vqa("vizwiz_test", "vizwiz", "", suffix=_UNANSWERABLE, submission="vizwiz"),
    "textvqa_val": _vqa("textvqa_val", "textvqa", "textvqa_val_annotations.json"),
    "textvqa_test": _vqa("textvqa_test", "textvqa", "", submission="vqa"),
    "docvqa_val": _vqa("val", "docvqa", "val/val_v1.0.json", "anls", max_new_tokens=100),
    "docvqa_test": _vqa("test", "docvqa", "", "anls", max_new_tokens=100, submission="docvqa"),
    "infovqa_val": _vqa("val", "infographicsvqa", "infographicsVQA_val_v1.0_withQT.json", "anls", max_new_tokens=100),
    "infovqa_test": _vqa("test", "infographicsvqa", "", "anls", max_new_tokens=100, submission="docvqa"),
    "chartqa_human": _vqa("test_human", "chartqa", "", "relaxed_accuracy", max_new_tokens=100),
    "chartqa_augmented": _vqa("test_augmented", "chartqa", "", "relaxed_accuracy", max_new_tokens=100),
    "gqa_testdev": _vqa("llava_gqa_testdev_balanced_qwen_format", "gqa", "", "gqa"),
    "textvqa_tsv": _table("TextVQA_VAL", forms.short(_LINE), "vqa_accuracy", 10),
    "docvqa_tsv": _table("DocVQA_VAL", forms.short(_LINE), "anls", 100),
    "infovqa_tsv": _table("InfoVQA_VAL", forms.short(_LINE), "anls", 100),
    "chartqa_tsv": _table("ChartQA_TEST", forms.short(_LINE), "relaxed_accuracy", 100, category="split"),
    "gqa_tsv": _table("GQA_TestDev_Balanced", forms.short(_LINE), "gqa", 10),
    "ocrbench": _table("OCRBench", forms.short(_LINE), "contains", 100, category="category"),
    "ai2d": _table("AI2D_TEST", forms.choice(), "multiple_choice", 10),
    "scienceqa": _table("ScienceQA_TEST", forms.choice(), "multiple_choice", 10),
    "seed_image": _table("SEEDBench_IMG", forms.choice(), "multiple_choice", 10),
    "mmmu_val": _table(
        "MMMU_DEV_VAL", forms.choice(forms.LETTER, forms.SHORT), "mmmu", 10, keep={"split": ("validation",)}
    ),
    "mmmu_test": _table("MMMU_TEST", forms.choice(forms.LETTER, forms.SHORT), "mmmu", 10, submission="mmmu"),
    "mmbench_dev_en": _circular("MMBench_DEV_EN"),
    "mmbench_dev_cn": _circular("MMBench_DEV_CN"),
    "mmbench_test_en": _circular("MMBench_TEST_EN", submission="mmbench"),
    "mmbench_test_cn": _circular("MMBench_TEST_CN", submission="mmbench"),
    "ccbench": _circular("CCBench"),
    "mme": _table("MME", forms.short(), "mme", 20, category="category"),
    "hallusionbench": _table(  # whose question_id counts within a figure
        "HallusionBench", forms.hallusion, "hallusion", 20, category="l2-category", ids=("index",)
    ),
    "pope": _table("POPE", forms.short(), "pope", 100, category="category"),
    "mathvista": _table("MathVista_MINI", forms.math_vista, "math_vista", 512, category="task"),
    "mmvet": _table("MMVet", forms.short(""), "mm_vet", 512, category="category"),
    "coco": _captions("coco/annotations/coco_karpathy_test.json", "coco_karpathy_test.json", "COCO_VAL.tsv"),
    "flickr30k": _captions("flickr30k/flickr30k_test_karpathy.json", "flickr30k_test_karpathy.json"),
    "nocaps": _captions("nocaps/nocaps_val_4500_captions.json", "nocaps_val_4500_captions.json"),
    "nocaps_test": _captions(
        "nocaps/nocaps_test_image_info.json", "nocaps_test_image_info.json", submission="captions"
    ),
    **{
        f"{name}_{split}": _boxes(f"{file}_{split}")
        for name, file, splits in (
            ("refcoco", "refcoco", ("val", "testA", "testB")),
            ("refcoco+", "refcoco+", ("val", "testA", "testB")),
            ("refcocog", "refcocog", ("val", "test")),
        )
        for split in splits
    },
    "questions": Benchmark(("questions.jsonl",), forms.conversation, "exact_match", 32),
    "captions": _captions("captions.jsonl", "captions.json"),
}
# Captioning before instruction tuning, e.g. after S1.2 and S1.3 (Mono-InternVL, table 4), and other lists of tasks.
GROUPS: dict[str, tuple[str, ...]] = {
    "zero_shot": ("coco", "flickr30k", "nocaps", "vqav2_val"),
    "refcoco_all": tuple(name for name in BENCHMARKS if name.startswith("refcoco")),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One entry of --tasks. ``file``: None = the benchmark's usual place."""

    name: str
    benchmark: Benchmark
    file: Path | None = None


def find_tasks(named: str) -> list[Task]:
    """The tasks of "mme,coco" or "questions=my.jsonl"; names may be names of groups and may contain a ``*``.

    "LABEL:NAME=FILE" gives the task the name LABEL, so that one benchmark can be run on several files. A task that is
    named several times, e.g. by itself and by a group, is one. Raises ConfigError, also for two tasks of one name.
    """
    tasks: dict[str, Task] = {}
    for part in filter(None, (each.strip() for each in named.split(","))):
        label, _, file = part.partition("=")
        label, _, name = label.rpartition(":")
        for found in _names(name):
            key = label or found
            task = Task(key, BENCHMARKS[found], Path(file) if file else None)
            if tasks.setdefault(key, task) != task:
                raise ConfigError(f"--tasks: two tasks are called {key!r}: give each its own as LABEL:TASK=FILE")
    if not tasks:
        raise unknown_key("task", named, [*BENCHMARKS, *GROUPS])
    return list(tasks.values())


def need_files(tasks: Sequence[Task], data: Path) -> None:
    """Raises DataError that names all tasks whose files are missing, and how to leave these tasks out."""
    missing = [task for task in tasks if task.file is None and not task.benchmark.find(data)]
    if missing:
        wanted = "; ".join(f"none of {', '.join(task.benchmark.files)} ({task.name})" for task in missing)
        rest = ",".join(task.name for task in tasks if task not in missing)
        without = f", or leave out what is missing: --tasks={rest}" if rest else ""
        raise DataError(f"{data}: has {wanted}: give the file as TASK=FILE{without}")


def _names(name: str) -> Sequence[str]:
    if name in GROUPS:
        return GROUPS[name]
    if found := fnmatch.filter(BENCHMARKS, name):
        return found
    raise unknown_key("task", name, [*BENCHMARKS, *GROUPS])
