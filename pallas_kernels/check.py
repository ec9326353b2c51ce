"""Checks every implementation of the grouped matmuls and of packed attention as far as this machine allows.

Values and gradients are compared with a float64 oracle: on the accelerator if there is one, otherwise interpreted.
Then the kernels are compiled, with the real compilers, for chips that need not be present:

    TPU v5e, v5p, v6e     pip install libtpu
    H200, Triton          pip install triton
    H200, Mosaic GPU      pip install 'jax[cuda13]' (large; best in a separate environment)

    python -m pallas_kernels.check                     all implementations, a table
    python -m pallas_kernels.check --json              ... and one JSON object as the last line
    python -m pallas_kernels.check pallas_tpu --masks=all
    python -m pallas_kernels.check triton --no_compile

The JSON object has one entry per implementation: {"correct", "max_rel_error" (in float32 if supported, else in
bfloat16), "errors" (per dtype), "cases" (what was computed), "compiled_for", "skipped" (why no values were computed, or
null), "not_compiled" (target: reason), "failed" (what went wrong, one line each), "compiled" (facts per compilation)}.
The exit status is 1 if anything that could be run failed.
"""

from __future__ import annotations

import argparse
import sys

from pallas_kernels.registry import IMPLEMENTATIONS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMPLEMENTATIONS)} (default: all)")
    parser.add_argument("--masks", choices=["quick", "all"], default="quick", help="how many layouts (default: quick)")
    seconds = "start no new case of an implementation and dtype after this time; interpreters are slow (default: 60)"
    parser.add_argument("--seconds", type=float, default=60.0, help=seconds)
    parser.add_argument("--no_compile", action="store_true", help="values only")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in IMPLEMENTATIONS]:
        print(f"error: no implementation {unknown[0]!r}; there are {', '.join(IMPLEMENTATIONS)}", file=sys.stderr)
        return 2

    from pallas_kernels.checks import run

    return run.run(
        options.names or list(IMPLEMENTATIONS),
        all_masks=options.masks == "all",
        seconds=options.seconds,
        compile_ahead=not options.no_compile,
        as_json=options.json,
    )


if __name__ == "__main__":
    sys.exit(main())
