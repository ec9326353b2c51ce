"""An error of one process becomes an error of all, and no process waits for one that has failed."""

from __future__ import annotations

from typing import Any

import pytest

from mono_jax.errors import PeerError
from mono_jax.parallel.agreement import (
    Meeting,
    NestedMeeting,
    barrier,
    first_process_first,
    from_first,
    gathered,
    together,
)
from tests.mono_jax.peers import Peers

COUNT = 3


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Peers:
    return Peers(COUNT, monkeypatch)


@pytest.mark.parametrize("failing", [set(), {0}, {1}, {0, 2}, {0, 1, 2}])
def test_a_block_ends_on_all_or_on_none(peers: Peers, failing: set[int]):
    def process(index: int) -> str:
        barrier()
        with together():
            if index in failing:
                raise OSError(f"no room\nfor {index}")
        assert gathered(index) == list(range(COUNT))
        return from_first(f"value of {index}")

    for index, found in enumerate(peers.run(process)):
        if not failing:
            assert found == "value of 0"
        elif index in failing:
            assert isinstance(found, OSError) and found.known_to_all
        else:
            assert isinstance(found, PeerError) and found.known_to_all
            assert [f"process {i} on host" in str(found) for i in range(COUNT)] == [i in failing for i in range(COUNT)]
            assert all(f"no room for {i}" in str(found) for i in failing)


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_the_first_process_is_first(peers: Peers, failing: int | None):
    order: list[int] = []

    def process(index: int) -> None:
        with first_process_first():
            order.append(index)
            if index == failing:
                raise ValueError("bad")

    found = peers.run(process)
    if failing == 0:
        assert order == [0] and [type(error) for error in found] == [ValueError, PeerError, PeerError]
    else:  # the others continue by themselves from there: what one of them does is its own affair
        assert order[0] == 0 and sorted(order) == [0, 1, 2]
        assert [isinstance(error, ValueError) for error in found] == [index == failing for index in range(COUNT)]


def _in_together() -> None:
    with together():
        pass


def _in_first_process_first() -> None:
    with first_process_first():
        pass


@pytest.mark.parametrize("processes", [1, COUNT])
@pytest.mark.parametrize("outer", [together, first_process_first])
@pytest.mark.parametrize(
    "meet", [barrier, lambda: from_first(1), lambda: gathered(1), _in_together, _in_first_process_first]
)
def test_nobody_meets_within_a_meeting(monkeypatch: pytest.MonkeyPatch, processes: int, outer: Any, meet: Any):
    def process(index: int) -> str:
        with outer(), pytest.raises(NestedMeeting):
            meet()
        return from_first("afterwards they may")

    found = [process(0)] if processes == 1 else Peers(processes, monkeypatch).run(process)
    assert found == ["afterwards they may"] * processes


@pytest.mark.parametrize("point", [0, 1, 2])
@pytest.mark.parametrize("failing", [0, 2])
def test_a_meeting_ends_at_the_point_where_one_fails(peers: Peers, failing: int, point: int):
    def process(index: int) -> int:
        meeting, passed = Meeting("save"), 0
        try:
            for number in range(3):
                if (index, number) == (failing, point):
                    raise OSError("full")
                meeting.pass_on()
                passed += 1
        except Exception as error:
            meeting.fail(error)
            assert isinstance(error, PeerError) == (index != failing)
        return passed

    assert peers.run(process) == [point] * COUNT
