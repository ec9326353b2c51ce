import numpy as np
import pytest

from data_pipelines.packing.permutation import LocalPermutation, Permutation, fold, mix

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 97, 1000, 4097])
@pytest.mark.parametrize("make", [Permutation, lambda n, key: LocalPermutation(n, key, 4, 8)])
def test_permutations_are_one_to_one(n, make):
    whole = make(n, 7)(np.arange(n))
    assert sorted(whole.tolist()) == list(range(n))
    some = RNG.integers(0, n, 20)
    np.testing.assert_array_equal(make(n, 7)(some), whole[some])
    if n > 16:
        assert (make(n, 8)(np.arange(n)) != whole).mean() > 0.5


def test_permutation_of_a_billion_needs_no_memory():
    n = 922_000_000
    places = Permutation(n, 1)(np.arange(5_000_000, 5_020_000))
    assert len(np.unique(places)) == 20_000 and places.min() >= 0 and places.max() < n
    # Uniform: each twentieth of the range gets its share, give or take 5 standard deviations.
    shares = np.bincount(places // (n // 20 + 1), minlength=20)
    assert np.abs(shares - 1000).max() < 5 * np.sqrt(1000)


def test_permutation_has_no_trace_of_order():
    n = 100_000
    whole = Permutation(n, 3)(np.arange(n)).astype(float)
    for other in (np.arange(n), np.roll(whole, 1)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 5 / np.sqrt(n)


def test_local_shuffle_reads_long_runs():
    permutation = LocalPermutation(10_000, 5, runs=4, run_length=100)
    for start in range(0, 9_600, 400):
        runs = np.unique(permutation(np.arange(start, start + 400)) // 100)
        assert len(runs) == 4
    assert len(np.unique(permutation(np.arange(400)) // 100 // 4)) > 1  # not four neighbours


def test_local_shuffle_differs_between_groups_and_runs_are_shuffled():
    """With one run a group, the place within the run is the group's own shuffle, whichever run it fell on."""
    whole = LocalPermutation(1000, 5, runs=1, run_length=100)(np.arange(1000)).reshape(10, 100)
    inside = {tuple(group) for group in (whole % 100).tolist()}
    assert len(inside) == 10 and tuple(range(100)) not in inside
    runs = (whole[:, 0] // 100).tolist()
    assert sorted(runs) == list(range(10)) and runs != list(range(10))


def test_local_shuffle_leaves_the_rest_for_the_end():
    whole = LocalPermutation(1030, 5, runs=2, run_length=50)(np.arange(1030))
    assert sorted(whole[1000:].tolist()) == list(range(1000, 1030)) != whole[1000:].tolist()


# A changed stream of numbers would change every run that resumes, without a word.
FOLDED = {
    (): 0,
    (0,): 16294208416658607535,
    (3, 7): 1924687380634005565,
    (7, 3): 3464446745756637351,
    (1, 0x5EED, 2**63, 4): 11328355135729320512,
}


def test_the_streams_of_random_numbers_are_pinned():
    assert {numbers: fold(*numbers) for numbers in FOLDED} == FOLDED
    assert mix(np.arange(2), 9).tolist() == [17561866513979060390, 14646652180046636950]
    assert Permutation(11, 5)(np.arange(11)).tolist() == [6, 3, 9, 8, 2, 7, 5, 1, 4, 10, 0]
    assert LocalPermutation(11, 5, 2, 2)(np.arange(11)).tolist() == [4, 7, 5, 6, 2, 0, 3, 1, 10, 8, 9]
