"""A small set in every format: indexed, planned, and trained on for three steps of one tiny model."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.jobs import building
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.special_tokens import IMAGE_CONTEXT
from mono_jax.runs.config import RunConfig
from mono_jax.runs.program import Program
from tests.data_pipelines.video_tools import video
from tests.made_sets import SENTENCE, picture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

COUNT = 12
CASES = Path(__file__).parents[2] / "data_pipelines/cases"
RNG = np.random.default_rng(0)
SIZES = [(int(w), int(h)) for w, h in RNG.integers(40, 150, (COUNT, 2))]
PNGS = [picture(RNG, *size, "PNG") for size in SIZES]
TEXTS = [f"number {n}: {SENTENCE[: 20 + 4 * n]}" for n in range(COUNT)]
TALKS = [[{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": text}] for text in TEXTS]
PIXELS = [decode(png, ImageLimits()) for png in PNGS]


@dataclasses.dataclass(frozen=True)
class Made:
    """A set: its source, its number of samples, and whether their texts and pixels are those of this file."""

    spec: dict[str, Any]
    count: int = COUNT
    exact: bool = True
    images: bool = True


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def pairs(images: list[bytes] = PNGS, suffix: str = "png") -> dict[str, bytes]:
    captions = {f"{n:03d}.txt": text.encode() for n, text in enumerate(TEXTS)}
    return {f"{n:03d}.{suffix}": image for n, image in enumerate(images)} | captions


def loose(folder: Path) -> Path:
    for n, png in enumerate(PNGS):
        (folder / f"{n}.png").write_bytes(png)
    return folder


def lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def named(folder: Path, **fields: list[Any]) -> list[dict[str, Any]]:
    loose(folder)
    return [{"image": f"{n}.png", **{name: values[n] for name, values in fields.items()}} for n in range(COUNT)]


def img2dataset(folder: Path) -> Made:
    return Made({"kind": "tar", "paths": tar(folder / "00000.tar", pairs())})


def json_in_tar(folder: Path) -> Made:
    talks = {f"{n:03d}.json": json.dumps({"conversations": talk}).encode() for n, talk in enumerate(TALKS)}
    images = {name: data for name, data in pairs().items() if name.endswith("png")}
    return Made({"kind": "tar", "paths": tar(folder / "a.tar", images | talks)})


def compressed_tar(folder: Path) -> Made:
    return Made({"kind": "tar", "paths": tar(folder / "a.tar.gz", pairs(), "w:gz")})


def files(folder: Path) -> Made:
    for name, data in pairs().items():
        (folder / name).write_bytes(data)
    (folder / "README").write_text("about this set")
    return Made({"kind": "files", "paths": str(folder)})


def parquet(folder: Path) -> Made:
    pq.write_table(pa.table({"jpg": PNGS, "caption": TEXTS}), folder / "a.parquet", row_group_size=5)
    return Made({"kind": "parquet", "paths": str(folder / "a.parquet")})


def hugging_face(folder: Path) -> Made:
    images = [[{"bytes": png, "path": None}] for png in PNGS]
    texts = [[{"user": "what is it?", "assistant": text, "source": "x"}] for text in TEXTS]
    pq.write_table(pa.table({"images": images, "texts": texts}), folder / "a.parquet")
    return Made({"kind": "parquet", "paths": str(folder / "a.parquet")})


def interleaved(folder: Path) -> Made:
    images = [[{"bytes": png}, None] for png in PNGS]
    pq.write_table(pa.table({"images": images, "texts": [[None, text] for text in TEXTS]}), folder / "a.parquet")
    return Made({"kind": "parquet", "paths": str(folder / "a.parquet")})


def arrow(folder: Path) -> Made:
    pa.feather.write_feather(pa.table({"image": PNGS, "text": TEXTS}), folder / "a.arrow", compression="uncompressed")
    return Made({"kind": "parquet", "paths": str(folder / "a.arrow")})


def llava(folder: Path) -> Made:
    return Made({"kind": "jsonl", "paths": lines(folder / "a.jsonl", named(folder, conversations=TALKS))})


def typed(folder: Path) -> Made:
    uris = ["data:image/png;base64," + base64.b64encode(png).decode() for png in PNGS]
    records = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": uri}},
                        {"type": "text", "text": "what is it?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": text}]},
            ]
        }
        for uri, text in zip(uris, TEXTS)
    ]
    return Made({"kind": "jsonl", "paths": lines(folder / "a.jsonl", records)})


def json_list(folder: Path) -> Made:
    (folder / "a.json").write_text(json.dumps(named(folder, conversations=TALKS), indent=1))
    return Made({"kind": "jsonl", "paths": str(folder / "a.json")})


def compressed_jsonl(folder: Path) -> Made:
    text = Path(lines(folder / "b.jsonl", named(folder, caption=TEXTS))).read_bytes()
    (folder / "a.jsonl.zst").write_bytes(pa.compress(text, codec="zstd", asbytes=True))
    return Made({"kind": "jsonl", "paths": str(folder / "a.jsonl.zst")})


def coco(folder: Path) -> Made:
    loose(folder)
    images = [{"id": 7 + n, "file_name": f"{n}.png"} for n in range(COUNT)]
    annotations = [{"id": n, "image_id": 7 + n, "caption": text} for n, text in enumerate(TEXTS)]
    (folder / "a.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return Made({"kind": "jsonl", "paths": str(folder / "a.json")})


def table(path: Path, rows: list[dict[str, Any]], delimiter: str) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def image_folder(folder: Path) -> Made:
    loose(folder)
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(TEXTS)]
    return Made({"kind": "jsonl", "paths": table(folder / "metadata.csv", rows, ",")})


def semicolons(folder: Path) -> Made:
    loose(folder)
    rows = [{"image_name": f"{n}.png", "comment": text} for n, text in enumerate(TEXTS)]
    return Made({"kind": "jsonl", "paths": table(folder / "a.csv", rows, ";")})


def captions_by_image(folder: Path) -> Made:
    loose(folder)
    (folder / "a.json").write_text(json.dumps({f"{n}.png": text for n, text in enumerate(TEXTS)}))
    return Made({"kind": "jsonl", "paths": str(folder / "a.json")})


def vlmevalkit(folder: Path) -> Made:
    rows = [
        {"index": n, "image": base64.b64encode(png).decode(), "question": "what is it?", "answer": text}
        for n, (png, text) in enumerate(zip(PNGS, TEXTS))
    ]
    return Made({"kind": "jsonl", "paths": table(folder / "a.tsv", rows, "\t")})


def internvl(folder: Path) -> Made:
    annotation = lines(folder / "a.jsonl", named(folder, conversations=TALKS))
    meta = {"set": {"root": str(folder), "annotation": annotation, "repeat_time": 1, "length": COUNT}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Made({"kind": "jsonl", "paths": str(folder / "meta.json")})


def onevision(folder: Path) -> Made:
    mix = {"datasets": [{"json_path": lines(folder / "a.jsonl", named(folder, conversations=TALKS))}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    return Made({"kind": "jsonl", "paths": str(folder / "mix.yaml"), "image_root": str(folder)})


def array_record(folder: Path) -> Made:
    from array_record.python.array_record_module import ArrayRecordWriter

    from data_pipelines.records.raw_sample import RawSample
    from data_pipelines.sources.containers.array_record import pack

    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for n, (png, text) in enumerate(zip(PNGS, TEXTS)):
        writer.write(pack(RawSample(key=str(n), images=(png,), caption=text)))
    writer.close()
    return Made({"kind": "array_record", "paths": str(folder / "a.array_record")})


def tfds(folder: Path) -> Made:
    import tensorflow_datasets as library

    class Tiny(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")
        code_path = None  # of a package that it would be part of

        def _info(self) -> Any:
            features = {"image": library.features.Image(encoding_format="png"), "caption": library.features.Text()}
            return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(features))

        def _split_generators(self, downloads: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            for n, (png, text) in enumerate(zip(PNGS, TEXTS)):
                yield n, {"image": io.BytesIO(png), "caption": text}

    Tiny(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return Made({"kind": "tfds", "paths": str(folder / "tiny" / "1.0.0")})


def mds(folder: Path) -> Made:
    return Made({"kind": "parquet", "paths": str(CASES / "mds/talks.mds")}, count=3, exact=False)


def tfrecord(folder: Path) -> Made:
    paths = str(CASES / "tfrecord/flickr.tfrecord-00000-of-00001")
    return Made({"kind": "parquet", "paths": paths}, count=3, exact=False)


def text(folder: Path) -> Made:
    (folder / "a.txt").write_text("\n\n".join(TEXTS * 20))
    return Made({"kind": "text", "paths": str(folder / "a.txt"), "chunk_bytes": 128}, 0, exact=False, images=False)


def heic(folder: Path) -> Made:
    pytest.importorskip("pillow_heif").register_heif_opener()
    return Made({"kind": "tar", "paths": tar(folder / "a.tar", pairs(again("HEIF"), "heic"))}, exact=False)


def jxl(folder: Path) -> Made:
    pytest.importorskip("pillow_jxl")
    return Made({"kind": "tar", "paths": tar(folder / "a.tar", pairs(again("JXL", lossless=True), "jxl"))})


def svg(folder: Path) -> Made:
    pytest.importorskip("resvg_py")
    shape = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="6"><circle cx="3" cy="3" r="{}" fill="navy"/></svg>'
    )
    drawings = [shape.format(1 + n % 3).encode() for n in range(COUNT)]
    return Made({"kind": "tar", "paths": tar(folder / "a.tar", pairs(drawings, "svg"))}, exact=False)


def videos(folder: Path) -> Made:
    pytest.importorskip("av")
    for n in range(COUNT):
        (folder / f"{n}.mp4").write_bytes(video(count=4 + n, size=(64, 48 + 8 * (n % 3)), rotation=90 * (n % 2)))
    talks = [[{"from": "human", "value": "<video>\nwhat is it?"}, talk[1]] for talk in TALKS]
    records = [{"video": f"{n}.mp4", "conversations": talk} for n, talk in enumerate(talks)]
    return Made({"kind": "jsonl", "paths": lines(folder / "a.jsonl", records), "video_frames": 4}, exact=False)


def built_videos(folder: Path) -> Made:
    """Their frames, as ``build`` writes them."""
    for task in building.plan(videos(folder).spec, str(folder / "built"), 8):
        building.build_file(task)
    return Made({"kind": "array_record", "paths": str(folder / "built" / "*.array_record")}, exact=False)


def again(format: str, **options: Any) -> list[bytes]:
    """The pictures in another format."""
    result = []
    for pixels in PIXELS:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format, **options)
        result.append(buffer.getvalue())
    return result


FORMATS: list[Callable[[Path], Made]] = [
    *(img2dataset, json_in_tar, compressed_tar, files, parquet, hugging_face, interleaved, arrow, llava, typed),
    *(json_list, compressed_jsonl, coco, captions_by_image, image_folder, semicolons, vlmevalkit, internvl, onevision),
    *(array_record, tfds, mds, tfrecord, text, heic, jxl, svg, videos, built_videos),
]


class Trainer:
    """The step of one tiny model, compiled once."""

    def __init__(self, golden: Path):
        self.tokenizer = str(golden / "chat")
        tokenizer = Tokenizer(self.tokenizer)
        vision = {"hidden_size": 16, "patch_size": 8, "image_size": 64}
        model = {"preset": "tiny_mono", "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "vision": vision}
        model["image_token_id"] = tokenizer.id(IMAGE_CONTEXT)
        self.values = {"stage": "S2", "steps": 3, "model": model, "dtype": "float32", "frozen_dtype": "float32"}
        self.values |= {"seed": 3, "mesh": {"data": 1, "fsdp": -1}}
        self.program = Program.build(RunConfig.from_dict({**self.values, "data": self.data({"kind": "text"})}))
        state, self.frozen = self.program.fresh_state()
        self.start = jax.tree.map(np.asarray, state)
        self.step = self.program.train_step(state, self.frozen)

    def data(self, spec: dict[str, Any]) -> dict[str, Any]:
        slots = {"visual_tokens": 64, "text_tokens": 192, "batch_size": 2, "block_samples": 32, "max_tiles": 3}
        sources = [{"name": "set", "spec": {"paths": "x", **spec}}]
        return {"sources": sources, "tokenizer": self.tokenizer, "system_message": "", **slots}

    def packed(self, spec: dict[str, Any], cache: Path) -> PackedData:
        return PackedData(DataConfig.from_dict(self.data(spec)), cache, self.program.model.config.geometry)

    def losses(self, batches: list[dict[str, np.ndarray]]) -> list[float]:
        """Losses of training on the batches from the start."""
        state, losses = jax.tree.map(np.array, self.start), []
        for batch in batches:
            state, metrics = self.step(state, self.frozen, dict(batch))
            losses.append(float(metrics["loss"]))
            assert not int(metrics["nonfinite"]) and float(metrics["grad_norm"]) > 0
        return losses


@pytest.fixture(scope="module")
def trainer(golden_dir: Path) -> Trainer:
    return Trainer(golden_dir)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_three_steps(
    write: Callable[[Path], Made], trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    made = write(folder)
    data = trainer.packed(made.spec, tmp_path / "cache")
    (source,) = data.sources
    assert source.dropped() == {} and (len(source) == made.count or not made.count)
    samples = [source.read(number) for number in range(len(source))]
    if made.exact:
        number = {text: n for n, text in enumerate(TEXTS)}
        found = sorted(next(n for text, n in number.items() if sample.content.endswith(text)) for sample in samples)
        assert found == list(range(COUNT))
        for sample in samples:
            n = next(n for text, n in number.items() if sample.content.endswith(text))
            np.testing.assert_array_equal(decode(*sample.images, ImageLimits()), PIXELS[n])
    batches = [data.batch(step) for step in range(3)]
    assert not data.report.skipped and all(batch["loss_weights"].any() for batch in batches)
    losses = trainer.losses(batches)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] + 0.5
    blind = trainer.losses([{**batch, "patches": np.zeros_like(batch["patches"])} for batch in batches[:1]])
    assert (abs(blind[0] - losses[0]) > 1e-4) == made.images
