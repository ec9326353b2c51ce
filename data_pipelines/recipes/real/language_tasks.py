"""Tasks for lm-evaluation-harness from texts in registries: which of four definitions belongs to a word.

NAME.yaml, NAME.py, NAME.jsonl      a task of the harness; --include_path names their folder
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.parts import Counts, sample_rng
from data_pipelines.recipes.real.catalogue import Options, Recipe
from data_pipelines.recipes.real.readers import english

QUESTIONS = 1000
CHOICES = 4
LEAST = 20  # characters of a definition

TASK = """\
# Choose WordNet's definition of a word: the likeliest of four (acc), the likeliest per byte (acc_norm).
task: word_meaning
custom_dataset: !function word_meaning.questions
test_split: test
output_type: multiple_choice
doc_to_text: "The {{part}} \\"{{word}}\\" means:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
READER = '''\
"""Reads the questions beside this file, wherever the folder lies."""

from pathlib import Path

import datasets


def questions(**unused):
    return datasets.load_dataset("json", data_files={"test": str(Path(__file__).with_name("word_meaning.jsonl"))})
'''


def _write_word_meaning(options: Options, folder: Path, roots: list[Path]) -> Counts:
    (folder / "word_meaning.yaml").write_text(TASK)
    (folder / "word_meaning.py").write_text(READER)
    questions = word_questions(roots[0], options.count(QUESTIONS), options.seed)
    return {"questions": write_jsonl(folder / "word_meaning.jsonl", questions)}


def word_questions(root: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` words drawn from WordNet, each with its definition and three of other words of its part of speech.

    Every word occurs once; right answers are at each position equally often, and none contains the word.
    """
    meanings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for part, word, gloss in english.read_wordnet_senses(root):
        if word.isalpha() and word.islower():
            meanings[part, word].append(gloss)
    words = [key for key, glosses in meanings.items() if len(glosses[0]) >= LEAST and key[1] not in glosses[0].lower()]
    of_part: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in words:
        of_part[key[0]].append(key)
    rng = sample_rng(seed, "word_meaning")
    questions = []
    for number in rng.permutation(len(words)).tolist():
        if len(questions) == count:
            break
        part, word = key = words[number]
        drawn = rng.permutation(len(of_part[part]))[: CHOICES + 1].tolist()
        others = [other for other in (of_part[part][place] for place in drawn) if other != key]
        wrong = [meanings[other][0] for other in others if meanings[other][0] not in meanings[key]][: CHOICES - 1]
        if len(wrong) < CHOICES - 1:
            continue  # too few words of its part of speech
        answer = len(questions) % CHOICES
        choices = [*wrong[:answer], meanings[key][0], *wrong[answer:]]
        questions.append({"word": word, "part": part, "choices": choices, "answer": answer})
    return questions


RECIPES: dict[str, Recipe] = {"word_meaning": _write_word_meaning}
