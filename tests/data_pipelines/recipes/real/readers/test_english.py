"""English text, read from small trees with the form of the packages."""

from __future__ import annotations

import gzip
from pathlib import Path

from data_pipelines.recipes.real.readers import english
from tests.data_pipelines.recipes.real.readers.package_files import write_text


def test_text_readers(tmp_path: Path) -> None:
    sentence = "This sentence is long enough to be kept as a paragraph of its own, and it says so."
    path = tmp_path / "usr/share/dictd/x.dict.dz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.write(f"Word \\W[o]rd\\, n. {sentence}\n   [1913 Webster]\n\nshort\n\n1 2 3 {'- ' * 40}\n")
    assert list(english.read_dictionary(tmp_path)) == [[f"Word n. {sentence}"]]
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` Nothing/pn at/in all/abn ''/'' ;/. ;/.\n"
    write_text(tmp_path / "package/ca01", tagged)
    assert list(english.read_brown_corpus(tmp_path)) == [['The jury said, "Nothing at all";']]
    write_text(
        tmp_path / "pages/a.html", f"<body><p>{sentence[:40]}\n{sentence[40:]}</p><p>x</p><p>{sentence} &amp; more"
    )
    assert list(english.read_html(tmp_path, "pages")) == [[sentence, f"{sentence} & more"]]
    line = '00001740 03 n 02 living_thing 0 entity 0 000 | a thing that is alive; "he lives"  \n'
    for part in ("noun", "verb", "adj", "adv"):
        write_text(
            tmp_path / f"usr/share/wordnet/data.{part}", "  1 licence | text\n" + (line if part == "noun" else "")
        )
    assert list(english.read_wordnet_senses(tmp_path)) == [("noun", "living thing", "a thing that is alive")]
