"""Builds the real sets: captioned pictures, questions about pictures, English text for every stage, language tasks.

They are made from packages in public registries.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines import cli
from data_pipelines.errors import DataError
from data_pipelines.recipes import real
from data_pipelines.recipes.real.catalogue import SETS


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ``arguments`` are the command-line arguments (None = ``sys.argv``)."""
    epilog = (
        "example: python -m data_pipelines.real_sets --out=real_data --sets=tuxpaint,detection,moby_dick\n"
        f"sets: {', '.join(f'{s.name} ({s.stage})' for s in SETS if not s.on_demand)}\n"
        f"only if named: {', '.join(f'{s.name} ({s.stage})' for s in SETS if s.on_demand)}"
    )
    parser = cli.parser("real_sets", f"{__doc__}\n{real.__doc__}", epilog)
    parser.add_argument("--out", required=True, help="folder of the sets, for example real_data")
    parser.add_argument("--sets", help="names of sets, separated by commas (default: all of the first list)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the composed samples (default 0)")
    parser.add_argument("--limit", type=int, help="maximum number of samples per set, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=8192, help="vocabulary size of the tokenizer (default 8192)")
    options = parser.parse_args(arguments)
    from data_pipelines.recipes.manifest import load_manifest
    from data_pipelines.recipes.real.sets import build_real_sets

    result = build_real_sets(
        options.out,
        sets=[name for name in options.sets.split(",") if name] if options.sets else None,
        seed=options.seed,
        limit=options.limit,
        vocabulary=options.vocabulary,
        progress=lambda line: print(line, flush=True),
    )
    if result["manifest"]:
        stages = load_manifest(options.out)["stages"]
        print("samples: " + ", ".join(f"{stage} {entry['samples']}" for stage, entry in stages.items()))
    if options.json:
        cli.json_line(result)
    if failed := result["failed"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise DataError(f"{len(failed)} of {len(failed) + len(result['sets'])} sets failed: {reasons}")


if __name__ == "__main__":
    cli.run(main)
