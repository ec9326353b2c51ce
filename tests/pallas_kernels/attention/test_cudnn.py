"""cuDNN's kernels, where there is a GPU."""

from __future__ import annotations

from pallas_kernels.attention.backends.cudnn import Cudnn
from tests.pallas_kernels.attention.suite import Conformance


class TestCudnn(Conformance):
    implementation_class = Cudnn
    dtypes = ("bfloat16",)
