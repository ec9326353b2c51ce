"""Measures how fast one core makes batches: the whole path from tar to packed rows, each of its steps, and a baseline.

All variants run in turns in one process on the same images, on one thread, and are timed by the CPU time that they use,
so that other work on the machine has little effect. Images are synthetic photographs (noise with the spectrum of
natural images) in JPEG, unless --shards is given. See data_pixels.py for the baseline and data_loaders.py for other
loaders.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mono_jax import cli

EXAMPLES = """examples:
  python experiments/benchmarks/data.py --tokenizer=tests/golden/chat
  python experiments/benchmarks/data.py --tokenizer=DIR --shards='laion/*.tar' --tiles 4 6 12 --json
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--tokenizer", required=True, help="folder with the tokenizer")
    parser.add_argument("--shards", help="img2dataset tars to read instead of synthetic images")
    parser.add_argument("--images", type=int, default=16, help="images per round (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the median is reported (default 3)")
    parser.add_argument("--tiles", type=int, nargs="+", default=[4, 6, 12], help="tile budgets (default 4 6 12)")
    parser.add_argument("--records", type=int, default=2000, help="samples in the shard read at random (default 2000)")
    parser.add_argument("--size", type=int, nargs=2, default=[1000, 750], help="size of made images (default 1000 750)")
    parser.add_argument("--plan_blocks", type=int, default=8, help="blocks planned per round (default 8)")
    parser.add_argument("--lengths", type=int, default=16384, help="samples packed for the occupancy (default 16384)")
    parser.add_argument("--chip_tflops", type=float, default=197.0, help="peak of a chip, for the extrapolation (v5e)")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak that is reached (default 0.4)")
    args = parser.parse_args(argv)
    if min(args.images, args.rounds, args.records) < 1:
        cli.fail("--images, --rounds and --records must be at least 1")
    from experiments.benchmarks import data_images, data_loaders, data_pixels, data_planning

    with tempfile.TemporaryDirectory() as folder:
        shards = args.shards or data_images.write_shard(Path(folder), args.images, tuple(args.size))
        result: dict[str, Any] = {"images": args.images, "rounds": args.rounds, "paths": {}}
        for tiles in args.tiles:
            result["paths"][tiles] = data_pixels.whole_paths(shards, args.tokenizer, tiles, args, Path(folder))
        print(f"tiles/s per core compared with other loaders, at most {args.tiles[-1]} tiles:")
        result["loaders"] = data_loaders.loaders(shards, args.tiles[-1], args.images, args.rounds, Path(folder))
        print("the same from an object store with 20 ms latency, by wall time:")
        result["remote"] = data_loaders.remote_loaders(shards, args.tiles[-1], args.images, args.rounds, Path(folder))
        result["steps_alone"] = data_pixels.steps_alone(shards, args.tokenizer, args, Path(folder))
        result["reading"] = data_pixels.reading(Path(folder), args.records, args.rounds)
        result["planning"] = data_planning.planning(args.rounds, blocks=args.plan_blocks)
        result["occupancy"] = {name: data_planning.occupancy(name, args.lengths) for name in data_planning.SLOTS}
        result["fast_path_difference"] = data_pixels.difference(tuple(args.size))
    result["cores"] = data_planning.extrapolate(result["paths"], args.chip_tflops, args.mfu)
    if args.json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
