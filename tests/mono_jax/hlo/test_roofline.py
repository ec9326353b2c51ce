"""The bound of small schedules, by hand: peak 100 FLOP/s, 10 bytes/s of HBM, 2 bytes/s of network."""

from __future__ import annotations

import dataclasses

import pytest

from mono_jax.hlo.roofline import Machine, Totals, Work, totals

MACHINE = Machine(peak=100.0, bandwidth=10.0, collective_seconds=lambda c: sum(c.wire_bytes.values()) / 2.0)
# A dot of 2 * 4 * 5 * 5 = 200 FLOPs on operands in scratch memory: 2 s, and 4 * 5 bytes written: 2 s of HBM.
DOT = "s8[4,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
HEADER = """  %a = s8[4,5]{1,0:S(1)} parameter(0)
  %b = s8[5,5]{1,0:S(1)} parameter(1)
  %g = s8[8]{0:S(1)} parameter(2)
"""
GATHER = "(s8[8]{0:S(1)}, s8[16]{0:S(1)}) all-gather-start(%g), replica_groups={{0,1}}, dimensions={0}"  # 8 bytes: 4 s


def bound(lines: str, others: str = "", machine: Machine = MACHINE, **options: object) -> Totals:
    text = f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main () -> s8[4] {{\n{HEADER}{lines}\n}}\n"
    return totals(text, machine, **options)


def test_an_operation_takes_the_slower_of_its_two_rates():
    assert bound(f"  ROOT %r = {DOT}").seconds == 2.0
    slow = bound(f"  ROOT %r = {DOT}".replace("s8[4,5]", "f32[4,5]"))
    assert (slow.seconds, slow.compute_s, slow.memory_s) == (8.0, 2.0, 8.0)


def test_products_reach_a_share_of_the_peak_and_kernels_their_own():
    machine = dataclasses.replace(MACHINE, products=0.5)
    found = bound(f"  ROOT %r = {DOT}", machine=machine)
    assert (found.seconds, found.compute_s, found.memory_s) == (4.0, 4.0, 2.0)
    kernel = '  ROOT %k = s8[4]{0:S(1)} custom-call(%a), custom_call_target="tpu_custom_call"'
    assert bound(kernel, machine=machine, kernels=lambda *_: Work(200.0, 0.0, efficiency=0.25)).seconds == 8.0


@pytest.mark.parametrize(("between", "exposed"), [(0, 4.0), (1, 2.0), (2, 0.0), (3, 0.0)])
def test_what_runs_between_start_and_end_hides_a_collective(between: int, exposed: float):
    work = "".join(f"  %r{i} = {DOT}\n" for i in range(between))
    found = bound(f"  %s = {GATHER}\n{work}  ROOT %d = s8[16]{{0:S(1)}} all-gather-done(%s)")
    assert found.exposed_collective_s == exposed
    assert found.seconds == 2.0 * between + exposed
    assert found.collective_s == 4.0
    assert found.collectives == {("all-gather", "s8"): [1, 8.0]}


def test_two_transfers_share_the_network_and_a_synchronous_one_is_exposed():
    lines = f"""  %s = {GATHER}
  %t = {GATHER}
  %r0 = {DOT}
  %d = s8[16]{{0:S(1)}} all-gather-done(%s)
  %e = s8[16]{{0:S(1)}} all-gather-done(%t)
"""
    assert bound(lines + f"  ROOT %r1 = {DOT}").exposed_collective_s == 8.0 - 2.0
    reduce = "  ROOT %x = s8[8]{0:S(1)} all-reduce(%g), replica_groups={{0,1}}, to_apply=%add"  # 8 bytes: 4 s
    assert bound(lines + reduce).exposed_collective_s == 8.0 - 2.0 + 4.0


def test_copies_run_beside_the_operations():
    lines = f"""  %c = (s8[40]{{0:S(1)}}, s8[40]{{0}}, u32[]) copy-start(%h)
  %r0 = {DOT}
  ROOT %d = s8[40]{{0:S(1)}} copy-done(%c)"""
    found = bound("  %h = s8[40]{0} parameter(3)\n" + lines)
    assert (found.seconds, found.exposed_copy_s, found.memory_s) == (4.0, 2.0, 6.0)


PARTS = f"""%starts (p0: s8[8]) -> (s8[8], s8[16]) {{
  %p0 = s8[8]{{0:S(1)}} parameter(0)
  %all-gather.1 = s8[16]{{0}} all-gather(%p0), channel_id=7, replica_groups=mesh['x'=2] {{'x'}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"-1"}}}}
  ROOT %c1 = (s8[8]{{0:S(1)}}, s8[16]{{0:S(1)}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%computes (q0: s8[8], q1: s8[16], q2: s8[4,5], q3: s8[5,5]) -> (s8[4,5], s8[8], s8[16]) {{
  %q0 = s8[8]{{0:S(1)}} parameter(0)
  %q1 = s8[16]{{0:S(1)}} parameter(1)
  %q2 = s8[4,5]{{1,0:S(1)}} parameter(2)
  %q3 = s8[5,5]{{1,0:S(1)}} parameter(3)
  %all-gather.2 = s8[16]{{0}} all-gather(%q0), channel_id=7, replica_groups=mesh['x'=2] {{'x'}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  %r = {DOT.replace("%a", "%q2").replace("%b", "%q3")}
  ROOT %c2 = (s8[4,5]{{1,0}}, s8[8]{{0:S(1)}}, s8[16]{{0:S(1)}}) tuple(%r, %q0, %q1)
}}

%ends (e0: s8[8], e1: s8[16]) -> s8[16] {{
  %e0 = s8[8]{{0:S(1)}} parameter(0)
  %e1 = s8[16]{{0:S(1)}} parameter(1)
  %all-gather.3 = s8[16]{{0}} all-gather(%e0), channel_id=7, replica_groups=mesh['x'=2] {{'x'}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %c3 = s8[16]{{0:S(1)}} custom-call(%e0, %e1, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_gather_spread_over_fusions_counts_once():
    lines = """  %s = (s8[8]{0:S(1)}, s8[16]{0:S(1)}) fusion(%g), kind=kCustom, calls=%starts
  %x = s8[8]{0:S(1)} get-tuple-element(%s), index=0
  %y = s8[16]{0:S(1)} get-tuple-element(%s), index=1
  %f = (s8[4,5]{1,0}, s8[8]{0:S(1)}, s8[16]{0:S(1)}) fusion(%x, %y, %a, %b), kind=kOutput, calls=%computes
  ROOT %d = s8[16]{0:S(1)} fusion(%x, %y), kind=kCustom, calls=%ends"""
    found = bound(lines, PARTS)
    assert found.collectives == {("all-gather", "s8"): [1, 8.0]}
    assert (found.seconds, found.exposed_collective_s, found.flops) == (4.0, 2.0, 200.0)


def test_a_kernel_s_work_is_what_it_or_the_caller_says():
    line = '  ROOT %k = s8[4]{0:S(1)} custom-call(%a), custom_call_target="tpu_custom_call"'
    assert bound(line).silent_kernels == ["k"]
    said = bound(line + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"300"}}}')
    assert (said.seconds, said.silent_kernels) == (3.0, [])
    known = bound(line, kernels=lambda computation, instruction: Work(200.0, 0.0, efficiency=0.25))
    assert (known.flops, known.seconds, known.silent_kernels) == (200.0, 8.0, [])


def test_of_branches_the_slowest_counts_or_the_fastest():
    """Of a kernel for the usual rows and a slow form for other rows, only one is run."""
    branches = "".join(
        f"%branch{count} (p: (s8[4,5], s8[5,5])) -> s8[4,5] {{\n"
        "  %p = (s8[4,5]{1,0:S(1)}, s8[5,5]{1,0:S(1)}) parameter(0)\n"
        "  %a = s8[4,5]{1,0:S(1)} get-tuple-element(%p), index=0\n"
        "  %b = s8[5,5]{1,0:S(1)} get-tuple-element(%p), index=1\n"
        + "".join(f"  %r{i} = {DOT}\n" for i in range(count))
        + f"  ROOT %r = {DOT}\n}}\n\n"
        for count in (0, 2)
    )
    lines = """  %i = s32[]{:S(1)} parameter(3)
  %t = (s8[4,5]{1,0:S(1)}, s8[5,5]{1,0:S(1)}) tuple(%a, %b)
  ROOT %c = s8[4,5]{1,0} conditional(%i, %t, %t), branch_computations={%branch0, %branch2}"""
    found = bound(lines, branches)
    assert (found.seconds, found.flops) == (6.0, 600.0)
    found = bound(lines, branches, branch=min)
    assert (found.seconds, found.flops) == (2.0, 200.0)
