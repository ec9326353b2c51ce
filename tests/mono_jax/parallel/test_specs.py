"""The sharding table, path by path: sizes do not distinguish columns from rows."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mono_jax import tree
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.parallel import mesh as mesh_lib
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.parallel.specs import like_params, param_shardings

COLUMNS, ROWS, WHOLE = P(None, "fsdp", "tensor"), P(None, ("tensor", "fsdp")), P()
LANGUAGE = {
    "embed/embedding": P(None, ("tensor", "fsdp")),
    "lm_head/kernel": P(("fsdp", "tensor")),
    "final_norm/scale": WHOLE,
    "layers/attention_norm/scale": WHOLE,
    "layers/ffn_norm/scale": WHOLE,
    "layers/attention/wqkv/kernel": COLUMNS,  # its columns are heads
    "layers/attention/wo/kernel": ROWS,
    "layers/feed_forward/gate/kernel": COLUMNS,
    "layers/feed_forward/up/kernel": COLUMNS,
    "layers/feed_forward/down/kernel": ROWS,
}
VISUAL = {
    "layers/visual_feed_forward/gate/kernel": COLUMNS,
    "layers/visual_feed_forward/up/kernel": COLUMNS,
    "layers/visual_feed_forward/down/kernel": ROWS,
}
ATTENTION = {"layers/visual_attention/wqkv/kernel": COLUMNS}
BIASES = {
    "layers/attention/wqkv/bias": P(None, "tensor"),
    "layers/visual_attention/wqkv/bias": P(None, "tensor"),
    "layers/attention/wo/bias": WHOLE,
}
PROJECTOR = {
    "projector/fc1/kernel": P("fsdp", "tensor"),
    "projector/fc2/kernel": P(("tensor", "fsdp")),
    **dict.fromkeys((f"projector/{name}" for name in ("norm/scale", "norm/bias", "fc1/bias", "fc2/bias")), WHOLE),
    **dict.fromkeys((f"vision/patch_embedding/{name}" for name in ("kernel", "bias")), WHOLE),
    **dict.fromkeys((f"vision/{name}_embedding" for name in ("class", "position")), WHOLE),
}
ENCODER = {
    "vision/layers/attn/qkv/kernel": COLUMNS,
    "vision/layers/attn/proj/kernel": ROWS,
    "vision/layers/mlp/fc1/kernel": COLUMNS,
    "vision/layers/mlp/fc2/kernel": ROWS,
    **dict.fromkeys((f"vision/layers/{name}/bias" for name in ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")), WHOLE),
    **dict.fromkeys((f"vision/layers/norm{n}/{name}" for n in (1, 2) for name in ("scale", "bias")), WHOLE),
    **dict.fromkeys((f"vision/layers/ls{n}/scale" for n in (1, 2)), WHOLE),
}


def mesh(data: int = 2, fsdp: int = 2, tensor: int = 2, context: int = 1) -> jax.sharding.Mesh:
    devices = jax.devices()[: data * fsdp * tensor * context]
    return mesh_lib.make_mesh(MeshConfig(data, fsdp, tensor, context), devices)


def specs(name: str, changes: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, P]:
    config = preset(name, **changes)
    placed = param_shardings(config, Model(config).abstract_params(), mesh)
    return {path: place.spec for path, place in tree.flatten(placed).items()}


def padded(found: dict[str, P], expected: dict[str, P]) -> None:
    """Equal, except for trailing Nones."""
    assert found.keys() == expected.keys()
    for path, spec in found.items():
        assert tuple(spec) == tuple(expected[path]) + (None,) * (len(spec) - len(expected[path])), path


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("tiny_lm", {}, LANGUAGE),
        ("tiny_lm", {"tie_word_embeddings": True}, {k: v for k, v in LANGUAGE.items() if k != "lm_head/kernel"}),
        ("tiny_mono", {}, LANGUAGE | VISUAL | PROJECTOR),
        ("tiny_mono_1_5", {"bias": True}, LANGUAGE | VISUAL | ATTENTION | BIASES | PROJECTOR),
        ("tiny_modular", {}, LANGUAGE | PROJECTOR | ENCODER),
    ],
    ids=("tiny_lm", "tied", "tiny_mono", "tiny_mono_1_5 with biases", "tiny_modular"),
)
def test_every_parameter_is_split_as_the_table_says(name: str, changes: dict[str, Any], expected: dict[str, P]):
    padded(specs(name, changes, mesh()), expected)


@pytest.mark.parametrize(
    ("intermediate", "axes", "expected"),
    [
        (96, (1, 4, 2), ("tensor", "fsdp")),
        (96, (1, 2, 2, 2), ("tensor", "fsdp", "context")),
        (98, (1, 4, 2), "tensor"),  # 49 rows are left of each half
        (99, (1, 3, 2), "fsdp"),
        (97, (1, 4, 2), None),
    ],
)
def test_an_axis_that_does_not_divide_a_dimension_is_dropped_there(intermediate: int, axes: tuple, expected: Any):
    found = specs("tiny_mono", {"intermediate_size": intermediate}, mesh(*axes))
    assert found["layers/feed_forward/down/kernel"][1] == expected


def test_an_odd_vocabulary_is_split_all_the_same():
    found = specs("tiny_mono", {"vocab_size": 129}, mesh())
    assert found["embed/embedding"] == P(None, ("tensor", "fsdp")) and found["lm_head/kernel"][0] == ("fsdp", "tensor")


def test_devices_that_share_rows_share_the_parameters():
    found = specs("tiny_mono", {}, mesh(1, 2, 1, 4))
    assert found["layers/feed_forward/gate/kernel"][1] == found["lm_head/kernel"][0] == ("fsdp", "context")
    assert found["embed/embedding"] == P(None, ("context", "fsdp"))


def test_parameters_lie_alike_where_no_rows_are_shared():
    """Those of a run, for generation and evaluation on its mesh (the embedding's columns count in another order)."""
    shared = mesh(1, 2, 2, 2)
    config = preset("tiny_mono_1_5")
    abstract = Model(config).abstract_params()
    one, other = (tree.flatten(param_shardings(config, abstract, m)) for m in (shared, mesh_lib.unshared(shared)))
    assert mesh_lib.row_ways(mesh_lib.unshared(shared)) == 4
    for path, leaf in tree.flatten(abstract).items():
        assert one[path].is_equivalent_to(other[path], len(leaf.shape)) or path == "embed/embedding", path


def test_pieces_of_stacked_layers_are_split_like_the_whole():
    config = preset("tiny_mono")
    flat = tree.flatten(Model(config).abstract_params())
    whole = flat.pop("layers/feed_forward/down/kernel")
    piece = jax.ShapeDtypeStruct((1, *whole.shape[1:]), whole.dtype)
    cut = tree.unflatten(flat | {f"layers[{n}:{n + 1}]/feed_forward/down/kernel": piece for n in (0, 1)})
    placed = tree.flatten(param_shardings(config, cut, mesh()))
    assert placed["layers[0:1]/feed_forward/down/kernel"].spec == placed["layers[1:2]/feed_forward/down/kernel"].spec
    assert placed["layers[1:2]/feed_forward/down/kernel"].spec[1] == ROWS[1]


def test_states_are_laid_out_like_their_parameters():
    """Only if both path and shape match; everything else is replicated."""
    params = {"a": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}}
    place = jax.sharding.NamedSharding(mesh(), P("fsdp", "tensor"))
    state = {
        "mu": params,
        "row": {"a": {"kernel": jax.ShapeDtypeStruct((4,), "float32")}},
        "other": {"b": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")}},
        "count": jax.ShapeDtypeStruct((), "int32"),
    }
    found = like_params(state, params, {"a": {"kernel": place}}, mesh())
    assert found["mu"]["a"]["kernel"] == place
    rest = found["row"]["a"]["kernel"], found["other"]["b"]["kernel"], found["count"]
    assert all(sharding.spec == P() for sharding in rest)
