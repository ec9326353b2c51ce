"""Starts the processes of a run together: how they find each other, and how all of them end when one is lost.

A process finds the others through flags, through the variables of ``ENVIRONMENT``, or through JAX's own detection:
SLURM (srun), Open MPI (mpirun), TPU pods and GKE. A single process skips all of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
from collections.abc import Iterator, Mapping

import jax

from mono_jax.errors import ClusterError
from mono_jax.parallel import watch

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
START_TIMEOUT = 300  # seconds within which all processes must have joined
_FIRST_PORT, _PORTS = 61440, 4096  # the range from which JAX picks a port by job number


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The arguments of ``jax.distributed.initialize``; None = JAX detects the value.

    Attributes:
      coordinator: HOST:PORT of process 0.
      processes: number of processes.
      process: index of this process.
      found_by: where the values come from, for messages.
      device: the one GPU that this process uses if the processes on a host share its GPUs; None = all visible ones.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    found_by: str
    device: int | None = None


def find(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster that flags or environment describe; None = a single process.

    Raises ClusterError if the description is incomplete, or if SLURM has several tasks but this process is not one of
    them.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given):
        return _explicit(given, ("--coordinator", "--processes", "--process"), "flags")
    if [environment.get(name) for name in ENVIRONMENT] == [None, "1", None]:
        return None  # this process is meant to run alone, whatever else is set
    if (said := tuple(environment.get(name) for name in ENVIRONMENT))[1:] != (None, None):
        return _explicit(said, ENVIRONMENT, "environment variables")
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:  # mpirun's, also within a SLURM job
        return _open_mpi(environment)
    if _number(environment, "SLURM_NTASKS") > 1:
        if not started_by_srun(environment):
            raise ClusterError(
                f"SLURM has {environment['SLURM_NTASKS']} tasks, but this process was not started by srun: each would "
                "train separately; put srun in front of the command, or request one task"
            )
        local = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", "2"))
        device = _own_device("SLURM_LOCALID", int(local[0]) if local else 2, environment)
        return Cluster(None, None, None, "SLURM", device)
    if environment.get("TPU_SKIP_MDS_QUERY") is None and _on_tpu_pod(environment):
        return Cluster(None, None, None, "the TPU pod")
    return None


def started_by_srun(environment: Mapping[str, str]) -> bool:
    """Whether this process is a task of a SLURM job, rather than its batch script."""
    return "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment


def _explicit(values: tuple[object, ...], names: tuple[str, ...], found_by: str) -> Cluster | None:
    if missing := [name for name, value in zip(names, values) if value is None]:
        raise ClusterError(f"{', '.join(missing)} missing: {', '.join(names)} must all be given")
    try:
        coordinator, processes, process = str(values[0]), int(str(values[1])), int(str(values[2]))
    except ValueError:
        raise ClusterError(f"{names[1]} and {names[2]} must be numbers, not {values[1]!r} and {values[2]!r}") from None
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ClusterError(f"{names[0]} is {coordinator!r}: it must be HOST:PORT of process 0")
    if not 0 <= process < processes:
        raise ClusterError(f"{names[2]} is {process}: it must be one of 0 to {processes - 1}")
    return Cluster(coordinator, processes, process, found_by) if processes > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0


def _own_device(local_process: str, local_processes: int, environment: Mapping[str, str]) -> int | None:
    """The index of this process on its host, if the processes of a host see the same GPUs and must share them.

    ``local_process``: the variable that holds the index.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    divided = local_processes > 1 and (not visible or len(visible) >= local_processes)
    return _number(environment, local_process) if divided else None


def _open_mpi(environment: Mapping[str, str]) -> Cluster:
    """Process 0 is expected on mpirun's host. JAX detects it up to Open MPI 4; since version 5 the job is named after
    it."""
    size, process, peers = (_number(environment, f"OMPI_COMM_WORLD_{n}") for n in ("SIZE", "RANK", "LOCAL_SIZE"))
    job = re.fullmatch(r"prte(?:run)?-(.+)-(\d+)@\d+", environment.get("PMIX_NAMESPACE", ""))
    coordinator = environment.get(ENVIRONMENT[0], f"{job[1]}:{_FIRST_PORT + int(job[2]) % _PORTS}" if job else None)
    device = _own_device("OMPI_COMM_WORLD_LOCAL_RANK", peers, environment)
    return Cluster(coordinator, size, process, "Open MPI", device)


def _on_tpu_pod(environment: Mapping[str, str]) -> bool:
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or _number(environment, "MEGASCALE_NUM_SLICES") > 1:
        return True
    if hosts or not (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")):
        return False
    with contextlib.suppress(Exception):  # on a TPU VM the instance metadata lists the workers
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

        return bool(GceTpuCluster.is_env_present()) and GceTpuCluster.get_process_count() > 1
    return False


@contextlib.contextmanager
def joined(cluster: Cluster | None) -> Iterator[bool]:
    """Connects to the other processes of ``cluster`` for the duration; no device may have been used before.

    Yields whether this is the first process, which prints for all. An error is reported to the others, which then end,
    too (``watch``). Raises ClusterError if they do not join.
    """
    if cluster is None:
        yield True
        return
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)  # the run itself coordinates when to stop
    explicit = cluster.coordinator is not None
    try:
        jax.distributed.initialize(
            cluster.coordinator,
            cluster.processes,
            cluster.process,
            local_device_ids=[] if cluster.device is None else [cluster.device],
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=10
            * watch.LOST_AFTER,  # the runtime ends processes with SIGABRT; ``watch`` explains why
        )
    except Exception as error:
        raise ClusterError(
            f"the processes found by {cluster.found_by} did not all connect: {error}: {ENVIRONMENT[0]}=HOST:PORT says "
            "where process 0 is"
        ) from None
    if jax.process_index() != 0:
        watch.explain_aborts()
    with watch.Watch(jax.process_index(), jax.process_count(), socket.gethostname()):
        yield jax.process_index() == 0
    jax.distributed.shutdown()
