"""A folder in WordNet's form with words whose meanings are told apart by their last letter."""

from __future__ import annotations

import string
from pathlib import Path


def write_wordnet(root: Path) -> Path:
    """16 nouns and 16 verbs, three adverbs, and words that no question can be asked about; returns ``root``."""

    def line(word: str, gloss: str, letter: str = "n") -> str:
        return f'00000001 03 {letter} 01 {word} 0 001 @ 00000002 n 0000 | {gloss}; "an example"\n'

    folder = root / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for end, part, count in (("noun", "noun", 16), ("verb", "verb", 16), ("adj", "adjective", 0), ("adv", "adverb", 3)):
        words = [(part + letter, letter) for letter in string.ascii_lowercase[:count]]
        lines = [line(word, f"the meaning of number {letter} among {part}s") for word, letter in words]
        if part == "noun":
            lines += [line(word, "the second meaning of a word that has two") for word, _ in words[:2]]
            lines += [line("Paris", "the name of a town that is written large"), line("ox", "an animal")]
            lines += [
                line("living_thing", "something of which the name has two words"),
                line("tree", "a tree is a tree"),
            ]
        (folder / f"data.{end}").write_text("  1 licence | text\n" + "".join(lines))
    return root
