import numpy as np

from data_pipelines.packing.mixture import Mixture


def test_mixture_only_grows_and_keeps_shares():
    mixture = Mixture([1, 1, 1], [0.539, 0.052, 0.409])
    counts = np.array([mixture.counts(n) for n in range(3000)])
    assert (counts.sum(axis=1) == np.arange(3000)).all() and (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - np.arange(3000)[:, None] * [0.539, 0.052, 0.409]).max() < 3
    by_size = Mixture([10, 0, 7])
    assert by_size.counts(17) == [10, 0, 7] and by_size.counts(3 * 17) == [30, 0, 21]


def test_sources_without_a_weight_share_what_others_leave():
    mixture = Mixture([300, 10, 100, 0], [None, 0.2, None, None])
    counts = np.array([mixture.counts(n) for n in range(3000)])
    assert (counts.sum(axis=1) == np.arange(3000)).all()
    assert np.abs(counts - np.arange(3000)[:, None] * [0.6, 0.2, 0.2, 0]).max() < 3 and not counts[:, 3].any()
    assert Mixture([0, 10], [None, 0.2]).counts(50) == [0, 50], "nothing is left to share"
