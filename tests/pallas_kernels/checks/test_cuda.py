"""The GPU kernels compiled for an absent Hopper GPU: by Triton here, by XLA where the CUDA plugin is installed."""

from __future__ import annotations

import pytest

from pallas_kernels.checks import cuda as aot_cuda
from pallas_kernels.checks.aot import KERNEL_CALLS, AotCheck, kernel_calls
from pallas_kernels.errors import Unavailable

GOOD = {"registers": 168, "spill_bytes": 0, "shared_bytes": 229_440, "HGMMA": 4, "UTMALDG": 3, "warnings": []}


def launches() -> dict:
    pytest.importorskip("triton")
    return aot_cuda.triton_launches("2b")


@pytest.mark.parametrize("name", ["swiglu, saved", "swiglu", "down", "swiglu_backward", "dx", "weight_gradient"])
def test_triton_kernels(name: str):
    aot_cuda.require_good(name, aot_cuda.compile_launch(*launches()[name]), bulk_copies=False)


def test_a_kernel_that_spills_is_found():
    """Twice the accumulators for the same registers."""
    launch, inputs = launches()["swiglu_backward"]
    constants = tuple((key, 256 if key == "BLOCK_N" else value) for key, value in launch.constants)
    facts = aot_cuda.compile_launch(launch._replace(constants=constants), inputs)
    with pytest.raises(RuntimeError, match="spilled"):
        aot_cuda.require_good("swiglu_backward", facts, bulk_copies=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spilled"),
        ({"shared_bytes": 240_000}, "240000 bytes of shared memory"),
        ({"HGMMA": 0}, "no wgmma"),
        ({"UTMALDG": 0}, "no TMA"),
        ({"warnings": ["C7514"]}, "C7514"),
    ],
)
def test_faults_are_named(changes: dict, message: str):
    assert aot_cuda.require_good("kernel", GOOD, bulk_copies=True) == GOOD
    with pytest.raises(RuntimeError, match=message):
        aot_cuda.require_good("kernel", GOOD | changes, bulk_copies=True)


@pytest.mark.parametrize("check", [pytest.param(c, id=c.name) for c in aot_cuda.mosaic_checks()])
def test_mosaic_kernels(check: AotCheck):
    """Resources, instructions, warnings and the number of kernel calls; a frozen expert's are not in the program."""
    try:
        facts = check.run()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert facts["kernel_calls"] == KERNEL_CALLS["both" if "both" in check.name else "visual"]


@pytest.mark.parametrize("trained", KERNEL_CALLS)
def test_triton_on_a_mesh(trained: str):
    from pallas_kernels.experts.backends.triton import Triton

    try:
        compiled = aot_cuda.compile_for_h200(Triton(), trained, "2b", gpus=8)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert kernel_calls(compiled) == KERNEL_CALLS[trained]
