"""The known families. To add one: a ``Family``, its name in ``Architecture.family``, and a golden case."""

from __future__ import annotations

from mono_jax.models.architecture import Architecture
from mono_jax.weights.families.family import Family
from mono_jax.weights.families.gemma3 import GEMMA3
from mono_jax.weights.families.internlm2 import INTERNLM2
from mono_jax.weights.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES: dict[str, Family] = {family.name: family for family in (INTERNLM2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3)}
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES.values()}
# Name of an architecture -> family, whether it has visual FFNs, and visual QKVs.
ARCHITECTURES = {
    family.architecture_with(ffn, attention): (family, ffn, attention)
    for family in FAMILIES.values()
    for ffn, attention in ((False, False), (True, False), (True, True))
}


def family_of(config: Architecture) -> Family:
    return FAMILIES[config.family]
