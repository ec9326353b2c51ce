"""Scores of a source's samples under a model, on which filters select: which samples are easy or hard for it.

    loss     nats per trained token
    tokens   number of trained tokens
    sight    for models with vision: by how many nats per token the loss grows with noise in place of the images, that
             is, how much of the text the images reveal

A model without vision reads each text separately, as plain text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.config import BATCH_FIELDS, DataConfig, SourceConfig
from data_pipelines.encoding.captions import clean_caption
from data_pipelines.encoding.samples import SampleBuilder
from data_pipelines.errors import BadSample, DataError
from data_pipelines.io import publish
from data_pipelines.io.digests import digest
from data_pipelines.io.processes import ahead
from data_pipelines.loading.packed_data import PackedData
from data_pipelines.packing.lengths import length_digest
from data_pipelines.records.raw_sample import IMAGE, RawSample
from data_pipelines.sources.source import Source, open_source
from data_pipelines.strict import to_dict
from mono_jax.evaluation.benchmarks.running import identity, local_mesh
from mono_jax.evaluation.blind import blinded
from mono_jax.evaluation.language.likelihood import Likelihoods
from mono_jax.evaluation.sample_losses import SampleLosses, by_sample
from mono_jax.generation.decode import Generator, default_dtype
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.transformer import Model
from mono_jax.parallel.agreement import first_process_first, from_first, together
from mono_jax.parallel.mesh import make_mesh, row_ways
from mono_jax.runs.batches import check_data_fits
from mono_jax.storage.places import Place
from mono_jax.training.metrics import Say
from mono_jax.weights.model_folder import find_model, load_model, model_config

_CHUNK = 4096  # texts whose likelihoods are requested at once
_FETCHES = 16  # texts read concurrently from remote shards, since most of the time is waiting
_VERSION = 1  # of the scoring rules

Scores = dict[str, dict[str, float]]  # {key of a sample: {one of SCORES: value}}


class Scorer:
    """Scores samples under the model in a folder, on the devices of this process.

    Raises WeightsError or ConfigError that explains what is wrong with the folder.
    """

    def __init__(self, model: str | Place, data: DataConfig, cache: Path, say: Say, dtype: str | None = None):
        """data: how samples become rows; its sources are not used. dtype: of the activations, default: the device's."""
        folder = find_model(model)
        self._mesh = local_mesh(folder) or make_mesh(devices=jax.local_devices())
        self._config, self._params = load_model(folder, shardings=self._mesh)
        self._data, self._cache, self._say, self._model = data, cache, say, str(model)
        self._dtype = jnp.dtype(dtype or default_dtype())

    def __call__(self, source: SourceConfig) -> Scores:
        """Scores of all samples that the source offers, except bad ones, which are counted in a printed line.

        Raises DataError if none can be scored or a loss is not finite; StorageError.
        """
        bad: Counter[str] = Counter()
        of_all = self._of_texts if self._config.vision is None else self._of_rows
        scores = of_all(source, bad)
        mean = np.mean([score["loss"] for score in scores.values()]) if scores else np.nan
        left_out = "".join(f"; {count} without: {reason}" for reason, count in sorted(bad.items()))
        if not np.isfinite(mean):
            why = (
                "the losses are not finite: check the weights, or use dtype float32" if scores else "no sample is left"
            )
            raise DataError(f"{source.name}: not scored by {self._model}: {why}{left_out}")
        self._say(f"{source.name}: {len(scores)} samples scored by {self._model}, mean loss {mean:.4f}{left_out}")
        return scores

    def _of_rows(self, source: SourceConfig, bad: Counter[str]) -> Scores:
        ways = row_ways(self._mesh)
        data = PackedData(
            _in_order(self._data, source, -(-self._data.batch_size // ways) * ways), self._cache, self._config.geometry
        )
        model = Model(self._config)
        check_data_fits(self._config, Execution(), data)
        losses = SampleLosses(model, self._params, self._dtype, self._mesh, data.batch_size)
        sums: dict[str, np.ndarray] = {}
        for step, batch in data.iterate():
            keys = data.row_keys(step)
            most = max(map(len, keys))
            weights = by_sample(batch, batch["loss_weights"], most)
            seeing, blind = losses(batch, most), losses(blinded(batch, "noise"), most)
            for row, column in ((row, column) for row, names in enumerate(keys) for column in range(len(names))):
                found = np.array([part[row, column] for part in (weights, seeing, blind)])
                sums[keys[row][column]] = sums.get(keys[row][column], 0) + found  # summed over the pieces of a text
        bad.update(data.report.skipped)
        return {
            key: {"loss": seeing / tokens, "tokens": tokens, "sight": (blind - seeing) / tokens}
            for key, (tokens, seeing, blind) in sums.items()
            if tokens
        }

    def _of_texts(self, source: SourceConfig, bad: Counter[str]) -> Scores:
        builder = _builder(self._data, self._config)
        generator = Generator(self._config, self._params, self._dtype, mesh=self._mesh)
        likelihoods, scores = Likelihoods(generator, builder.longest_piece), {}
        texts = _texts(open_source(source.spec), builder, bad)
        while part := list(itertools.islice(texts, _CHUNK)):
            found = likelihoods([(ids[:1], ids[1:]) for _, ids in part])
            for (key, ids), (likelihood, _) in zip(part, found):
                scores[key] = {"loss": -likelihood / (len(ids) - 1), "tokens": float(len(ids) - 1)}
        return scores


def _builder(data: DataConfig, config: Architecture) -> SampleBuilder:
    """The builder of the model's samples; for a model without vision, the tokenizer need not have image tokens."""
    if config.vision is None:
        data = dataclasses.replace(data, visual_tokens=0, boundary_block=0)
    return SampleBuilder(data, geometry=config.geometry)


def _in_order(data: DataConfig, source: SourceConfig, rows: int) -> DataConfig:
    """The config of batches that hold every sample of one source exactly once, unchanged."""
    values = to_dict(data) | {"sources": [to_dict(source) | {"weight": None}], "batch_size": rows, "epochs": 1}
    values |= {"shuffle": "none", "jpeg_augment": False, "loss_weighting": "token", "source_ids": False}
    values |= {"boundary_block": 0, "workers": 0}
    values |= {"pixel_path": "exact"} if data.pixel_path == "device" else {}  # the same bytes
    return DataConfig.from_dict(values)


def _texts(source: Source, builder: SampleBuilder, bad: Counter[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(key, ids of the text with its first token, int32 [n], n > 1) of the samples; bad ones are counted."""
    calls = ((index,) for index in range(len(source)))
    for number, future in enumerate(ahead(source.read_text, calls, _FETCHES if source.is_remote else 1)):
        try:
            ids = builder.chat.plain(_text(future.result(), builder.config.max_caption_chars))
        except BadSample as error:
            bad[error.reason] += 1
            continue
        ids = builder.chat.piece(ids, 0, builder.longest_piece)[0]
        if len(ids) > 1:
            yield source.key(number), ids
        else:
            bad["too_short"] += 1


def _text(raw: RawSample, most: int) -> str:
    return raw.content.replace(IMAGE, " ").strip() if raw.caption is None else clean_caption(raw.caption, most)


def write(file: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Writes a line of JSON per sample, to be read through ``spec.scores`` of its source. Raises OSError."""
    with publish.new_file(file) as new, new.open("w", encoding="utf-8") as lines:
        for key, score in scores.items():
            values = {name: round(value, 5) for name, value in score.items()}
            lines.write(json.dumps({"key": key, **values}, ensure_ascii=False) + "\n")


def score(model: str, data: DataConfig, out: Path, cache: Path, say: Say, dtype: str | None = None) -> dict[str, Any]:
    """Scores the samples of all sources of ``data``, each source into OUT/NAME.jsonl.

    Returns {"model", "sources": {name: {"file", "samples", "loss": its mean}}}. Raises MonoJaxError or DataError.
    """
    scorer, result = Scorer(model, data, cache, say, dtype), {}
    for source in data.sources:
        scores, file = scorer(source), out / f"{source.name}.jsonl"
        write(file, scores)
        loss = float(np.mean([score["loss"] for score in scores.values()]))
        result[source.name] = {"file": str(file), "samples": len(scores), "loss": loss}
    return {"model": model, "sources": result}


def with_scores(
    sources: Sequence[Mapping[str, Any]], data: DataConfig, model: str | Place, cache: Path, say: Say, dtype: str | None
) -> list[dict[str, Any]]:
    """The sources (those of ``data``) with files of their scores in their specs.

    Missing files are made, with the sources split over the processes. All processes make this call and share ``cache``.
    Raises as ``Scorer`` does, and PeerError if another process failed.
    """
    builder = _builder(data, model_config(find_model(model)))
    form = (identity(find_model(model)), data.digest(*BATCH_FIELDS), str(dtype), str(_VERSION))
    files = []
    with first_process_first():  # it counts what the others then find in the cache
        for source in data.sources:
            parts = (open_source(source.spec).fingerprint(), length_digest(source, builder), *form)
            files.append(cache / "scores" / f"{digest(*parts)[:24]}.jsonl")
    # Of sources with the same samples (replayed ones, for example), only the first.
    missing = from_first([files.index(file) for file in dict.fromkeys(files) if not file.is_file()])
    if missing:
        scorer = Scorer(model, data, cache, say, dtype)  # made by all processes, which read the weights together
        with together():
            for number in missing[jax.process_index() :: jax.process_count()]:
                write(files[number], scorer(data.sources[number]))
    return [{**values, "spec": {**values["spec"], "scores": str(file)}} for values, file in zip(sources, files)]
