"""InternLM2, the language model of Mono-InternVL's public release."""

from __future__ import annotations

from mono_jax.weights.families.family import Family, Key
from mono_jax.weights.hf_section import Section

_LAYER = "model.layers.{n}."


class _InternLM2(Family):
    def refuse(self, section: Section) -> None:
        """InternLM2's code reads only the keys below."""


INTERNLM2 = _InternLM2(
    name="internlm2",
    title="InternLM2",
    model_type="internlm2",
    architecture="InternLM2ForCausalLM",
    tensors={
        "embed/embedding": "model.tok_embeddings.weight",
        "final_norm/scale": "model.norm.weight",
        "lm_head/kernel": "output.weight",
        "layers/attention_norm/scale": _LAYER + "attention_norm.weight",
        "layers/ffn_norm/scale": _LAYER + "ffn_norm.weight",
        "layers/attention/wqkv/kernel": _LAYER + "attention.wqkv.weight",
        "layers/attention/wqkv/bias": _LAYER + "attention.wqkv.bias",
        "layers/attention/wo/kernel": _LAYER + "attention.wo.weight",
        "layers/attention/wo/bias": _LAYER + "attention.wo.bias",
        "layers/visual_attention/wqkv/kernel": _LAYER + "attention.wqkv_ve.weight",
        "layers/visual_attention/wqkv/bias": _LAYER + "attention.wqkv_ve.bias",
        "layers/feed_forward/gate/kernel": _LAYER + "feed_forward.w1.weight",
        "layers/feed_forward/up/kernel": _LAYER + "feed_forward.w3.weight",
        "layers/feed_forward/down/kernel": _LAYER + "feed_forward.w2.weight",
        "layers/visual_feed_forward/gate/kernel": _LAYER + "feed_forward_ve.w1.weight",
        "layers/visual_feed_forward/up/kernel": _LAYER + "feed_forward_ve.w3.weight",
        "layers/visual_feed_forward/down/kernel": _LAYER + "feed_forward_ve.w2.weight",
    },
    keys={  # missing ones take the defaults of the public configuration
        "rms_norm_eps": Key("rms_norm_eps", float, 1e-6),
        "max_position_embeddings": Key("max_position_embeddings", int, 2048),
        "bias": Key("bias", bool, True),
        "tie_word_embeddings": Key("tie_word_embeddings", bool, False),
    },
    scalings=("linear", "dynamic"),
    head_dim=None,
)
