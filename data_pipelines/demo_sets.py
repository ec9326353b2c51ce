"""Builds the demo sets: small data sets on which every stage can be trained and evaluated.

They are made from real data that pip can fetch. A second run keeps what is already built and resumes what was
interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_pipelines import cli
from data_pipelines.recipes import demo
from data_pipelines.recipes.demo.sizes import DemoSizes


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; ``arguments`` are the command-line arguments (None = ``sys.argv``)."""
    example = "example: python -m data_pipelines.demo_sets --out=runs/demo/data --s2=12000"
    parser = cli.parser("demo_sets", f"{__doc__}\n{demo.__doc__}", example)
    parser.add_argument("--out", required=True, help="folder of the sets, for example runs/demo/data")
    parser.add_argument("--seed", type=int, default=0, help="seed of every picture, text and split (default 0)")
    for field in dataclasses.fields(DemoSizes):
        unit = "bytes of prose" if field.name == "text_bytes" else f"samples of {field.name}"
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, metavar="N", help=f"{unit} (default {field.default})"
        )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that draw pictures (default 1)")
    options = parser.parse_args(arguments)
    sizes = DemoSizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(DemoSizes)})
    from data_pipelines.recipes.demo.sets import build_demo_sets

    manifest = build_demo_sets(options.out, seed=options.seed, sizes=sizes, workers=options.workers, progress=print)
    if options.json:
        cli.json_line(manifest)


if __name__ == "__main__":
    cli.run(main)
