"""Shows how a run's time was spent, from its files: ``python -m mono_jax.runs.goodput WORKDIR``.

Every second of wall time, over all restarts, kills and stages, belongs to one of:

  productive   computing steps that were kept: what you pay for
  data_wait    waiting for batches: more data.workers, faster storage, data.pixel_path='fast'
  compile      tracing and compiling: share compiled programs among runs with compilation_cache=DIR
  checkpoint   saving, where training waits for it, and the model folder: save less often, async_checkpoints=True
  evaluation   evaluating during the run and between the stages of evip.py: evaluation.every, evaluation.batches
  restart      nothing ran, or a process was starting: use a launcher that restarts immediately
  lost_work    steps that were repeated after a kill: save more often

Goodput is the share of productive time. WORKDIR is that of train.py, or of evip.py with all its stages; it may be a
copy, and the run may still be running. The command reads timeline.jsonl, those of other processes in logs/, and
metrics.jsonl. After a kill, the time since the last line (log_every steps) counts as restart, except for steps that a
checkpoint kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from mono_jax import cli

EXAMPLES = """examples:
  python -m mono_jax.runs.goodput runs/demo
  python -m mono_jax.runs.goodput runs/s2 --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, EXAMPLES)
    parser.prog = "python -m mono_jax.runs.goodput"
    parser.add_argument("workdir", help="workdir of train.py or evip.py, a folder or URL")
    args = parser.parse_args(argv)
    from mono_jax.runs.workdir import looked_at  # after parsing: --help does not need it
    from mono_jax.training import goodput

    with looked_at(args.workdir) as workdir:
        measured = goodput.measure(workdir)
    for line in goodput.table(args.workdir, measured):
        print(line)
    if args.json:
        cli.json_line(measured)
    return 0


if __name__ == "__main__":
    cli.run(main)
