"""Pictures with alternative text (S1.1) or captions (S1.2), read from packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from data_pipelines.config import CAPTION_PROMPT
from data_pipelines.recipes.conversations import Conversation
from data_pipelines.recipes.easy_vqa import caption, read_easy_vqa
from data_pipelines.recipes.jsonl import write_jsonl
from data_pipelines.recipes.parts import Counts, skip_counts
from data_pipelines.recipes.real.catalogue import Options, Recipe, is_heldout
from data_pipelines.recipes.real.readers import clipart, emoji, manuals
from data_pipelines.recipes.real.readers.pictures import Pair, open_pairs
from data_pipelines.recipes.shard_writer import ShardWriter, encode_image


def _pairs(read: Callable[..., Iterable[Pair]], *, captions: bool) -> Recipe:
    """Writes the pairs of a reader as shards; with ``captions``, alt text goes into them and captions beside them."""

    def write(options: Options, folder: Path, roots: list[Path]) -> Counts:
        skipped: Counter[str] = Counter()
        joined, heldout = [], []
        with ShardWriter(folder) as writer:
            for number, pair, image in open_pairs(options.cut(read(*roots)), skipped):
                if is_heldout(pair.group or pair.origin):
                    conversation = Conversation(f"{number:06d}", [image], [(CAPTION_PROMPT, pair.caption)], "caption")
                    heldout.append(conversation.save(folder / "images", "jpg"))
                    continue
                text = (pair.alt or pair.caption) if captions else pair.caption
                key = writer.write(encode_image(image), text, size=image.size, url=pair.origin)
                joined.append({"key": key, "caption": pair.caption})
        if captions:
            write_jsonl(folder / "captions.jsonl", joined)
        write_jsonl(folder / "heldout.jsonl", heldout)
        return {"pairs": writer.samples, "held out": len(heldout), **skip_counts(skipped)}

    return write


def _easy_vqa(root: Path) -> Iterator[Pair]:
    """Training images of easy-vqa, captioned by the answers to their questions."""
    for path, turns in read_easy_vqa(root, "train"):
        if text := caption(turns):
            yield Pair(path, text, origin=f"easy_vqa/{path.name}")


def _figures(folder: str) -> Recipe:
    """The figures of a manual; ``folder`` is its path in the first package."""
    return _pairs(lambda root, *_: manuals.read_figures(root, folder), captions=False)


RECIPES: dict[str, Recipe] = {
    "openclipart": _pairs(clipart.read_openclipart, captions=False),
    "gimp_figures": _figures("usr/share/gimp/2.0/help/en"),
    "kicad_figures": _figures("usr/share/doc/kicad/help/en"),
    "skimage_figures": _figures("usr/share/doc/python-skimage-doc/html"),
    "handbook_figures": _figures("usr/share/doc/debian-handbook/html/en-US"),
    "tuxpaint": _pairs(clipart.read_tuxpaint, captions=True),
    "fluent_emoji": _pairs(emoji.read_fluent, captions=True),
    "noto_emoji": _pairs(emoji.read_noto, captions=True),
    "wesnoth": _pairs(clipart.read_wesnoth, captions=True),
    "easy_vqa_captions": _pairs(_easy_vqa, captions=True),
}
