from __future__ import annotations

import dataclasses

import jax
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError
from mono_jax.models.presets import PRESETS, preset
from mono_jax.models.transformer import Model
from mono_jax.training.groups import group_table, groups_of, split, trained_groups
from mono_jax.training.stages import GROUPS, get_stage

VISUAL = {"visual_embedding", "visual_experts"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_of_every_preset_has_one_group(name: str):
    config = preset(name)
    params = Model(config).abstract_params()
    groups = groups_of(config, params)
    assert set(groups) == set(tree.flatten(params))
    assert set(groups.values()) == {group for _, group in group_table(config)}
    assert set(groups.values()) <= set(GROUPS)


@pytest.mark.parametrize(
    ("stage", "model", "expected"),
    [
        ("S1.1", "tiny_mono", VISUAL),
        ("S1.2", "tiny_mono", VISUAL),
        ("S1.3", "tiny_mono", VISUAL | {"attention"}),
        ("S2", "tiny_mono", VISUAL | {"attention", "text_experts", "norms", "token_embeddings"}),
        ("S0", "tiny_lm", {"attention", "text_experts", "norms", "token_embeddings"}),
        ("S1.1++", "tiny_mono_1_5", VISUAL | {"visual_attention"}),
        ("S1.2++", "tiny_mono_1_5", VISUAL | {"visual_attention"}),
        ("S1.3++", "tiny_mono_1_5", VISUAL | {"visual_attention", "attention"}),
        ("delta", "tiny_mono", VISUAL),
        ("S1.3-frozen-attention", "tiny_mono", VISUAL),
        ("full", "tiny_lm", {"attention", "text_experts", "norms", "token_embeddings"}),
        (
            "S2",
            "tiny_modular",
            {"visual_embedding", "visual_encoder", "attention", "text_experts", "norms", "token_embeddings"},
        ),
    ],
)
def test_what_trains(stage: str, model: str, expected: set[str]):
    config = preset(model)
    assert trained_groups(get_stage(stage), config) == expected
    params = Model(config).abstract_params()
    trainable, frozen = split(get_stage(stage), config, params)
    groups = groups_of(config, params)
    assert {groups[path] for path in tree.flatten(trainable)} == expected
    assert not {groups[path] for path in tree.flatten(frozen)} & expected
    assert jax.tree.structure(tree.merge(trainable, frozen)) == jax.tree.structure(params)


def test_s1_1_of_the_2b_model_trains_the_published_experts():
    config = preset("mono_internvl_2b")
    trainable, frozen = split(get_stage("S1.1"), config, Model(config).abstract_params())
    count = {path: leaf.size for path, leaf in tree.flatten(trainable).items()}
    assert sum(size for path, size in count.items() if "visual_feed_forward" in path) == 24 * 3 * 2048 * 8192
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen)) == 1_889_110_016 + 9 * 2 * 2048  # InternLM2 + 9 tokens


def test_a_stage_whose_groups_the_model_lacks_is_refused():
    with pytest.raises(ConfigError, match="visual_attention"):
        trained_groups(get_stage("S1.1++"), preset("tiny_mono"))
    with pytest.raises(ConfigError, match="visual experts"):
        trained_groups(get_stage("S1.1"), preset("tiny_modular"))


@pytest.mark.parametrize("trains", [("attention", "attention/wqkv[:1]"), ("attention/wqkv[:1]", "attention")])
def test_a_group_that_trains_wholly_is_not_cut_by_a_range_of_it(trains: tuple[str, ...]):
    config = preset("tiny_mono")
    stage = dataclasses.replace(get_stage("S2"), trains=trains)
    trainable, _ = split(stage, config, Model(config).abstract_params())
    assert set(tree.flatten(trainable)) == {"layers/attention/wqkv/kernel", "layers/attention/wo/kernel"}
