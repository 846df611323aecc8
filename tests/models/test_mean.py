from __future__ import annotations

import numpy as np

from hespotex import models
from hespotex.data.section import Targets


def test_mean_over_observations_not_sections(make_planted):
    small, large = make_planted("a", 10, seed=1), make_planted("b", 90, seed=2)
    model = models.create("mean").fit([small, large])
    expected = np.concatenate([small.targets[:], large.targets[:]]).mean(axis=0)
    mean = model.predict(make_planted("new", 7)).mean
    assert mean.shape == (7, 4)
    np.testing.assert_allclose(mean, np.tile(expected, (7, 1)), rtol=1e-6)


def test_mean_is_taken_in_the_unit_of_the_targets(make_planted):
    targets = Targets(np.array([[1.0], [0.0]]), np.array([10.0, 10.0]), ("A",))
    section = make_planted(n=2, targets=targets)
    model = models.create("mean").fit([section])
    assert model.unit == "log1p_cp10k"
    np.testing.assert_allclose(model.predict(section).mean, np.log1p(1000) / 2, rtol=1e-6)


def test_order_of_spots_does_not_matter(trio, reordered):
    one, other = models.create("mean").fit(trio), models.create("mean").fit([reordered(s) for s in trio])
    np.testing.assert_allclose(one.predict(trio[0]).mean, other.predict(trio[0]).mean, rtol=1e-6)
