"""TFDS datasets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path / "cache"))


def test_tfds_without_tensorflow(tmp_path: Path) -> None:
    script = f"""
import io, sys
import fsspec
import numpy as np
import tensorflow_datasets as tfds
from tests.data_pipelines.shard_tools import encoded

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({{
            "image": tfds.features.Image(encoding_format="png"),
            "captions": tfds.features.Sequence({{"text": tfds.features.Text(), "id": np.int64}})}}))
    def _split_generators(self, dl):
        return {{"val": self._generate_examples()}}
    def _generate_examples(self):
        for i in range(3):
            image = io.BytesIO(encoded(20 + i, 10, "PNG"))
            yield i, {{"image": image, "captions": [{{"text": "t%d" % i, "id": i}}] * 2}}

class Clips(Tiny):
    def _info(self):
        features = {{"video": tfds.features.Sequence(tfds.features.Image()), "caption": tfds.features.Text()}}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))
    def _generate_examples(self):
        for i in range(2):
            yield i, {{"video": [io.BytesIO(encoded(20 + n, 10, "PNG")) for n in range(9)], "caption": "clip"}}

for made in (Tiny, Clips):
    made(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()
from data_pipelines.sources.source import open_source
source = open_source({{"kind": "tfds", "paths": {str(tmp_path / "tiny" / "1.0.0")!r}, "split": "val"}})
samples = [source.read(i) for i in range(3)]
assert sorted(s.caption for s in samples) == ["t0", "t1", "t2"], samples
for i, s in enumerate(samples):
    assert s.images == (encoded(20 + int(s.caption[1]), 10, "PNG"),)
    assert source.image_sizes([i])[1].tolist() == [[20 + int(s.caption[1]), 10]]
fs = fsspec.filesystem("memory")
fs.put({str(tmp_path / "tiny" / "1.0.0")!r}, "/bucket/1.0.0", recursive=True)
remote = open_source({{"kind": "tfds", "paths": "memory://bucket/1.0.0", "split": "val"}})
assert [remote.read(i) for i in range(3)] == samples
clips = {{"kind": "tfds", "paths": {str(tmp_path / "clips" / "1.0.0")!r}, "split": "val", "video_frames": 3}}
clip = open_source(clips).read(0)
assert clip.images == tuple(encoded(20 + n, 10, "PNG") for n in (1, 4, 7)) and clip.frames == (1, 2, 3), clip.frames
assert "tensorflow" not in sys.modules
"""

    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parents[2])])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
