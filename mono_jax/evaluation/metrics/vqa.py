"""VQA accuracy (Antol et al. 2015): answers of ten annotators, normalised as EvalAI's server does."""

from __future__ import annotations

import functools
import re

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.metric import Answered

_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # that the published evaluator removes: it passes re.UNICODE in place of a count
# Words whose apostrophes people leave out. If a word has two or more, exactly one is put back.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)


@functools.cache
def contractions() -> dict[str, str]:
    """{misspelt: corrected} of the published evaluator, including its one reversed pair."""
    found = {"somebody'd": "somebodyd"}
    for word in _APOSTROPHES.split():
        for at in (i for i, letter in enumerate(word) if letter == "'"):
            found[word[:at] + word[at + 1 :]] = word
    return found


@functools.lru_cache(maxsize=1 << 16)  # people give the same answers
def normalize(answer: str) -> str:
    """An answer as EvalAI's server compares it: lower case, digits for number words, no articles or punctuation."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(contractions().get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str, thousands: re.Pattern[str] = _THOUSANDS) -> str:
    """Removes a mark next to a space; one inside a word becomes a space, unless there is a thousands separator."""
    has_thousands = thousands.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text or has_thousands
        result = result.replace(mark, "" if alone else " ")
    return _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)


def accuracy(example: Answered) -> float:
    """min(1, agreeing annotators / 3), averaged over leaving out each of the annotators in turn.

    Raises DataError for fewer than two truths, since no annotator would then be left to agree.
    """
    if len(example.truths) < 2:
        raise DataError(
            f"example {example.id}: VQA accuracy needs the answers of several people (usually 10), "
            f"{len(example.truths)} given: give the benchmark's own annotations, or use the metric exact_match"
        )
    given = normalize(example.answer)
    agrees = [normalize(truth) == given for truth in example.truths]
    return sum(min(1, (sum(agrees) - left_out) / 3) for left_out in agrees) / len(agrees)
