"""Writes the README's tables of accelerator measurements from the committed results.

  python -m experiments.benchmarks.published

Reads experiments/benchmarks/results/: train_step_*.json (a list of reports written by ``train_step.py --out``) and
first_token_*.json (``first_token.py --out``). The kernels' tables are those of ``kernels --readme``.
"""

from __future__ import annotations

from pathlib import Path

from experiments.benchmarks.tables import fill, section
from mono_jax import cli

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- measured on accelerators -->", "<!-- end of measured -->"


def main(argv: list[str] | None = None) -> None:
    cli.parser(__doc__).parse_args(argv)
    fill(README, BEGIN, END, section())


if __name__ == "__main__":
    cli.run(main)
