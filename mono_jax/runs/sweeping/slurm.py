"""A sweep as a SLURM array job, with one element per unit."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.io import publish
from mono_jax.errors import ClusterError

_SCRIPT = """#!/bin/bash
# Made by sweep.py slurm. Each element of the array trains one unit; an element that is preempted (exit code 75) or
# loses a process (76) is requeued and resumes. Units with the same first stages wait for the one that trains them.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{limit}
#SBATCH --output={logs}/%a.log
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
{options}set -u
srun --kill-on-bad-exit=0 {command} "$SLURM_ARRAY_TASK_ID"
code=$?
if [[ $code == 75 || $code == 76 ]] && ((${{SLURM_RESTART_COUNT:-0}} < ${{MAX_RESTARTS:-50}})); then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit $code
"""


def write_script(
    workdir: Path, name: str, units: int, command: Sequence[str], jobs: int | None, options: Sequence[str]
) -> Path:
    """Writes WORKDIR/sweep.sbatch: ``units`` elements, at most ``jobs`` at once, with additional sbatch options."""
    logs = (workdir / "slurm").absolute()
    logs.mkdir(parents=True, exist_ok=True)
    script = _SCRIPT.format(
        name=name,
        last=units - 1,
        limit="" if jobs is None else f"%{jobs}",
        logs=logs,
        options="".join(f"#SBATCH {option}\n" for option in options),
        command=shlex.join(command),
    )
    file = workdir / "sweep.sbatch"
    publish.write_text(file, script)
    return file


def submit(script: Path) -> str:
    """Submits ``script`` with sbatch and returns its output. Raises ClusterError."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            f"sbatch is not installed on this machine: copy {script} to the cluster, or leave out --submit"
        )
    done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if done.returncode:
        raise ClusterError(f"sbatch {script}: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
