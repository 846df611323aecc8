from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from hespotex import models
from hespotex.errors import DataValueError


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_equals_scikit_learn(make_planted, trio, metric):
    x = np.concatenate([section.features for section in trio])
    y = np.concatenate([section.targets[:] for section in trio])
    scaler = StandardScaler().fit(x)
    reference = KNeighborsRegressor(7, metric=metric, algorithm="brute").fit(scaler.transform(x), y)
    model = models.create("knn", neighbours=[7], metrics=[metric]).fit(trio)
    test = make_planted("new", 30, seed=8)
    expected = reference.predict(scaler.transform(test.features))
    np.testing.assert_allclose(model.predict(test).mean, expected, rtol=1e-4)


def test_metric_that_fits_the_signal_is_chosen(make_planted):
    sections = []
    for i in range(2):
        section = make_planted(f"s{i}", 200, 3, 1, seed=i)
        length = np.linalg.norm(section.features, axis=1, keepdims=True)
        by_angle = replace(section.targets, counts=section.features[:, :1] / length)
        sections.append(replace(section, targets=by_angle))
    assert models.create("knn", neighbours=[5]).fit(sections).metric == "cosine"
    by_length = [
        replace(s, targets=replace(s.targets, counts=np.linalg.norm(s.features, axis=1, keepdims=True)))
        for s in sections
    ]
    assert models.create("knn", neighbours=[5]).fit(by_length).metric == "euclidean"


def test_few_neighbours_for_clean_signal_many_for_noise(make_planted):
    def chosen(noise):
        sections = [make_planted(f"s{i}", 150, 2, seed=i, noise=noise) for i in range(3)]
        return models.create("knn", metrics=["euclidean"], neighbours=[1, 50]).fit(sections).neighbours

    assert (chosen(0.01), chosen(20.0)) == (1, 50)


def test_fewer_observations_than_neighbours(make_planted):
    model = models.create("knn").fit([make_planted(n=3)])
    assert model.neighbours == 3
    expected = np.tile(make_planted(n=3).targets[:].mean(axis=0), (2, 1))
    np.testing.assert_allclose(model.predict(make_planted("new", 2)).mean, expected, rtol=1e-5)


def test_order_of_spots_does_not_matter(make_planted, trio, reordered):
    test = make_planted("new", seed=8)
    one, other = models.create("knn").fit(trio), models.create("knn").fit([reordered(s) for s in trio])
    np.testing.assert_allclose(one.predict(test).mean, other.predict(test).mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"neighbours": []}, {"neighbours": [0]}, {"metrics": ["manhattan"]}, {"score_rows": 0}]
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        models.create("knn", **options)
