"""Random answers and truths that exercise the scorers' rules. All are JSON values, made by a seeded generator."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from mono_jax.evaluation.metrics.judged import ABILITIES
from mono_jax.evaluation.metrics.short_answers import FORMULAS
from mono_jax.evaluation.metrics.yes_no import COGNITION, PERCEPTION

Options = dict[str, str]


def _words(of: str, mark: str | None = None) -> list[str]:
    return of.split(mark)


ARTICLES = ("a", "an", "the", "A", "The", "An")
CONTRACTIONS = _words(
    "dont couldntve couldn'tve couldnt've its let's Id've Im somebody'd somebodyd've yalld've y'alld've whos who's "
    "dog's ow's'at 'ows'at twas oclock thats that's wont weve"
)
NUMBERS = _words(
    "0 1 2 10 12 100 1,000 1,,000 12,5 3.5 .5 5. 1e3 -7 1/2 50% $5 2.50 007 ٣ ½ one two Ten none Zero seven"
)
WORDS = _words(
    "dog dogs cat red blue left bus stop sign man woman yes no not U.S.A. t-shirt e.g. café Straße İstanbul 中文"
)
UNITS = _words("m cm kg % $ °C pm km/h")
MARKS = (*";/[]\"{}()=+\\_-><@`,?!.:'&*#|~", "...", "--", "“", "”", "，", "。")
SPACES = ("", " ", " ", " ", "  ", "\n", "\t")
LETTERS = "ABCDEF"
PHRASES = (*_words("bird cat dog Paris 1 12 B 中文"), "red bird", "a cat", "two dogs", "none of them", "Is it?", "")


def text(rng: Random, longest: int = 6) -> str:
    """A few words, numbers and marks."""
    kinds = (ARTICLES, CONTRACTIONS, NUMBERS, WORDS, WORDS, UNITS, MARKS)
    pieces = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(0, longest))]
    return "".join(piece + rng.choice(SPACES) for piece in pieces)


def _at(rng: Random, of: str, piece: str, cut: int = 0) -> str:
    place = rng.randint(0, len(of))
    return of[:place] + piece + of[place + cut :]


CHANGES: tuple[Callable[[Random, str], str], ...] = (
    lambda rng, of: of.upper(),
    lambda rng, of: of.lower(),
    lambda rng, of: of.title(),
    lambda rng, of: f"{rng.choice(ARTICLES)} {of}",
    lambda rng, of: f"{of}.",
    lambda rng, of: f"{of}%",
    lambda rng, of: f" {of}\n",
    lambda rng, of: of.replace("'", ""),
    lambda rng, of: of.replace(" ", ""),
    lambda rng, of: of.replace(" ", rng.choice(("  ", "\n", "-"))),
    lambda rng, of: of.replace("2", "two").replace("10", "ten").replace("0", "none"),
    lambda rng, of: of.translate(str.maketrans("0123456789aeo", "０１２３４５６７８９ａｅｏ")),
    lambda rng, of: _at(rng, of, "", 1),
    lambda rng, of: _at(rng, of, rng.choice(MARKS)),
    lambda rng, of: _at(rng, of, rng.choice(string.ascii_letters + " ")),
    lambda rng, of: f"{of} {rng.choice(UNITS)}",
    lambda rng, of: f"The answer is {of}",
    lambda rng, of: f"It says {of}, I think.",
    lambda rng, of: text(rng, 3),
)


def changed(rng: Random, of: str) -> str:
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        of = rng.choice(CHANGES)(rng, of)
    return of


def answer_and_truths(rng: Random, most: int = 3) -> tuple[str, list[str]]:
    truths = [text(rng, rng.randint(1, 4)) for _ in range(rng.randint(1, most))]
    return changed(rng, rng.choice(truths)), truths


def answer_and_truth(rng: Random) -> tuple[str, str]:
    answer, (truth,) = answer_and_truths(rng, 1)
    return answer, truth


def of_ten_people(rng: Random) -> tuple[str, list[str]]:
    said = [text(rng, 3) for _ in range(rng.randint(1, 3))]
    return changed(rng, said[0]), [changed(rng, rng.choice(said)) for _ in range(10)]


def of_ocrbench(rng: Random) -> tuple[str, list[str], str]:
    return *answer_and_truths(rng), rng.choice((FORMULAS, "Regular Text Recognition", "Doc-oriented VQA"))


def _number(rng: Random, value: float) -> str:
    forms = (*_words("{:g} {:.2f} {:.0f} {:,.1f} {:g}% {:.3e} ${:g} {!r} {:g}%% {:g}."), " {:g}", "{:g} ")
    return rng.choice(forms).format(value)


def of_a_chart(rng: Random) -> tuple[str, list[str]]:
    """Numbers about 5 % apart, and texts."""
    if rng.random() < 0.2:
        return answer_and_truths(rng)
    value = rng.choice((0, 1, 5, 20, 100, 2019, -3, 0.05, float("inf"), float("nan"), rng.uniform(-9, 9)))
    off = rng.choice((0, 0, 0.02, 0.049, 0.05, -0.05, 0.0500001, 0.051, -0.06, 1, -2))
    others = [_number(rng, rng.uniform(0, 100)) for _ in range(rng.choice((0, 0, 1)))]
    return changed(rng, _number(rng, value * (1 + off))), [_number(rng, value), *others]


def options(rng: Random, fewest: int = 2) -> Options:
    return dict(zip(LETTERS[: rng.randint(fewest, len(LETTERS))], rng.sample(PHRASES, len(LETTERS))))


_CHOICES = _words(
    "{0}|({0})|{0}.|{0}. {1}|{0}: {1}|{0}) {1}|**{0}**|Answer: {0}|{0}\n|[{0}]|option {0}|The answer is {0}.|"
    "the correct  answer is **{0}**, not {2}|answer is {3}|{0} or {2}|({0}) and ({2})|{1}|It is {1}|{1} {4}|{3}|({3})|"
    "I think that it must be {1}, but not {4}, as it seems to me|A dog and {0}|I see a thing that looks like {0}|"
    "{0} is what the picture seems to show to us here|Z|None||Sorry, I can't help with images of people yet. {0}|"
    "I can't process this file.|Cannot determine the answer|{0}{2}|'{0}'|x{0} y{2}.|{0}, since {2} is wrong|It's {0}!|"
    "= {0}|{0};{2}",
    "|",
)


def choice(rng: Random) -> tuple[str, Options]:
    """What a model says when it is asked for an option."""
    of = options(rng)
    letter, other = rng.choice(list(of)), rng.choice(list(of))
    said = rng.choice(_CHOICES).format(letter, of[letter], other, letter.lower(), of[other])
    return said if rng.random() < 0.6 else changed(rng, said), of


def choice_and_truth(rng: Random) -> tuple[str, str, Options]:
    said, of = choice(rng)
    if rng.random() < 0.5:
        said = rng.choice(("{}", "{}.", " {}", "{}.\n")).format(rng.choice(list(of)))
    return said, rng.choice([*(letter for letter in of if letter in said), *of]), of


def circular_groups(rng: Random) -> tuple[list[list[Any]]]:
    """A benchmark: each question with its options in each order, mostly answered correctly."""
    groups = []
    for _ in range(rng.randint(2, 8)):
        texts, orders = [text for text in rng.sample(PHRASES, 4) if text], []
        right = rng.choice(texts)
        for shift in range(len(texts)):
            of = dict(zip(LETTERS, texts[shift:] + texts[:shift]))
            letter = next(key for key, text in of.items() if text == right)
            said = rng.choice(_CHOICES[:12]).format(letter, right, letter, letter, right)
            orders.append([said if rng.random() < 0.9 else choice(rng)[0], letter, of])
        groups.append(orders)
    return (groups,)


_SIGNS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "= ", "=")


def of_mmmu(rng: Random) -> tuple[str, list[str]]:
    """An open question: sentences with signs that an answer follows."""
    truths = [rng.choice((*NUMBERS, *PHRASES, "b", "x^2")) for _ in range(rng.randint(1, 2))]

    def part() -> str:
        said = changed(rng, rng.choice([*truths, text(rng, 2)]))
        return "".join((rng.choice(("", "It ", "x ")), rng.choice((*_SIGNS, "")), said, rng.choice((". ", "\n", ", "))))

    return "".join(part() for _ in range(rng.randint(1, 4))), truths


_YES_NO = _words("yes|Yes|YES|no|No|NO|not|nope|y|N|yes.|No,|none|I say|It is|Yesterday", "|")


def yes_or_no(rng: Random) -> tuple[str]:
    pieces = [rng.choice((*_YES_NO, *_YES_NO, *MARKS, *WORDS, *NUMBERS)) for _ in range(rng.randint(0, 4))]
    return ("".join(piece + rng.choice(SPACES) for piece in pieces),)


def _plain(rng: Random) -> str:
    return rng.choice(("yes", "Yes", "no", "No"))


def of_mme(rng: Random) -> tuple[list[list[str]]]:
    """A benchmark of plain answers: two questions per image, all categories."""
    rows = []
    for category in (*PERCEPTION, *COGNITION):
        for image in range(rng.randint(1, 5)):
            rows += [[category, f"{category}{image}", _plain(rng), truth] for truth in ("Yes", "No")]
    rng.shuffle(rows)
    return (rows,)


def _of_pope(rng: Random, said: Callable[[], str]) -> tuple[list[list[str]]]:
    """A benchmark with a correct yes in each category, since some scorers divide by their number."""
    categories = ("adversarial", "popular", "random")
    rows = [[rng.choice(categories), said(), rng.choice(("yes", "no"))] for _ in range(rng.randint(1, 40))]
    return ([*([category, "yes", "yes"] for category in categories), *rows],)


def of_pope_plainly(rng: Random) -> tuple[list[list[str]]]:
    return _of_pope(rng, lambda: _plain(rng))


def of_pope_in_sentences(rng: Random) -> tuple[list[list[str]]]:
    """As VLMEvalKit's file has them: a question may be in several categories."""
    said = ("Yes", "yes.", "Yes, there is a dog.", "No", "no.", "No, it is not.", "There is no dog")
    [rows] = _of_pope(rng, lambda: rng.choice(said))
    every = ",".join(dict.fromkeys(category for category, _, _ in rows))
    return ([[every if rng.random() < 0.3 else category, *rest] for category, *rest in rows],)


def of_pope(rng: Random) -> tuple[list[list[str]]]:
    return _of_pope(rng, lambda: yes_or_no(rng)[0])


def _of_hallusion(rng: Random, answer: Callable[[], str]) -> tuple[list[list[str]]]:
    rows = []
    for category in ("table", "chart", "map"):
        for of_set, figure, question in ((s, f, q) for s in "01" for f in "012" for q in "012"):
            if rng.random() < 0.5:
                rows.append([category, of_set, figure, question, answer(), rng.choice("01")])
    return (rows or [["table", "0", "0", "0", "yes", "1"]],)


def of_hallusion(rng: Random) -> tuple[list[list[str]]]:
    return _of_hallusion(rng, lambda: yes_or_no(rng)[0] if rng.random() < 0.5 else _plain(rng))


def of_hallusion_plainly(rng: Random) -> tuple[list[list[str]]]:
    return _of_hallusion(rng, lambda: _plain(rng))


_BOXES = _words(
    "[{}, {}, {}, {}]|<ref>dog</ref><box>[[{}, {}, {}, {}]]</box>|It is at [{},{},{},{}].|[[{}, {}, {}, {}]|"
    "({}, {}, {}, {})|{}, {}, {}, {}|[{} {} {} {}]|[{}, {}, {}]|[x, {}, {}, {}, {}]|[{},\n{}, {}, {}]|none|"
    "[{}, {}, {}, {}], [1, 2, 3, 4]|a [box]: [{}, {}, {}, {}]|[ {} ,{} ,{}, {} ]|[{}, {}, {}, {}, 5]",
    "|",
)


def _edges(rng: Random, width: float, height: float) -> list[float]:
    left, top = rng.uniform(0, 0.8 * width), rng.uniform(0, 0.8 * height)
    return [left, top, rng.uniform(left, width), rng.uniform(top, height)]


def of_refcoco(rng: Random) -> tuple[str, list[float], float, float]:
    """A box in pixels, and a nearby one as a model writes it, in thousandths or in fractions."""
    width, height = float(rng.randint(50, 900)), float(rng.randint(50, 900))
    box = [float(round(edge, 2)) for edge in _edges(rng, width, height)]
    shares = [edge / of for edge, of in zip(box, (width, height, width, height))]
    near = rng.choice((0.02, 0.1, 0.3))
    shares = [min(1.0, max(0.0, share + rng.uniform(-near, near))) for share in shares]
    if rng.random() < 0.1:
        rng.shuffle(shares)
    scales = ((1000, "{:.0f}"), (1000, "{:.0f}"), (1, "{:.3f}"), (1, "{:.2f}"), (1200, "{:.1f}"), (-1, "{:g}"))
    scale, form = rng.choice(scales)
    said = rng.choice(_BOXES[:4] if rng.random() < 0.7 else _BOXES)
    return said.format(*(form.format(share * scale) for share in shares)), box, width, height


def of_math_vista(rng: Random) -> tuple[str, str, Options, list[Any]]:
    """What was extracted, the truth, the options and [question_type, answer_type, precision]."""
    if rng.random() < 0.5:
        said, of = choice(rng)
        return said, rng.choice(list(of.values())), of, ["multi_choice", "text", None]
    kind = rng.choice(("integer", "float", "list", "text"))
    value, precision = rng.choice((0.0, 1.0, 12.0, -3.5, 2.675, 1e20, rng.uniform(-99, 99))), rng.randint(1, 3)
    truth = {"integer": str(int(value)), "float": str(round(value, precision)), "list": "[1, 2]"}.get(kind, "a cat")
    said = changed(rng, rng.choice((truth, _number(rng, value), "inf", "nan", "1e400", "[1,2]")))
    return said, truth, {}, ["free_form", kind, precision if kind == "float" else None]


def _graded(rng: Random, fewest: int, replies: Callable[[], Sequence[str]]) -> tuple[list[list[Any]]]:
    """Rows of abilities, all in the first, ``fewest`` or more in the others, and replies of the judge."""
    rows = [[",".join(ABILITIES), list(replies())]]
    for _ in range(rng.randint(0, 40)):
        rows.append([",".join(rng.sample(ABILITIES, rng.randint(fewest, 4))), list(replies())])
    return (rows,)


def _grade(rng: Random) -> str:
    return rng.choice((f"{rng.randint(0, 10) / 10}", "0", "1", ".3", "1e-1", "0.75"))


def of_mm_vet(rng: Random) -> tuple[list[list[Any]]]:
    return _graded(rng, 1, lambda: [_grade(rng)])


def of_mm_vet_with_unusable_replies(rng: Random) -> tuple[list[list[Any]]]:
    bad = ("good", "1.5", "-0.1", "", "Grade", *(("0.5 or so", "Grade: 0.5") if rng.random() < 0.1 else ()))

    def replies() -> list[str]:
        return [*rng.sample(bad, rng.choice((0, 0, 1, 2))), rng.choice(("{}", " {}\n")).format(_grade(rng))]

    return _graded(rng, rng.choice((1, 2, 2)), replies)


_CAPTION = _words(
    "a man riding wave on top of surfboard the dog's toys don't two red/white signs street well-known ice-cream it's "
    "U.S. and 5:30 p.m. 1,000 people 50% café (left) children playing with frisbee in park near tree woman umbrella"
)


def corpora(rng: Random) -> tuple[list[list[list[Any]]]]:
    """Ten answers with references that share words."""

    def caption(of: Sequence[str]) -> str:
        words = [rng.choice(of) if rng.random() < 0.8 else rng.choice(_CAPTION) for _ in range(rng.randint(1, 14))]
        return " ".join(words) + rng.choice(("", ".", " .", "!", ", too."))

    found = []
    for _ in range(10):
        shared = [rng.sample(_CAPTION, 10) for _ in range(rng.randint(2, 12))]
        found.append([[caption(of), [caption(of) for _ in range(rng.randint(1, 5))]] for of in shared])
    return (found,)
