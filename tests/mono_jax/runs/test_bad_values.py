"""Bad values of a run's config: each ends in one line that names the key, the value and what is expected."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import strict
from data_pipelines.errors import DataError
from mono_jax.errors import ConfigError
from mono_jax.models.architecture import Architecture
from mono_jax.runs.architecture import architecture_of
from mono_jax.runs.config import RunConfig

SOURCE = {"name": "laion", "spec": {"kind": "tar", "paths": "laion/*.tar"}}
GOOD = {
    "stage": "S1.1",
    "steps": 10,
    "model": {"preset": "tiny_mono"},
    "data": {"tokenizer": "tokenizer", "sources": [SOURCE]},
}
MISSING = object()

# (dotted key, value, words of the message)
BAD_VALUES = [
    # The run
    ("stage", MISSING, "config.stage is missing"),
    ("stage", "S1.4", "did you mean 'S1.3'?"),
    ("stage", 1, "it must be"),
    ("stage", None, "it must be"),
    ("data", MISSING, "data is missing"),
    ("data", 3, "it must be a mapping with keys sources, tokenizer"),
    ("data", None, "it must be a mapping"),
    ("log_evry", 1, "unknown key 'log_evry'; did you mean 'log_every'?"),
    ("learning_rate", 1e-4, "did you mean 'config.optim.learning_rate'?"),
    ("batch_size", 4, "did you mean 'config.data.batch_size'?"),
    ("fsdp", 2, "did you mean 'config.mesh.fsdp'?"),
    ("steps", 0, "at least 1"),
    ("steps", -1, "at least 1"),
    ("steps", 2.5, "a whole number"),
    ("steps", 1e3, "write 1000"),
    ("steps", "many", "a whole number"),
    ("steps", True, "a whole number"),
    ("steps", MISSING, "steps and config.epochs"),
    ("epochs", 1, "steps and config.epochs"),
    ("epochs", -1, "above 0"),
    ("epochs", 0, "above 0"),
    ("epochs", math.nan, "a number"),
    ("epochs", "one", "a number"),
    ("skip_steps", [[7, 5]], "config.skip_steps: [7, 5]: the first"),
    ("profile_steps", [7, 5], "config.profile_steps: [7, 5]: the first"),
    ("profile_steps", [0, 5], "at least 1"),
    ("profile_steps", [5], "profile_steps is [5]"),
    ("dtype", "float8", "did you mean 'float32'?"),
    ("dtype", "bf16", "'bfloat16'"),
    ("frozen_dtype", 16, "'source', 'bfloat16' or 'float32'"),
    ("seed", 0.5, "a whole number"),
    ("seed", -1, "at least 0"),
    ("keep", 0, "at least 1"),
    ("log_every", 0, "at least 1"),
    ("checkpoint_every", -5, "at least 1"),
    ("async_checkpoints", "no", "True or False"),
    ("async_checkpoints", 0, "True or False"),
    ("allow_changes", 1, "True or False"),
    ("allow_changes", "yes", "True or False"),
    ("cache_dir", 3, "a string"),
    ("init", None, "a string"),
    ("init", ["a"], "a string"),
    ("trains", "attention", "a list"),
    ("trains", [], "trains is empty"),
    ("trains", [1], "a string"),
    ("grad_accum_steps", 0, "at least 1"),
    ("max_nonfinite_steps", 0, "at least 1"),
    # The optimizer
    ("optim", 3, "config.optim is 3: it must be a mapping with keys optimizer, learning_rate"),
    ("optim", "adamw", "it must be a mapping"),
    ("optim", [1], "it must be a mapping"),
    ("optim.lerning_rate", 1e-4, "did you mean 'learning_rate'?"),
    ("optim.learning_rate", "abc", "a number"),
    ("optim.learning_rate", "1e-4", "a number"),
    ("optim.learning_rate", -1, "at least 0"),
    ("optim.learning_rate", math.nan, "a number"),
    ("optim.learning_rate", math.inf, "a number"),
    ("optim.learning_rate", 10**400, "a number"),
    ("optim.learning_rate", [1e-4], "a number"),
    ("optim.optimizer", "adam", "did you mean 'adamw'?"),
    ("optim.optimizer", "sgd", "valid: adafactor, adamw, lion, muon"),
    ("optim.schedule", "cosin", "did you mean 'cosine'?"),
    ("optim.schedule", 3, "'constant'"),
    ("optim.warmup", 2, "at most 1"),
    ("optim.warmup", -0.1, "at least 0"),
    ("optim.warmup_steps", 3.7, "a whole number"),
    ("optim.warmup_steps", -3, "at least 0"),
    ("optim.decay", 0, "above 0"),
    ("optim.end", 1.5, "at most 1"),
    ("optim.weight_decay", -0.1, "at least 0"),
    ("optim.b1", 1.5, "below 1"),
    ("optim.b1", 1, "below 1"),
    ("optim.b2", -0.9, "at least 0"),
    ("optim.eps", 0, "above 0"),
    ("optim.clip_norm", -1, "at least 0"),
    ("optim.clip_norm", None, "a number"),
    ("optim.groups", ["attention"], "a mapping with keys 'visual_embedding'"),
    ("optim.groups.attn", {}, "did you mean 'attention'?"),
    ("optim.groups.attention", 1e-4, "a mapping with keys optimizer, learning_rate"),
    ("optim.groups.attention.learning_rate", -1, "at least 0"),
    ("optim.groups.attention.learning_rat", 1, "did you mean 'learning_rate'?"),
    # The mesh
    ("mesh", 8, "a mapping with keys data, fsdp, tensor"),
    ("mesh.fsdp", "two", "a whole number"),
    ("mesh.fsdp", 0, "-1"),
    ("mesh.tensor", -2, "at least -1"),
    ("mesh", {"fsdp": -1, "data": -1}, "only one"),
    ("mesh.data", 1.0, "a whole number"),
    ("mesh.fsdb", 2, "did you mean 'fsdp'?"),
    # The model
    ("model", 3, "a mapping"),
    ("model.preset", "mono_internvl_2", "did you mean 'mono_internvl_2b'?"),
    ("model.preset", 2, "preset"),
    ("model.hiden_size", 64, "did you mean 'hidden_size'?"),
    ("model.num_hidden_layers", 2.5, "a whole number"),
    ("model.num_hidden_layers", 0, "at least 1"),
    ("model.num_attention_heads", 0, "at least 1"),
    ("model.num_attention_heads", 3, "multiple of model.num_attention_heads"),
    ("model.num_key_value_heads", 3, "multiple of"),
    ("model.vocab_size", "92k", "a whole number"),
    ("model.rms_norm_eps", 0, "above 0"),
    ("model.rope_theta", -1, "above 0"),
    ("model.tie_word_embeddings", "no", "True or False"),
    ("model.bias", 0, "True or False"),
    ("model.image_token_id", -1, "at least 0"),
    ("model.rope_scaling", "dynamic", "a mapping with keys type, factor"),
    ("model.rope_scaling", {"type": "longrope", "factor": 2}, "dynamic, linear"),
    ("model.rope_scaling", {"type": "yarn", "factor": 2}, "original_max_position_embeddings is missing"),
    ("model.sliding_window", 4, "sliding_layers need each other"),
    ("model.rope_scaling", {"type": "dynamic"}, "factor is missing"),
    ("model.rope_scaling", {"type": "dynamic", "factor": 0}, "above 0"),
    ("model.vision", 14, "a mapping with keys kind"),
    ("model.vision", None, "visual experts need"),
    ("model.vision.patch_size", 0, "at least 1"),
    ("model.vision.patchsize", 14, "did you mean 'patch_size'?"),
    ("model.vision.image_size", 450, "a multiple of"),
    ("model.vision.downsample_ratio", 0.3, "use 1, 0.5, 0.25"),
    ("model.vision.downsample_ratio", 0, "at least 0.01"),
    ("model.vision.ps_version", "v3", "did you mean 'v"),
    ("model.vision.kind", "patch", "did you mean 'patch_embed'?"),
    ("model.remat", "full", "did you mean 'config.execution.remat'?"),
    # Execution
    ("execution.remat", "dot", "did you mean 'dots'?"),
    ("execution.remat", True, "'none'"),
    ("execution.experts", "groupd", "did you mean 'grouped'?"),
    ("execution.attention", "spash", "did you mean 'splash'?"),
    ("execution.attention_chunk", 0, "at least 1"),
    ("execution.loss_chunk", -5, "at least 0"),
    ("execution.experts_block", 0, "at least 1"),
    # The data
    ("data.tokenizer", MISSING, "data.tokenizer is missing"),
    ("data.tokenizer", 3, "a string"),
    ("data.sources", MISSING, "data.sources is missing"),
    ("data.sources", [], "data.sources is empty"),
    ("data.sources", 3, "a list"),
    ("data.sources", ["laion"], "a mapping with keys name"),
    ("data.sources", [SOURCE, SOURCE], "names must differ"),
    ("data.sources", [{"name": "laion"}], "spec is missing"),
    ("data.sources", {"laion": {"spec": SOURCE["spec"], "weight": 0}}, "data.sources.laion.weight is 0"),
    ("data.sources", {"laion": {"spec": SOURCE["spec"], "weights": 1}}, "did you mean 'weight'?"),
    ("data.batch", 1, "did you mean 'batch_size'?"),
    ("data.batch_size", 0, "at least 1"),
    ("data.visual_tokens", -1, "at least 0"),
    ("data.text_tokens", 0, "at least 1"),
    ("data.text_tokens", "2k", "a whole number"),
    ("data.max_tiles", 0, "at least 1"),
    ("data.shuffle", "globl", "did you mean 'global'?"),
    ("data.loss_weighting", "tokens", "did you mean 'token'?"),
    ("data.thumbnail", "no", "True or False"),
    ("data.epochs", -1, "at least 1"),
    ("data.workers", -1, "at least 0"),
    ("data.prefetch", 0, "at least 1"),
]  # fmt: skip


def with_value(key: str, value: Any) -> dict[str, Any]:
    values: Any = copy.deepcopy(GOOD)
    if key == "epochs" and value != 1:
        del values["steps"]
    *parents, name = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    if value is MISSING:
        del node[name]
    else:
        node[name] = value
    return values


def build(values: dict[str, Any]) -> None:
    """The config and its model, without data."""
    architecture_of(RunConfig.from_dict(values))


def test_the_values_around_them_are_good():
    build(GOOD)


@pytest.mark.parametrize(("key", "value", "words"), BAD_VALUES)
def test_one_line_names_the_key_the_value_and_what_is_expected(key: str, value: Any, words: str):
    with pytest.raises((ConfigError, DataError)) as caught:
        build(with_value(key, value))
    message = str(caught.value)
    assert words in message and len(message.splitlines()) == 1
    assert key.rpartition(".")[2] in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
KEYS = [row.key for prefix, cls in (("", RunConfig), ("model", Architecture)) for row in strict.reference(cls, prefix)]


@settings(deadline=None, max_examples=2000)
@given(st.sampled_from([key for key in KEYS if ".NAME" not in key]), JSON)
def test_any_value_of_any_key_is_taken_or_refused_in_one_line(key: str, value: Any):
    try:
        run = RunConfig.from_dict(with_value(key, value))
    except (ConfigError, DataError) as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert RunConfig.from_dict(json.loads(json.dumps(strict.to_dict(run), allow_nan=False))) == run
