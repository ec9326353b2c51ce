"""Splash, in Pallas's interpreter where there is no TPU."""

from __future__ import annotations

from pallas_kernels.attention.backends.splash import Splash
from tests.pallas_kernels.attention.suite import Conformance


class TestSplash(Conformance):
    implementation_class = Splash
    takes_images = False
    takes_parts = False
