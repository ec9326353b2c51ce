"""What the demo sets and the real sets share: parts that are built once, the manifest, conversations, a tokenizer.

The manifest of a folder of sets (``load_manifest`` gives it with absolute paths):

    {"version", "seed", "tile_size", "token_pixels", "tokenizer": FOLDER,
     "stages": {"s0" | "s1_1" | "s1_2" | "s1_3" | "s2":
                    {"samples": N, "sources": [{"name", "spec": {"kind", "paths", ...}, "weight"?, "prompts"?}]}},
     "heldout": {"text": FILE,
                 NAME: {"path", "image_root", "samples", "majority_answer"?, "majority_accuracy"?}},
     "packages": {NAME: VERSION} (demo) | "licences": {PACKAGE: LICENCE} (real)}

``sources`` entries are what ``SourceConfig`` takes; ``samples`` of s0 counts documents. A line of a held-out file is a
LLaVA record (``id``, ``image``, ``conversations`` with one question and its answer) plus ``kind`` (the skill asked for,
or the sort of picture).
"""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.config import CAPTION_PROMPT as CAPTION_PROMPT
from data_pipelines.errors import DataError
from data_pipelines.recipes import shard_writer as shards
from data_pipelines.special_tokens import IM_END, IM_START, IMAGE_TOKENS

STAGES = ("s0", "s1_1", "s1_2", "s1_3", "s2")
S1_3_SHARES = {"caption": 0.539, "detection": 0.052, "ocr": 0.409}  # of the samples of S1.3 (Mono-InternVL paper)
ADDED_TOKENS = (IM_START, IM_END, *IMAGE_TOKENS)

Counts = dict[str, int]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Pictures and (question, answer) turns about them, on their way into a JSONL file in the form of LLaVA."""

    id: str
    images: Sequence[Image.Image]
    turns: Sequence[tuple[str, str]]
    kind: str | None = None

    def save(self, folder: Path, extension: str = "png") -> dict[str, Any]:
        """Writes the images into ``folder`` and returns the record that names them.

        Without a placeholder in any question, ``<image>`` is put before the first one.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = []
        for number, image in enumerate(self.images):
            names.append(f"{self.id}.{extension}" if len(self.images) == 1 else f"{self.id}_{number}.{extension}")
            (folder / names[-1]).write_bytes(shards.encode_image(image, extension))
        turns = list(self.turns)
        if names and not any("<image>" in question for question, _ in turns):
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
        record: dict[str, Any] = {"id": self.id, "conversations": shards.conversation(turns)}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        if self.kind:
            record["kind"] = self.kind
        return record


def build_part(
    root: Path, name: str, settings: Mapping[str, Any], write: Callable[[Path], Counts], progress: Progress
) -> Counts:
    """Builds the folder ``root/name`` beside its place and moves it there when it is whole.

    A part that is there already, made with equal ``settings``, is kept. Returns what ``write`` counted.
    """
    place = root / name
    done = place / "part.json"
    if done.is_file():
        record = json.loads(done.read_text())
        if record["settings"] == settings:
            return record["counts"]
    start = time.monotonic()
    partial = place.with_name(f".{place.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    counts = write(partial)
    (partial / "part.json").write_text(json.dumps({"settings": settings, "counts": counts}))
    shutil.rmtree(place, ignore_errors=True)
    os.replace(partial, place)
    progress(f"{name}: {', '.join(f'{n} {what}' for what, n in counts.items())} in {time.monotonic() - start:.1f} s")
    return counts


def write_documents(path: Path, documents: Iterable[Sequence[str]], limit: int | None = None) -> int:
    """Writes whole documents (sequences of paragraphs) up to ``limit`` bytes in all; returns the bytes.

    One paragraph a line, a blank line behind each document. The first document is written whatever its length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with path.open("wb") as file:
        for paragraphs in documents:
            text = ("\n".join(paragraphs) + "\n\n").encode()
            if limit is None or not written or written + len(text) <= limit:
                written += file.write(text)
    return written


def train_tokenizer(folder: Path, sentences: Iterable[str], vocabulary: int) -> Counts:
    """Trains ``tokenizer.model`` and writes ``added_tokens.json``, laid out as InternLM2's tokenizer.

    SentencePiece BPE with byte fallback: <unk> 0, <s> 1, </s> 2, ``vocabulary`` pieces in all; added tokens behind.
    Raises DataError if the sentences do not hold so many pieces.
    """
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"vocabulary={vocabulary}: the tokenizer cannot be trained ({error})") from None
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {token: vocabulary + number for number, token in enumerate(ADDED_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=1))
    return {"pieces": vocabulary, "added": len(added)}


def heldout_entry(root: Path, path: str, *, graded: bool) -> dict[str, Any]:
    """Manifest entry of a held-out JSONL file; ``graded`` adds what always giving the commonest answer would score."""
    answers = collections.Counter(record["conversations"][1]["value"] for record in shards.read_jsonl(root / path))
    entry: dict[str, Any] = {"path": path, "image_root": f"{Path(path).parent}/images", "samples": answers.total()}
    if graded:
        answer, times = answers.most_common(1)[0]
        entry |= {"majority_answer": answer, "majority_accuracy": times / answers.total()}
    return entry


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> None:
    """Writes ``root/manifest.json`` in one step."""
    partial = root / ".manifest.json.part"
    partial.write_text(json.dumps(manifest, indent=1))
    os.replace(partial, root / "manifest.json")


def load_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder of sets, its paths made absolute. Raises DataError if the sets are not built."""
    root = Path(folder).absolute()
    path = root / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{path} is missing: build the sets first (python -m data_pipelines.demo_sets or real_sets --out={folder})"
        )
    return _absolute(json.loads(path.read_text()), root)


_PATH_KEYS = ("paths", "path", "captions", "image_root", "tokenizer", "text")


def _absolute(value: Any, root: Path, key: str | None = None) -> Any:
    if isinstance(value, dict):
        return {k: _absolute(v, root, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_absolute(v, root, key) for v in value]
    return str(root / value) if isinstance(value, str) and key in _PATH_KEYS else value
