"""Conversion between Hugging Face folders and this project's model folders, bit for bit and layer by layer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data_pipelines.io.publish import new_folder, remove_stale, write_json
from data_pipelines.special_tokens import IMAGE_CONTEXT, OWN_TEMPLATE
from mono_jax import tree
from mono_jax.errors import ConfigError, WeightsError
from mono_jax.files import read_json
from mono_jax.models.architecture import Architecture, VisionConfig
from mono_jax.storage.objects import ObjectPath
from mono_jax.storage.places import Place, place_of, upload
from mono_jax.weights import upcycle
from mono_jax.weights.families.table import family_of
from mono_jax.weights.gguf_files import unpacked
from mono_jax.weights.hf_config import config_beside, config_to_hf, has_published_layout, with_dtype
from mono_jax.weights.lazy import LazyArray
from mono_jax.weights.model_folder import (
    MODEL_FILE,
    Origin,
    companion_files,
    find_model,
    local_files,
    open_model,
    read_origin,
    save_model,
)
from mono_jax.weights.names import is_stacked
from mono_jax.weights.prompt_format import PromptFormat
from mono_jax.weights.writers import SHARD_SIZE, save_params

Kind = Literal["hf", "orbax", "gguf"]


class OwnLayout(Protocol):
    """Writes the companion files of our own layout next to the weights (``mono_jax.hf_export.layout.write_files``)."""

    def __call__(self, folder: Path, config: Architecture, prompt: PromptFormat, dtype: str) -> None: ...


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """How visual experts are added to the model during conversion.

    Attributes:
      open_tokenizer: the tokenizer of a folder, with its ``added`` tokens (name -> id) and its ``vocab_size``.
      vision: fields of the new patch embedding's VisionConfig that differ from the defaults.
      attention_experts: also a visual QKV per layer (1.5).
      seed: of the patch embedding and the projector.
    """

    open_tokenizer: Callable[[Path], Any]
    vision: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    attention_experts: bool = False
    seed: int = 0


def convert(
    source: str | Place,
    target: str | Place,
    *,
    source_kind: Kind | None = None,
    target_kind: Kind | None = None,
    names_file: Path | None = None,
    image_token_id: int | None = None,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    upcycling: Upcycling | None = None,
    grow_vocabulary: int | None = None,
    layout: Literal["auto", "published", "own"] = "auto",
    own_layout: OwnLayout | None = None,
) -> dict[str, Any]:
    """Converts the model in ``source``; ``target`` appears once it is complete. Returns what was done, for JSON.

    Args:
      source: a Hugging Face folder, a GGUF file, a model folder, or the workdir of a finished run.
      source_kind: what ``source`` must be; default: detected from its files.
      target_kind: default: the other kind, or the same kind with ``upcycling`` or ``grow_vocabulary``.
      names_file: JSON table of checkpoint names that differ from the built-in ones.
      image_token_id: id of <IMG_CONTEXT>; default: from the tokenizer files.
      dtype: casts all weights; None keeps them bit for bit.
      shard_size: maximum size of a safetensors file in bytes.
      upcycling: add visual experts to a model without them; its vocabulary grows as far as the new tokens need.
      grow_vocabulary: new vocabulary size of a model that otherwise stays the same.
      layout: of a Hugging Face folder; "auto" = the published layout if there is one, or if tensors have ``names``.
      own_layout: writes our own layout; None = only the published one is available.

    Raises MonoJaxError.
    """
    if source_kind == "gguf" or (source_kind is None and str(source).endswith(".gguf")):
        options = {"names_file": names_file, "image_token_id": image_token_id, "dtype": dtype, "shard_size": shard_size}
        options |= {"upcycling": upcycling, "grow_vocabulary": grow_vocabulary, "target_kind": target_kind or "orbax"}
        options |= {"layout": layout, "own_layout": own_layout}
        with unpacked(Path(str(source))) as folder:
            return convert(folder, target, source_kind="hf", **options) | {"from": "gguf", "src": str(source)}
    names = read_json(names_file) if names_file else {}
    given, source, target = source, find_model(source), place_of(target)
    kind = _kind_of(source, source_kind)
    target_kind = target_kind or (kind if upcycling or grow_vocabulary else {"hf": "orbax", "orbax": "hf"}[kind])
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise _not_empty(target)
    config, params, names = open_model(source, image_token_id=image_token_id, names=names)
    origin = read_origin(source)
    report: dict[str, Any] = {"from": kind, "to": target_kind, "src": str(given), "dst": str(target)}
    added_tokens, old_size = None, config.vocab_size
    if upcycling and grow_vocabulary:
        raise ConfigError("grow_vocabulary: adding experts already grows the vocabulary: give one of the two")
    if upcycling:
        chat = (origin.prompt or PromptFormat()).template != OWN_TEMPLATE
        config, params, added_tokens = _upcycle(source, config, params, upcycling, image_token_id, chat)
    elif grow_vocabulary:
        config, params = upcycle.grow_vocabulary(config, params, grow_vocabulary)
    if upcycling or grow_vocabulary:
        report["vocabulary_rows_added"] = config.vocab_size - old_size
    flat = tree.flatten(params)
    if unused := [path for path in names if path not in flat]:
        raise ConfigError(f"{names_file}: no such parameter in this model: {', '.join(unused)}")
    if dtype:
        params = tree.unflatten({path: leaf.astype(np.dtype(dtype)) for path, leaf in flat.items()})
        origin = dataclasses.replace(origin, dtype=dtype)
    own = target_kind == "hf" and own_layout is not None and layout != "published"
    own = own and (layout == "own" or not (names or has_published_layout(config)))
    report |= {"model": _describe(config), **({"layout": "own"} if own else {}), **_sizes(params)}
    started = time.perf_counter()
    with _published(target, report["bytes"]) as folder:
        params = _with_progress(params)
        stored = params["embed"]["embedding"].dtype
        if own:
            save_params(folder, config, params, shard_size=shard_size)
        elif target_kind == "hf":
            save_params(folder, config, params, names=names, shard_size=shard_size)
            write_json(folder / "config.json", _config_json(config, origin, dtype, stored))
        else:
            values = config_beside(config, origin.config_json, stored, prompt=origin.prompt)
            values = with_dtype(values, dtype) if values and dtype else values
            save_model(folder, config, params, origin=dataclasses.replace(origin, config_json=values, names=names))
        for file in companion_files(source):
            shutil.copyfile(file, folder / file.name)
        if added_tokens is not None:
            write_json(folder / "added_tokens.json", added_tokens)
        if own:
            own_layout(folder, config, origin.prompt or PromptFormat(), str(np.dtype(stored)))
    return report | {"seconds": round(time.perf_counter() - started, 2)}


def _config_json(config: Architecture, origin: Origin, cast: str | None, stored: np.dtype) -> dict[str, Any]:
    """``cast``: dtype of all weights after a cast; ``stored``: dtype of the embedding, for a new config.json."""
    values = config_to_hf(config, origin.config_json, stored, prompt=origin.prompt)
    return with_dtype(values, cast) if cast else values


def summary(report: Mapping[str, Any]) -> str:
    """The report of ``convert`` as text."""
    text = (
        f"{report['dst']}: {report['model']}, {report['parameters'] / 1e9:.3f} B parameters in {report['tensors']} "
        f"tensors, {report['bytes'] / 1e9:.2f} GB ({', '.join(report['dtypes'])}), {report['seconds']} s"
    )
    if rows := report.get("vocabulary_rows_added"):
        text += f"\nvocabulary: {rows} rows added, each the mean of the old ones"
    return text


def _kind_of(source: Place, expected: Kind | None) -> Kind:
    found: Kind = "orbax" if (source / MODEL_FILE).is_file() else "hf"
    if expected == "orbax" and found == "hf":
        raise WeightsError(f"{source}: contains no {MODEL_FILE}: not a model folder; use --from=hf?")
    if expected == "hf" and found == "orbax":
        raise WeightsError(f"{source}: contains a {MODEL_FILE}: a model folder; use --from=orbax")
    return found


def _upcycle(
    source: Place, config: Architecture, params: tree.Tree, upcycling: Upcycling, image_token_id: int | None, chat: bool
) -> tuple[Architecture, tree.Tree, dict[str, int]]:
    """Config and weights of the Mono-InternVL model, and the added tokens of its tokenizer (``chat``: see there)."""
    if upcycling.vision and config.vision is not None:
        raise ConfigError(f"--vision.{next(iter(upcycling.vision))}: {source} already has a patch embedding")
    known, vocab_size = {}, config.vocab_size
    files = local_files(source)
    if any((files / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = upcycling.open_tokenizer(files)
        known, vocab_size = tokenizer.added, max(vocab_size, tokenizer.vocab_size)
    tokens, vocab_size = upcycle.add_tokens(known, vocab_size, chat)
    new, params = upcycle.upcycle(
        config,
        params,
        vision=dataclasses.replace(VisionConfig(), **upcycling.vision),
        attention_experts=upcycling.attention_experts,
        vocab_size=vocab_size,
        image_token_id=tokens[IMAGE_CONTEXT] if image_token_id is None else image_token_id,
        seed=upcycling.seed,
    )
    return new, params, tokens


def _describe(config: Architecture) -> str:
    """A description of the model, without a size: published labels (2B) belong to the published checkpoints only."""
    if config.vision is None:
        return family_of(config).title
    name = "Mono-InternVL" if config.is_monolithic else "modular InternVL"
    on = "" if config.family == Architecture.family else f" on {family_of(config).title}"
    return name + ("-1.5" if config.visual_attention_experts else "") + on


def _sizes(params: tree.Tree) -> dict[str, Any]:
    flat = tree.flatten(params)
    return {
        "tensors": _count(flat),
        "parameters": sum(math.prod(leaf.shape) for leaf in flat.values()),
        "bytes": sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in flat.values()),
        "dtypes": sorted({str(np.dtype(leaf.dtype)) for leaf in flat.values()}),
    }


def _count(flat: Mapping[str, Any]) -> int:
    """The number of tensors in a checkpoint: one per layer."""
    return sum(leaf.shape[0] if is_stacked(path) else 1 for path, leaf in flat.items())


@contextlib.contextmanager
def _published(target: Place, size: int) -> Iterator[Path]:
    """A folder for ``size`` bytes that becomes ``target`` at the end; disk errors become WeightsErrors."""
    if isinstance(target, ObjectPath):
        with tempfile.TemporaryDirectory() as made:
            with _published(Path(made) / "model", size) as folder:
                yield folder
            upload(Path(made) / "model", target, last=(MODEL_FILE, "config.json"))
        return
    remove_stale(target.parent)
    try:
        with new_folder(target) as folder:
            free = shutil.disk_usage(folder).free
            if size > free:
                raise WeightsError(f"{target}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
            yield folder
    except FileExistsError:
        raise _not_empty(target) from None
    except OSError as error:
        raise WeightsError(f"{target}: not written: {error.strerror or error}") from None


def _not_empty(target: Place) -> ConfigError:
    return ConfigError(f"{target}: exists and is not empty: choose another DST or remove it")


def _with_progress(params: tree.Tree) -> tree.Tree:
    """Counts the slices that have been read, on one line of a terminal."""
    if not sys.stderr.isatty():
        return params
    flat = tree.flatten(params)
    total = _count(flat)
    done = 0

    def counted(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LazyArray):
            return leaf

        def read(n: int | None) -> np.ndarray:
            nonlocal done
            done += 1
            print(f"\r{done}/{total} {path:50}", end="" if done < total else "\n", file=sys.stderr, flush=True)
            return leaf.read(n)

        return dataclasses.replace(leaf, read=read)

    return tree.unflatten({path: counted(path, leaf) for path, leaf in flat.items()})
