import numpy as np

from data_pipelines.packing.mixture import Mixture


def test_mixture_only_grows_and_keeps_shares():
    mixture = Mixture([1, 1, 1], [0.539, 0.052, 0.409])
    counts = np.array([mixture.counts(n) for n in range(3000)])
    assert (counts.sum(axis=1) == np.arange(3000)).all() and (np.diff(counts, axis=0) >= 0).all()
    assert np.abs(counts - np.arange(3000)[:, None] * [0.539, 0.052, 0.409]).max() < 3
    by_size = Mixture([10, 0, 7])
    assert by_size.counts(17) == [10, 0, 7] and by_size.counts(3 * 17) == [30, 0, 21]
