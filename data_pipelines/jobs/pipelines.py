"""Processing many files with an Apache Beam pipeline, on this machine or on any engine that Beam is configured for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.io import blobs, copies

Counts = Mapping[str, Any]


def run_pipeline(
    tasks: Sequence[Any],
    work: Callable[[Any], Counts],
    add: Callable[[Iterable[Counts]], Counts],
    summary: str,
    beam_arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """The sum of the results of ``work`` for all tasks, which any worker may process in any order.

    Args:
      add: computes the sum; associative, as Beam's combiners require, and defined for zero summands.
      summary: path of a file that all workers can write to, for the sum.
      beam_arguments: from the command line, such as ``--runner=FlinkRunner``.

    Raises DataError if Beam is missing.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        needed = "pip install -r data_pipelines/requirements-build.txt (in a separate environment)"
        raise DataError(f"this needs Apache Beam: {needed}") from None
    with beam.Pipeline(options=PipelineOptions(list(beam_arguments), save_main_session=False)) as pipeline:
        _ = (
            pipeline
            | "Tasks" >> beam.Create(list(tasks))
            | "Spread" >> beam.Reshuffle()
            | "Work" >> beam.Map(work)
            | "Sum" >> beam.CombineGlobally(add)
            | "Summary" >> beam.Map(_write, summary)
        )
    return json.loads(blobs.read_bytes(summary))


def _write(counts: Counts, path: str) -> None:
    copies.write_bytes(path, json.dumps(counts).encode())
