"""Penn Treebank tokens of captions, without punctuation: the output of Stanford's PTBTokenizer 3.4.1 in pycocoevalcap.

The rules are the treebank's as published (clitics split off, hyphens and slashes kept, brackets named) with Stanford's
treatment of abbreviations, numbers and addresses. Telephone numbers, emoticons and punctuation inside words are
treated more simply.
"""

from __future__ import annotations

import re

# Tokens that are dropped. Brackets are kept, since PTBTokenizer's lower-case "-lrb-" is not the "-LRB-" in the list.
_DROPPED = {'"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SIGNS = str.maketrans(
    {"’": "'", "‘": "'", "`": "'", "“": '"', "”": '"', "–": "--", "—": "--", "…": "...", "½": " 1/2", "¢": " cents "}
    | {"£": "#", "€": "$", "\u00a0": " ", "\u00ad": None}
)
_UNTOKENIZED = re.compile(r"[\U00010000-\U0010ffff\u2600-\u27bf\ufe0f\u200d]")  # emoji
_ABBREVIATIONS = (
    "jr sr bros ltd corp co inc mr mrs ms dr messrs prof rev hon gen col sgt capt lt lieut gov sen rep pres st mt ft "
    "ave blvd rd dept est ext tel al etc vs jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu "
    "thurs fri ala ariz az ark calif colo conn ct dak del fla ga ill ind kans kan ky la mass md mich minn miss mo mont "
    "neb nev okla penn pa tenn tex va vt wash wis wyo"
).replace(" ", "|")
_ONLY_BEFORE_NUMBERS = "no|nos|art|fig|figs|prop|pp|p"
_SPLIT = "can|not gim|me gon|na got|ta lem|me wan|na y'|all 't|is 't|was"
_WHOLE = {word.replace("|", ""): word.split("|") for word in _SPLIT.split()}
_TOKEN = re.compile(
    rf"""
    (?P<address>https?://[^\s<>"|()]+ | www\.[^\s<>"|(),]+ | [\w.+-]{{1,254}}+@\w[\w-]*(?:\.[\w-]+)*)
  | (?P<initials>(?:\b\w+-)?(?:[^\W\d_]\.)+(?:[^\W\d_]\b)?(?:-\w+)*(?<=[\w.]{{3}}) | \b[^\W\d_]\.(?=\s|$))
  | (?P<degree>\bph\.d\.)
  | (?P<abbreviation>\b(?:{_ABBREVIATIONS})\.(?!\w))
  | (?P<numbered>\b(?:{_ONLY_BEFORE_NUMBERS})\.(?=\s*\d))
  | (?P<time>\d{{1,2}}:\d\d(?=[ap]m\b))
  | (?P<number>(?<!\w)(?:[+-]?(?:\d+(?:[.,:/-]\d+)+|\.\d+)|[+-]\d+)(?![\w-]))
  | (?P<company>\b(?-i:[A-Z]+(?:&[A-Z]+)+)\b)
  | (?P<domain>\w+(?:\.\w+)+)
  | (?P<special>'(?:em|tis|twas)\b | 'n'(?=\w|\s))
  | (?P<clitic>'(?:s|m|d|re|ve|ll)\b)
  | (?P<year>'\d\ds?\b)
  | (?P<word>\w(?:\w|[/-](?=\w)|(?<=[^\W\d_])'(?!n'\w)(?=[^\W\d_])|(?<=\d)'(?=s\b))*)
  | (?P<tag></?\w+>)
  | (?P<dots>\.{{3}})
  | (?P<marks>[?!]+ | --+ | '' | \*\*+ | \#\#+)
  | (?P<other>\S)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll)|n't)$")
_AFTER_CLITIC = re.compile(r"((?:'(?:s|m|d|re|ve|ll)|n't))(?=/)")  # a slash joins words, but not after a clitic


def tokenize(caption: str) -> list[str]:
    """Lower-case tokens of a caption."""
    text = " ".join(_UNTOKENIZED.sub(" ", caption).translate(_SIGNS).split())
    text = _AFTER_CLITIC.sub(r"\1 ", text).replace("/ ", " / ")
    tokens: list[str] = []
    for found in _TOKEN.finditer(text):
        token = found.group().lower()
        if found.lastgroup in ("word", "special"):
            tokens += _parts(token)
        else:
            tokens.append("--" if token.startswith("--") else _BRACKETS.get(token, token))
    return [token for token in tokens if token not in _DROPPED]


def _parts(word: str) -> list[str]:
    """A word without its clitics, followed by the clitics."""
    if word in _WHOLE:
        return _WHOLE[word]
    if found := _CLITIC.search(word):
        return [*_parts(word[: found.start()]), found.group()]
    return [word]
