"""Conversations (S2): easy-vqa, questions about collages, names in several languages, definitions of words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from data_pipelines.recipes.conversations import NUMBERS, Conversation, Turn, boxes_text, by_question, messages
from data_pipelines.recipes.easy_vqa import balanced, kind_of, named_first, read_easy_vqa
from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.parts import Counts, sample_rng, skip_counts
from data_pipelines.recipes.real.catalogue import Options, Recipe, is_heldout
from data_pipelines.recipes.real.detection import Collage, Placed, package_composer
from data_pipelines.recipes.real.readers import clipart, emoji, english
from data_pipelines.recipes.real.readers.pictures import Pair, open_pairs, open_picture

T = TypeVar("T")

HELDOUT_QUESTIONS = 200
LESSONS = {"affirmative": False, "any_wording": True}  # of easy-vqa: file -> whether its questions may deny


def _write_easy_vqa(options: Options, folder: Path, roots: list[Path]) -> Counts:
    """Each question of the training split is a sample; held out is one question for each image of the test split.

    In one conversation per image, 79 % of the answers would follow from earlier turns, and with the published questions
    those by yes or no would follow from their wording: they are balanced, so that the image decides. Half of these
    deny ("is there not a circle?"), and nothing is learnt from both halves at once: ``LESSONS`` come one by one.
    """
    counts: Counts = {}
    about: list[tuple[str, list[Turn]]] = []
    for split, name in (("train", "train"), ("test", "heldout")):
        images = list(options.cut(read_easy_vqa(roots[0], split)))
        records = []
        for number, (path, turns) in enumerate(balanced(images, sample_rng(options.seed, f"easy_vqa/{split}"))):
            turns = turns if split == "train" else [turns[number % len(turns)]]
            image = open_picture(path).convert("RGB")
            singles = by_question(Conversation(f"{split}_{number:05d}", [image], turns).save(folder / "images"))
            records += [single | {"kind": kind_of(asked)} for single, (asked, _) in zip(singles, turns, strict=True)]
            if split == "train":
                about.append((singles[0]["image"], turns))
        counts[name] = write_jsonl(folder / f"{name}.jsonl", records)
    for lesson, may_deny in LESSONS.items():
        records = easy_vqa_lesson(about, may_deny, sample_rng(options.seed, f"easy_vqa/{lesson}"))
        counts[lesson] = write_jsonl(folder / f"{lesson}.jsonl", records)
    return {"conversations": counts.pop("train"), "held out": counts.pop("heldout")} | counts


def easy_vqa_lesson(
    about: Sequence[tuple[str, Sequence[Turn]]], may_deny: bool, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Conversations, in random order, that teach to answer by yes or no.

    For ten questions by yes or no there are two that ask what is there, and three conversations in which this is named
    before such a question. ``about``: the name of each image, and the turns about it.
    """
    asked, named, whats = [], [], []
    by_yes_or_no = ("has_", "lacks_") if may_deny else "has_"
    for image, turns in about:
        of_what = [turn for turn in turns if "_" not in kind_of(turn[0])]
        questions = [turn for turn in turns if kind_of(turn[0]).startswith(by_yes_or_no)]
        asked += [(image, [turn]) for turn in questions]
        whats += [(image, [turn]) for turn in of_what]
        if pair := named_first([*of_what, *questions], rng):
            named.append((image, pair))
    chosen = [*asked, *_some(whats, len(asked) * 2 // 10, rng), *_some(named, len(asked) * 3 // 10, rng)]
    records = []
    for number, index in enumerate(rng.permutation(len(chosen))):
        image, [(first, answer), *more] = chosen[index]
        turns = [(f"<image>\n{first}", answer), *more]
        records.append({"id": f"{number:06d}", "conversations": messages(turns), "image": image})
    return records


def _some(values: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    """At most ``count`` of them, chosen at random."""
    return [values[int(index)] for index in rng.permutation(len(values))[:count]]


def _write_collages(options: Options, folder: Path, roots: list[Path]) -> Counts:
    """Several questions about each collage; held out are other collages, each with one question with a short answer."""
    composer = package_composer(roots)
    names = sorted({name for name, _ in composer.stamps})

    def make(split: str, index: int) -> dict[str, Any]:
        rng = sample_rng(options.seed, f"collages/{split}", index)
        collage = composer.collage(rng)
        if split == "train":
            turns, kind = collage_turns(collage, names, rng), None
        else:
            candidates = short_turns(collage, names, rng)
            turns, kind = [candidates[int(rng.integers(len(candidates)))]], "collage"
        return Conversation(f"{split}_{index:05d}", [collage.image], turns, kind).save(folder / "images", "jpg")

    counts = {
        split: write_jsonl(folder / f"{split}.jsonl", (make(split, index) for index in range(options.count(wanted))))
        for split, wanted in (("train", options.collages), ("heldout", HELDOUT_QUESTIONS))
    }
    return {"conversations": counts["train"], "held out": counts["heldout"]}


def collage_turns(collage: Collage, others: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """Two to four turns about a collage; ``others`` are names to ask about that may be absent."""
    names = list(dict.fromkeys(p.label for p in collage.placed))
    turns = [("What objects were put on the picture?", f"{', '.join(names)}."), *short_turns(collage, others, rng)]
    if single := _named_once(collage):
        chosen = single[int(rng.integers(len(single)))]
        turns.append((f"Where is the <ref>{chosen.label}</ref>?", boxes_text([(chosen.label, chosen.box)])))
    return [turns[int(i)] for i in rng.permutation(len(turns))[:4]]


def short_turns(collage: Collage, others: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """The turns about a collage whose question has one short right answer."""
    names = {p.label for p in collage.placed}
    turns = [("How many objects were put on it?", f"{NUMBERS[len(collage.placed)].capitalize()}.")]
    absent = str(others[int(rng.integers(len(others)))])
    asked, answer = (absent, "No.") if rng.integers(2) and absent not in names else (collage.placed[0].label, "Yes.")
    turns.append((f"Is this among them: {asked}?", answer))
    single = _named_once(collage)
    if len(single) > 1:
        a, b = (single[int(i)] for i in rng.choice(len(single), size=2, replace=False))
        left = a if a.box[0] + a.box[2] < b.box[0] + b.box[2] else b
        turns.append((f"Which is further to the left, the {a.label} or the {b.label}?", f"The {left.label}."))
    return turns


def _named_once(collage: Collage) -> list[Placed]:
    labels = [p.label for p in collage.placed]
    return [p for p in collage.placed if labels.count(p.label) == 1]


def _translations(question: str, read: Callable[..., Iterable[Pair]]) -> Recipe:
    """Each picture with its name in English and two more languages; every tenth also together with another."""

    def write(options: Options, folder: Path, roots: list[Path]) -> Counts:
        skipped: Counter[str] = Counter()
        records: list[dict[str, Any]] = []
        previous: tuple[Image.Image, Pair] | None = None
        trained = (pair for pair in read(*roots) if not is_heldout(pair.group))
        for index, pair, image in open_pairs(options.cut(trained), skipped):
            rng = sample_rng(options.seed, question, index)
            languages = sorted(pair.translations)
            chosen = [languages[int(i)] for i in rng.permutation(len(languages))[:2]]
            turns = [(question, pair.caption), *((f"And in {name}?", pair.translations[name]) for name in chosen)]
            records.append(Conversation(f"{index:05d}", [image], turns).save(folder / "images", "jpg"))
            if previous is not None and index % 10 == 9:
                both = "Image-1: <image>\nImage-2: <image>\nWhat does each of the two images show?"
                answer = f"Image-1: {previous[1].caption}\nImage-2: {pair.caption}"
                conversation = Conversation(f"{index:05d}_pair", [previous[0], image], [(both, answer)])
                records.append(conversation.save(folder / "images", "jpg"))
            previous = (image, pair)
        return {"conversations": write_jsonl(folder / "train.jsonl", records), **skip_counts(skipped)}

    return write


def _write_definitions(options: Options, folder: Path, roots: list[Path]) -> Counts:
    """Text-only: what words mean according to WordNet."""
    entries = [(word, gloss) for _, word, gloss in english.read_wordnet_senses(roots[0]) if word.isalpha() and gloss]
    order = sample_rng(options.seed, "definitions").permutation(len(entries))
    records = []
    for index, number in enumerate(order[: options.count(options.definitions)]):
        word, gloss = entries[int(number)]
        turn = (f'What can the word "{word}" mean?', f"{gloss[:1].upper()}{gloss[1:]}.")
        records.append(Conversation(f"{index:05d}", [], [turn]).save(folder))
    return {"conversations": write_jsonl(folder / "train.jsonl", records)}


RECIPES: dict[str, Recipe] = {
    "easy_vqa": _write_easy_vqa,
    "collages": _write_collages,
    "stamps_translated": _translations("Describe the picture.", clipart.read_tuxpaint),
    "emoji_translated": _translations("What is this?", emoji.read_fluent),
    "definitions": _write_definitions,
}
