import numpy as np
import pytest

from data_pipelines.packing.permutation import LocalPermutation, Permutation

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
