"""How processes find each other, and what ends the remaining ones when one is lost."""

from __future__ import annotations

import importlib
import re
import threading
import time
from pathlib import Path

import pytest
from jax._src.distributed import global_state

from mono_jax import cli
from mono_jax.errors import ClusterError, PeerError
from mono_jax.parallel.distributed import ENVIRONMENT, Cluster, find, joined
from mono_jax.parallel.watch import Watch
from tests.mono_jax.peers import Store

SRUN = {"SLURM_NTASKS": "8", "SLURM_PROCID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
SRUN |= {"SLURM_LOCALID": "3"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
MPIRUN |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        # A coordinator by itself may be left over from another program.
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
            Cluster("h:1", 4, 2, "environment variables"),
        ),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        # Four tasks on each host divide its GPUs, unless each sees its own; one task takes all of them.
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, Cluster(None, None, None, "SLURM", 3)),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Cluster(None, None, None, "SLURM")),
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "2"},
            Cluster(None, None, None, "SLURM"),
        ),
        # Up to version 4, JAX reads the location of mpirun; since version 5, it is in the job name.
        (MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"}, Cluster(None, 4, 3, "Open MPI", 1)),
        (MPIRUN | {"PMIX_NAMESPACE": "prterun-node-07-4099@1"}, Cluster("node-07:61443", 4, 3, "Open MPI", 1)),
        (
            MPIRUN | {"PMIX_NAMESPACE": "prterun-n-5@1", "JAX_COORDINATOR_ADDRESS": "h:1", "CUDA_VISIBLE_DEVICES": "0"},
            Cluster("h:1", 4, 3, "Open MPI"),
        ),
        # In a SLURM batch script, and on a host where mpirun had SLURM start its daemon.
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"} | MPIRUN, Cluster(None, 4, 3, "Open MPI", 1)),
        (SRUN | MPIRUN, Cluster(None, 4, 3, "Open MPI", 1)),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Cluster(None, None, None, "the TPU pod")),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Cluster(None, None, None, "the TPU pod")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, None),
    ],
)
def test_a_process_finds_the_others_by_its_environment(environment: dict[str, str], expected: Cluster | None):
    assert find(environment=environment) == expected


def test_flags_come_before_the_environment():
    assert find("h:5", 2, 1, SRUN) == Cluster("h:5", 2, 1, "flags")


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("h:5", 2, None), {}, r"--process missing: --coordinator, --processes, --process must all be given"),
        (("h", 2, 1), {}, "--coordinator is 'h': it must be HOST:PORT"),
        (("h:5", 2, 2), {}, "--process is 2: it must be one of 0 to 1"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID missing"),
        (
            (None, None, None),
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "must be numbers, not 'two' and '0'",
        ),
        # In a batch script without srun, each task would train separately, all in the same workdir.
        ((None, None, None), {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, "not started by srun"),
    ],
)
def test_a_cluster_described_by_half_is_refused(flags: tuple, environment: dict[str, str], message: str):
    with pytest.raises(ClusterError, match=message):
        find(*flags, environment=environment)


WITHOUT_CLUSTER = {  # with everything that they need before they look for other processes
    "convert.py": ["a", "b"],
    "inspect_data.py": ["--config=experiments/configs/demo.py:smoke"],
    "inspect_model.py": ["--model=a", "--questions=b"],
    "lm_eval.py": [],
    "parity.py": ["--model_dir=a", "--case=b"],
    "plan.py": ["--config=experiments/configs/demo.py:smoke", "--target=cpu:8"],
    "robustness.py": ["--model=a", "--questions=b", "--out=c"],
    "score.py": ["--config=experiments/configs/demo.py:smoke", "--model=a", "--out=c"],
    "serve.py": ["--model=a"],
    **{f"sweep.py {action}": [action, "experiments/sweeps/stages.py", "--workdir=w"] for action in ("gather", "slurm")},
    "sweep.py run without --unit": ["run", "experiments/sweeps/stages.py", "--workdir=w"],
}


@pytest.mark.parametrize("command", WITHOUT_CLUSTER)
@pytest.mark.parametrize("found_by", ["SLURM", "environment variables", "Open MPI"])
def test_a_command_of_one_process_refuses_to_be_started_several_times(monkeypatch, command: str, found_by: str):
    joined = dict(zip(ENVIRONMENT, ("h:1", "2", "1")))
    variables = {"SLURM": SRUN, "environment variables": joined, "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2"}}
    main = importlib.import_module(f"experiments.{command.split('.')[0]}").main
    for name, value in variables[found_by].items():
        monkeypatch.setenv(name, value)
    said = (
        rf"{re.escape(command)} runs in one process, but several were started \(found by {found_by}\): start only one"
    )
    with pytest.raises(ClusterError, match=said):
        main(WITHOUT_CLUSTER[command])


@pytest.mark.parametrize("alone", [{}, {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, SRUN | {"JAX_NUM_PROCESSES": "1"}])
def test_a_command_of_one_process_runs_where_it_is_one(monkeypatch, alone: dict[str, str]):
    """By itself, as the script of a job whose tasks srun starts, and if it is declared to be the only process."""
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    cli.alone("convert.py")


class Peer:
    """A watched process, simulated by a thread; ``left``: why it would have exited."""

    def __init__(self, store: Store, number: int, processes: int = 2):
        self.left: list[str] = []
        self.gone = threading.Event()
        self.watch = Watch(number, processes, f"host{number}", store, self._leave, beat=0.01, lost_after=0.5)

    def _leave(self, message: str) -> None:
        self.left.append(message)
        self.gone.set()


def test_peers_that_beat_are_left_alone_and_all_may_end():
    store = Store()
    peers = [Peer(store, number) for number in range(2)]
    with peers[0].watch, peers[1].watch:
        time.sleep(1.0)  # twice as long as a lost process is waited for
    assert [peer.left for peer in peers] == [[], []]


def test_one_that_has_ended_waits_for_the_others_however_long_they_need():
    """The first process may still score, or upload, for hours: limits below a day pass at once here."""
    store, waits = Store(2), threading.Event()
    peers, wait_at_barrier = [Peer(store, number) for number in range(2)], store.wait_at_barrier

    def limited(barrier: str, timeout_in_ms: int) -> None:
        waits.set()
        if timeout_in_ms < 24 * 3600 * 1000:
            raise TimeoutError
        wait_at_barrier(barrier, timeout_in_ms)

    def ends() -> None:
        with peers[1].watch:
            pass

    store.wait_at_barrier = limited
    other = threading.Thread(target=ends)
    with peers[0].watch:
        other.start()
        assert waits.wait(20)
        other.join(0.2)
        assert other.is_alive()
    other.join(20)
    assert not other.is_alive() and [peer.left for peer in peers] == [[], []]


def test_one_that_falls_silent_is_named():
    store = Store()
    peers = [Peer(store, number, 3) for number in range(3)]
    with peers[0].watch, peers[1].watch:
        with peers[2].watch:
            time.sleep(0.1)
        for peer in peers[:2]:
            assert peer.gone.wait(5) and "process 2 on host host2 has not been heard from for" in peer.left[0]


def test_one_that_never_came_is_named_without_its_host():
    peer = Peer(Store(), 0)
    with peer.watch:
        assert peer.gone.wait(5) and peer.left[0].startswith("process 1 has not been heard from for")


@pytest.mark.parametrize("error", [ValueError("no\nroom"), KeyboardInterrupt("no room")])
def test_one_that_ends_with_an_error_says_why(error: BaseException):
    store = Store()
    peers = [Peer(store, number) for number in range(2)]
    with peers[0].watch:
        with pytest.raises(type(error)), peers[1].watch:
            raise error
        assert peers[0].gone.wait(5)
    ended = f"process 1 on host host1 ended: {type(error).__name__}: no room; stopping"
    assert peers[0].left[0].startswith(ended)


def test_an_error_that_others_caused_is_not_told_as_ones_own():
    """One of three processes is killed: collective errors of the other two must not blame each other."""
    store = Store()
    peer = Peer(store, 0)
    with pytest.raises(ValueError), peer.watch:
        raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    assert peer.left and "process 1" in peer.left[0]


def test_a_store_that_is_gone_is_process_0():
    store = Store()
    peer = Peer(store, 1)
    with peer.watch:
        time.sleep(0.05)
        store.away = True
        assert peer.gone.wait(5) and peer.left[0].startswith("process 0")


def test_processes_that_end_by_an_error_of_all_end_by_themselves():
    """Each reports its own error; none is ended by a message from another."""
    store = Store(2)
    peers = [Peer(store, number) for number in range(2)]

    def process(peer: Peer, error: Exception) -> None:
        with pytest.raises(type(error)), peer.watch:
            time.sleep(0.1)
            raise error

    errors = (ValueError("at once"), PeerError("process 0 on host a: at once"))
    errors[0].known_to_all = True  # as ``together`` leaves it
    threads = [threading.Thread(target=process, args=pair) for pair in zip(peers, errors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [peer.left for peer in peers] == [[], []]


def test_one_whose_calls_to_the_store_never_return_ends_too():
    """As on a host that is cut off: no connection is closed, and there are no responses."""
    store, never = Store(), threading.Event()
    peer = Peer(store, 1)
    with peer.watch:
        time.sleep(0.05)
        store.key_value_set = lambda *_, **__: never.wait(30)
        assert peer.gone.wait(5) and peer.left[0].startswith("process 0")
        never.set()


def test_no_thread_outlives_the_watch():
    """A thread that returns from the store after Python has finished would end a successful process by a signal."""
    store, before = Store(), set(threading.enumerate())
    read = store.key_value_dir_get
    store.key_value_dir_get = lambda prefix: time.sleep(0.3) or read(prefix)
    with Peer(store, 0, 1).watch:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= before


COMMANDS = {
    "evaluate": ["--model=NEW", "--tasks=pope", "--out=NEW"],
    "train": ["--config=experiments/configs/demo.py:smoke", "--workdir=NEW"],
    "evip": ["--config=experiments/configs/demo.py:smoke", "--workdir=NEW"],
    "generate": ["--model=NEW", "--prompt=a"],
    "sweep": ["run", "experiments/sweeps/stages.py", "--unit=0", "--workdir=NEW"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_several_times_by_itself(command: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """In a batch script without srun, SLURM has several tasks, none of which is this: an error before any reading."""
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setenv("SLURM_NTASKS", "8")
    main = importlib.import_module(f"experiments.{command}").main
    with pytest.raises(ClusterError, match="SLURM has 8 tasks, but this process was not started by srun"):
        main([argument.replace("NEW", str(tmp_path / "new")) for argument in COMMANDS[command]])
    assert not list(tmp_path.iterdir())


def test_every_command_joins_the_others_or_refuses_them():
    """The tables above are complete."""
    commands = {file.name for file in (Path(__file__).parents[3] / "experiments").glob("*.py")} - {"__init__.py"}
    assert commands == {f"{name}.py" for name in COMMANDS} | {name.partition(" ")[0] for name in WITHOUT_CLUSTER}


def test_a_process_by_itself_joins_nothing(capfd: pytest.CaptureFixture[str]):
    threads = threading.enumerate()
    with joined(find(environment={})) as first:
        assert first and threading.enumerate() == threads and global_state.client is None
    assert capfd.readouterr() == ("", "")
