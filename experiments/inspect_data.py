"""Shows the batches that a config trains on: hashes, occupancy, skipped samples, a page of images, good row sizes.

--config is a Python file with get_config() -> ConfigDict, for training or for data only: its key ``data`` (or, if it
has none, the whole config) holds what data_pipelines/config.py describes (DataConfig). The tile size comes from the
config's keys init, model or vision; without them it is that of the public release.

Batches are a pure function of the config and the step: the same --config and --start give the same hashes with any
--hosts and any --config.data.workers, on any day.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli
from mono_jax.runs import config_file

EXAMPLES = """examples:
  python experiments/inspect_data.py --config=experiments/configs/demo.py:smoke --stage=s2 --html=rows.html
  python experiments/inspect_data.py --config=my.py --steps=20 --json
  python experiments/inspect_data.py --config=my.py --start=1000 --steps=2 --hosts=3     # the same hashes as --hosts=1
  python experiments/inspect_data.py --config=my.py --steps=2 --html=rows.html           # look at them
  python experiments/inspect_data.py --config=my.py --suggest_capacity --slots=16384     # good V and T
  python experiments/inspect_data.py --config=my.py --steps=0 --epoch                    # count the whole epoch
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--steps", type=int, default=4, help="number of steps (default 4)")
    parser.add_argument("--start", type=int, default=0, help="first step (default 0)")
    parser.add_argument("--hosts", type=int, default=1, help="build each batch in parts, as N hosts would")
    parser.add_argument("--epoch", action="store_true", help="pack the first epoch; report its steps and occupancy")
    parser.add_argument("--html", metavar="FILE", help="write a page that shows the rows of these steps")
    parser.add_argument("--html_rows", type=int, default=8, help="rows per step on the page (default 8)")
    parser.add_argument("--suggest_capacity", action="store_true", help="try values of visual_tokens and text_tokens")
    parser.add_argument("--slots", type=int, help="longest row (V + T) to suggest (default: the config's)")
    multiple = "suggest V + T in multiples of this (default 1024, as TPU kernels want; 1 for rows below 4096 slots)"
    parser.add_argument("--row_multiple", type=int, metavar="N", help=multiple)
    parser.add_argument("--stage", metavar="NAME", help="which stage of a config with several (default: the first)")
    parser.add_argument("--cache_dir", help="for token counts and plans (default $MONO_JAX_CACHE or ~/.cache/mono_jax)")
    args, values = config_file.parse(parser, argv)
    for name, least in (("steps", 0), ("start", 0), ("hosts", 1), ("row_multiple", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            cli.fail(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    cli.alone("inspect_data.py")
    options = vars(args)
    del options["config"]
    json = options.pop("json")
    from mono_jax.runs import inspection

    result = inspection.run(values, **options)
    if json:
        cli.json_line(result)


if __name__ == "__main__":
    cli.run(main)
