"""python -m pallas_kernels.check: what works is found correct, what does not is reported, nothing is hidden."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import jax.numpy as jnp

from pallas_kernels import check as command
from pallas_kernels.checks import run as checking
from pallas_kernels.checks.aot import AotCheck
from pallas_kernels.errors import Unavailable
from pallas_kernels.experts.backends.xla import DenseBoth

KEYS = {"correct", "max_rel_error", "compiled_for", "skipped"}


def test_a_correct_implementation(capsys):
    assert command.main(["dense_both", "--no_compile", "--json", "--seconds=0"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["dense_both"]
    assert result.keys() >= KEYS
    assert result["correct"] and result["skipped"] is None and result["compiled_for"] == []
    assert 0 < result["max_rel_error"] == result["errors"]["float32"] < 5e-6
    assert result["cases"][0] == "ffn padding_among_rows float32"


@dataclasses.dataclass(frozen=True)
class Wrong(DenseBoth):
    """Drops the sign of the text expert's weight gradients."""

    name: ClassVar[str] = "wrong"

    def weight_gradient(self, x, dy, block_expert, expert, *, block, out_dtype):
        dw = super().weight_gradient(x, dy, block_expert, expert, block=block, out_dtype=out_dtype)
        return jnp.abs(dw) if expert == 0 else dw


def compilations(name: str) -> list[AotCheck]:
    def absent():
        raise Unavailable("no such compiler")

    def broken():
        raise RuntimeError("12 bytes spilled")

    checks = {"absent": absent, "broken": broken, "fine": lambda: {"registers": 7}}
    return [AotCheck(target, "ffn", run) for target, run in checks.items()]


def test_a_wrong_implementation_fails(monkeypatch, capsys):
    """... and of its compilers one is absent, one broken and one fine."""
    monkeypatch.setattr(checking, "implementation_class", lambda name: Wrong)
    monkeypatch.setattr(checking, "aot_checks", compilations)
    assert command.main(["dense_both", "--json", "--seconds=0"]) == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["dense_both"]
    assert not result["correct"] and result["max_rel_error"] > 0.1
    assert result["compiled_for"] == ["fine"] and result["not_compiled"] == {"absent": "no such compiler"}
    assert [failure.split(":")[0] for failure in result["failed"]] == ["float32", "bfloat16", "broken"]


def test_an_absent_implementation_is_skipped_with_its_reason(monkeypatch):
    def absent(name):
        raise Unavailable("needs another machine")

    monkeypatch.setattr(checking, "implementation_class", absent)
    result = checking.check("mosaic_gpu")
    assert result["skipped"] == "needs another machine" and not result["correct"] and not result["failed"]


def test_unknown_name(capsys):
    assert command.main(["pallas_tpo"]) == 2
    assert capsys.readouterr().err.startswith("error: no implementation 'pallas_tpo'; there are xla_split")
