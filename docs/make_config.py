"""Writes docs/config.md, the reference of all config keys, from their dataclasses.

python docs/make_config.py
"""

from __future__ import annotations

from pathlib import Path

from mono_jax.runs import reference


def main() -> None:
    (Path(__file__).parent / "config.md").write_text(reference.document(), encoding="utf-8")


if __name__ == "__main__":
    main()
