"""Shapes, loops, groups, FLOPs and bytes from the text of a module, each compared with a count by hand."""

from __future__ import annotations

import pytest

from mono_jax.hlo import collectives, loops, shapes, traffic, work
from mono_jax.hlo.module import Module, read


def module(entry: str, others: str = "") -> Module:
    return read(f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main () -> f32[] {{\n{entry}\n}}\n")


@pytest.mark.parametrize(
    ("text", "size", "stored", "space"),
    [
        ("f32[]", 4, 4, 0),
        ("bf16[3,5]{1,0}", 30, 30, 0),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30, 2 * 8 * 128, 1),
        ("bf16[3,5]{0,1:T(8,128)(2,1)}", 30, 2 * 8 * 128, 0),  # padded along the minor dimensions: 5 -> 8, 3 -> 128
        ("f32[2,130,9]{2,1,0:T(8,128)}", 2 * 130 * 9 * 4, 2 * 136 * 128 * 4, 0),
        ("pred[7]{0:T(512)}", 7, 512, 0),
        ("s4[9]{0}", 5, 5, 0),
        ("f8e4m3fn[16]", 16, 16, 0),
        ("token[]", 0, 0, 0),
    ],
)
def test_bytes_of_a_shape(text: str, size: int, stored: int, space: int):
    array = shapes.parse(text)
    assert (array.bytes, array.stored_bytes, array.space) == (size, stored, space)


def test_a_tuple_of_shapes():
    found = shapes.parse("(s32[]{:T(128)}, /*index=1*/(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, pred[4]))")
    assert [array.dims for array in shapes.arrays(found)] == [(), (2, 3), (4,)]
    with pytest.raises(ValueError, match="not a shape"):
        shapes.parse("nonsense")


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="no ENTRY"):
        read("something else")


def test_attributes_with_line_breaks_and_brackets():
    text = """  %p = f32[8]{0} parameter(0)
  ROOT %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, backend_config={"custom_call_config":{"body":"x}{","cost_estimate":{"flops":"12","bytes_accessed":"3"}}}"""
    found = module(text)
    kernel = found.entry.root
    assert work.is_kernel(kernel)
    assert work.flops(found, found.entry, kernel) == 12
    assert work.estimate(kernel) == {"flops": 12, "bytes_accessed": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", ((0, 2), (1, 3))),
        ("replica_groups={}", ()),
        ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['x'=4] {'x'}, dimensions={1}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=2,'y'=3] {'x'}", ((0, 3), (1, 4), (2, 5))),
        ("replica_groups=mesh['x'=2,'y'=3] {'y'}", ((0, 1, 2), (3, 4, 5))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("channel_id=1, source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,2},{2,3}}", ((0, 1, 2, 3),)),
    ],
)
def test_groups_in_every_notation(text: str, expected: collectives.Groups):
    assert collectives.groups(text) == expected


LOOP = """%body (p: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {
  %p = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[4] get-tuple-element(%p), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], s32[], f32[4]) tuple(%next, %n, %x)
}

%cond (p: (s32[], s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], s32[], f32[4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}
"""


@pytest.mark.parametrize(("read", "kind"), [("%s0, %s1", "reduce-scatter"), ("%s0, %g1", "all-reduce")])
def test_a_sum_of_several_arrays_is_scattered_where_only_slices_of_all_are_read(read: str, kind: str):
    """As XLA:TPU writes the weight gradients of a layer."""
    inner = f"""%fused (a: bf16[8,4], b: bf16[8,4]) -> (bf16[4,4], bf16[4,4]) {{
  %a = bf16[8,4]{{1,0}} parameter(0)
  %b = bf16[8,4]{{1,0}} parameter(1)
  %sum = (bf16[8,4]{{1,0}}, bf16[8,4]{{1,0}}) all-reduce(%a, %b), replica_groups={{{{0,1}}}}, to_apply=%add
  %zero = s32[] constant(0)
  %g0 = bf16[8,4]{{1,0}} get-tuple-element(%sum), index=0
  %g1 = bf16[8,4]{{1,0}} get-tuple-element(%sum), index=1
  %s0 = bf16[4,4]{{1,0}} dynamic-slice(%g0, %zero, %zero), dynamic_slice_sizes={{4,4}}
  %s1 = bf16[4,4]{{1,0}} dynamic-slice(%g1, %zero, %zero), dynamic_slice_sizes={{4,4}}
  ROOT %t = (bf16[4,4]{{1,0}}, bf16[4,4]{{1,0}}) tuple({read})
}}
"""
    entry = """  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %f = (bf16[4,4]{1,0}, bf16[4,4]{1,0}) fusion(%p, %p), kind=kCustom, calls=%fused"""
    found = module(entry, inner)
    collective = collectives.started(found, found.entry, found.entry.root)
    assert (collective.kind, collective.dtypes, collective.devices) == (kind, (("bf16", 128),), 2)


def test_a_limit_that_comes_through_the_tuple():
    text = """  %zero = s32[] constant(1)
  %limit = s32[] constant(8)
  %copied = s32[] copy(%limit)
  %x = f32[4] parameter(0)
  %start = (s32[], s32[], f32[4]) tuple(%zero, %copied, %x)
  ROOT %w = (s32[], s32[], f32[4]) while(%start), condition=%cond, body=%body"""
    assert loops.loops(module(text, LOOP)) == {"w": 4}  # 1, 3, 5, 7
    unknown = text.replace("constant(8)", "parameter(1)")
    assert loops.loops(module(unknown, LOOP)) == {"w": None}
    known = text + ', backend_config={"known_trip_count":{"n":"11"}}'
    assert loops.loops(module(known, LOOP)) == {"w": 11}


def test_a_loop_that_never_ends_is_unknown():
    text = """  %one = s32[] constant(1)
  %x = f32[4] parameter(0)
  %start = (s32[], s32[], f32[4]) tuple(%one, %one, %x)
  ROOT %w = (s32[], s32[], f32[4]) while(%start), condition=%cond, body=%body"""
    stuck = LOOP.replace("constant(2)", "constant(0)").replace("direction=LT", "direction=LE")
    assert loops.loops(module(text, stuck)) == {"w": None}


@pytest.mark.parametrize(
    ("operation", "flops"),
    [
        ("f32[4,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 8 * 16),
        ("f32[4,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf", 2 * 4 * 8 * 16),
        # One position of the window reads the image, the others padding: a dot of two dimensions.
        (
            "f32[4,6,5]{2,1,0} convolution(%c, %d), window={size=6 pad=5_5 rhs_reversal=1}, dim_labels=b0f_0io->b0f",
            2 * 4 * 6 * 5 * 3,
        ),
        # A stride of two, and padding on one side: outputs 0, 1, 2 read 2, 3 and 3 of 5 positions.
        (
            "f32[4,3,5]{2,1,0} convolution(%e, %f), window={size=3 stride=2 pad=1_0}, dim_labels=b0f_0io->b0f",
            2 * 4 * 5 * 3 * (2 + 3 + 2),
        ),
        (
            '(f32[4,8]{1,0}, s8[9]) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            2 * 4 * 8 * 16,
        ),
        ("f32[4,16]{1,0} add(%a, %a)", 0),
    ],
)
def test_flops_of_an_instruction(operation: str, flops: int):
    text = f"""  %a = f32[4,16]{{1,0}} parameter(0)
  %b = f32[16,8]{{1,0}} parameter(1)
  %c = f32[4,1,3]{{2,1,0}} parameter(2)
  %d = f32[6,3,5]{{2,1,0}} parameter(3)
  %e = f32[4,5,3]{{2,1,0}} parameter(4)
  %f = f32[3,3,5]{{2,1,0}} parameter(5)
  ROOT %r = {operation}"""
    found = module(text)
    assert work.flops(found, found.entry, found.entry.root) == flops


FUSIONS = """%slices (p0: f32[24,8,128], p1: s32[], p2: f32[8,128]) -> f32[8,128] {
  %p0 = f32[24,8,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[8,128]{1,0:S(1)} parameter(2)
  %z = s32[] constant(0)
  %s = f32[1,8,128]{2,1,0} dynamic-slice(%p0, %p1, %z, %z), dynamic_slice_sizes={1,8,128}
  %v = f32[8,128]{1,0} bitcast(%s)
  ROOT %r = f32[8,128]{1,0} add(%v, %p2)
}

%updates (q0: f32[24,8,128], q1: f32[1,8,128], q2: s32[]) -> f32[24,8,128] {
  %q0 = f32[24,8,128]{2,1,0} parameter(0)
  %q1 = f32[1,8,128]{2,1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %z.1 = s32[] constant(0)
  ROOT %u = f32[24,8,128]{2,1,0} dynamic-update-slice(%q0, %q1, %q2, %z.1, %z.1)
}

%scatters (t0: f32[24,8,128], t1: f32[1,8,128], t2: s32[]) -> f32[24,8,128] {
  %t0 = f32[24,8,128]{2,1,0} parameter(0)
  %t1 = f32[1,8,128]{2,1,0} parameter(1)
  %t2 = s32[] parameter(2)
  %n = s32[1,1]{1,0} bitcast(%t2)
  %z.2 = f32[1,8,128]{2,1,0} negate(%t1)
  ROOT %x = f32[24,8,128]{2,1,0} scatter(%t0, %n, %z.2), update_window_dims={1,2}, to_apply=%last
}
"""
LAYER = 8 * 128 * 4


@pytest.mark.parametrize(
    ("operation", "moved"),
    [
        ("f32[8,128]{1,0} fusion(%stack, %i, %vmem), kind=kLoop, calls=%slices", 2 * LAYER + 4),  # one layer of 24
        ("f32[8,128]{1,0:S(1)} fusion(%stack, %i, %vmem), kind=kLoop, calls=%slices", LAYER + 4),
        ("f32[24,8,128]{2,1,0} fusion(%stack, %one, %i), kind=kLoop, calls=%updates", 2 * LAYER + 4),
        ("f32[24,8,128]{2,1,0} fusion(%stack, %one, %i), kind=kInput, calls=%scatters", 2 * LAYER + 4),
        ("f32[24,8,128]{2,1,0} dynamic-update-slice(%stack, %one, %i, %i, %i)", 2 * LAYER),
        ("f32[24,8,128]{2,1,0} scatter(%stack, %i, %one), to_apply=%last", 2 * LAYER),
        ("f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,8,128}", 2 * LAYER + 12),
        ("f32[24,8,128]{2,1,0} copy(%stack)", 48 * LAYER),
        ("f32[24,1024]{1,0} bitcast(%stack)", 0),
        ("(f32[1,8,128]{2,1,0:S(1)}, f32[1,8,128]{2,1,0}, u32[]) copy-start(%one)", LAYER),
    ],
)
def test_bytes_of_an_instruction(operation: str, moved: int):
    text = f"""  %stack = f32[24,8,128]{{2,1,0}} parameter(0)
  %one = f32[1,8,128]{{2,1,0}} parameter(1)
  %i = s32[] parameter(2)
  %vmem = f32[8,128]{{1,0:S(1)}} parameter(3)
  ROOT %r = {operation}"""
    found = module(text, FUSIONS)
    assert traffic.hbm_bytes(found, found.entry, found.entry.root) == moved
