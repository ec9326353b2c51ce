"""Plants small faults in the core modules, one at a time, and counts those that no test notices.

    python -m tests.mutants                                     a sample of 60 faults
    python -m tests.mutants --module=mono_jax/models/rope --count=1000    all of one module
    make mutants MUTANTS="--count=200 --seed=1"

Faults: comparisons flipped or moved to equality, operators and min/max exchanged, "and" for "or", negations dropped,
numbers changed by one (floats doubled), the first two arguments swapped, another axis. All is done in a temporary copy
of the working tree. For each fault the mirrored test file of its module is run, then those named in
``rooms.FURTHER``, until one test fails. Outcomes are appended to the file of results; run again, the command resumes:
it only repeats survivors and what has changed. Faults that do no harm are listed, with the reason, in ``survivors.py``.

The exit code is 1 if fewer than ``--least`` of the faults are caught.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", action="append", help="file, folder or pattern; may be repeated (the core modules)")
    parser.add_argument("--count", type=int, default=60, help="faults at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (%(default)s)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the tests of a fault (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="run only the first test file of each module")
    parser.add_argument("--least", type=float, default=0.9, help="share that must be caught (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("runs/mutants.jsonl"), help="file (%(default)s)")
    parser.add_argument("--again", action="store_true", help="repeat what was caught earlier, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    from tests.mutants.run import run

    return run(options)


if __name__ == "__main__":
    raise SystemExit(main())
