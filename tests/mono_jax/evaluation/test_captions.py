"""Captions' scores against pycocoevalcap 1.2 with Stanford's PTBTokenizer 3.4.1, whose output is recorded here."""

from __future__ import annotations

import pytest

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.captions.ptb import tokenize
from mono_jax.evaluation.metrics.captions.scores import captions
from mono_jax.evaluation.metrics.metric import Answered


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
        ("A dog in the U.S.", "a dog in the u.s."),
        ("The man's dog don't like cats' toys.", "the man 's dog do n't like cats toys"),
        ("I cannot go, gonna wanna gimme", "i can not go gon na wan na gim me"),
        ("a red/white sign (left) [x] {y}", "a red/white sign -lrb- left -rrb- -lsb- x -rsb- -lcb- y -rcb-"),
        ("\"Hello,\" she said. 'Hi' they said", "hello she said hi they said"),
        ("It’s a “quoted” sign – and — more… and...", "it 's a quoted sign and more and"),
        (
            "5:30 pm at 3.5 miles, 1,000 people $5 and 50% off #1",
            "5:30 pm at 3.5 miles 1,000 people $ 5 and 50 % off # 1",
        ),
        ("well-known ice-cream t-shirt two - three -- four", "well-known ice-cream t-shirt two three four"),
        ("Mr. Smith and Dr. Jones vs. St. John etc.", "mr. smith and dr. jones vs. st. john etc."),
        ("1/2 of a 10x10 grid 1st 2nd 1990's '90s", "1/2 of a 10x10 grid 1st 2nd 1990 's '90s"),
        ("A B.C. sign. No. 5 at 5 p.m. no. cat.", "a b.c. sign no. 5 at 5 p.m. no cat"),
        ("rock & roll AT&T R&B @ home *star* a+b=c ~x <b>", "rock & roll at&t r&b @ home * star * a + b = c ~ x <b>"),
        ("y'all o'clock ma'am 'tis 'twas rock'n'roll", "y' all o'clock ma'am 't is 't was rock 'n' roll"),
        ("café naïve 中文 emoji 😀 dog", "café naïve 中文 emoji dog"),
        ("a person(s) and/or dog's/cat's", "a person -lrb- s -rrb- and/or dog 's / cat 's"),
        ("12:30am 10-year-old 3-4 4x4", "12:30 am 10-year-old 3-4 4x4"),
        ("won't can't ain't, shouldn't've what?! yes!!", "wo n't ca n't ai n't should n't 've what ?! yes !!"),
        ("visit www.example.com or http://a.b/c or me@x.org", "visit www.example.com or http://a.b/c or me@x.org"),
        (". , -", ""),
    ],
)
def test_tokens_are_the_treebank_s(caption: str, tokens: str):
    assert " ".join(tokenize(caption)) == tokens


EXAMPLES = [
    Answered(
        "0",
        "A man is riding a wave on a surfboard",
        ("A man riding a wave on top of a surfboard.", "A surfer rides a big wave, near the shore."),
    ),
    Answered(
        "1", "a dog and a flag", ("The man's dog doesn't like the U.S. flag.", "A dog next to a flag (American).")
    ),
    Answered(
        "2",
        "two signs on a street.",
        ("Two red/white signs - 5:30 p.m. - on a well-known street", "Street signs at dusk"),
    ),
]
EXPECTED = {
    "CIDEr": 1.678509467954332,
    "BLEU-1": 0.7640512796879996,
    "BLEU-2": 0.5711627150912806,
    "BLEU-3": 0.34995417283937985,
    "BLEU-4": 0.24596039342259904,
    "ROUGE-L": 0.6856350611361747,
}


def test_scores_are_pycocoevalcap_s():
    scores = {name: measure.score / 100 for name, measure in captions(EXAMPLES).items()}
    assert scores == pytest.approx(EXPECTED, rel=1e-10)


def test_an_empty_caption_scores_nothing():
    scores = captions([*EXAMPLES, Answered("3", "", ("a cat",))])
    assert 0 < scores["BLEU-1"].score < 100 * EXPECTED["BLEU-1"]
    assert scores["CIDEr"].sums[3, 0] == 0 and scores["ROUGE-L"].sums[3, 0] == 0


def test_a_caption_without_references_is_named():
    with pytest.raises(DataError, match="example 7: no reference caption"):
        captions([*EXAMPLES, Answered("7", "a cat", ())])
