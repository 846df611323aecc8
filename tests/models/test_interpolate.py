from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist

from hespotex.data.lattice import spot_pitch
from hespotex.errors import DataValueError, ModelMismatchError
from hespotex.models import create, load
from hespotex.models._interpolation import gaussian_weights

METHODS = ("nearest", "gaussian", "idw")


@pytest.fixture
def section(make_parts):
    return make_parts()[0]


def fit(section, **options):
    return create("interpolate", **options).fit([section])


def distances(section):
    return cdist(section.parts.coordinates, section.coordinates)


def test_nearest_is_the_value_of_the_nearest_spot(section):
    distance = np.sort(distances(section), axis=1)
    clear = distance[:, 1] - distance[:, 0] > 1e-6
    nearest = section.targets[:][distances(section).argmin(axis=1)]
    np.testing.assert_array_equal(fit(section, method="nearest").predict(section).mean[clear], nearest[clear])


def test_gaussian_and_idw_equal_their_formulas(section):
    everything = {"neighbours": section.n_obs}
    weight = np.exp(-(distances(section) ** 2) / (2 * 25.0**2))
    expected = weight / weight.sum(axis=1, keepdims=True) @ section.targets[:]
    made = fit(section, method="gaussian", bandwidth=25.0, **everything).predict(section).mean
    np.testing.assert_allclose(made, expected, rtol=1e-5)
    weight = (distances(section) + 0.1) ** -3
    expected = weight / weight.sum(axis=1, keepdims=True) @ section.targets[:]
    np.testing.assert_allclose(
        fit(section, method="idw", power=3, **everything).predict(section).mean, expected, rtol=1e-5
    )


def test_bandwidth_follows_the_pitch_of_the_spots(section):
    assert spot_pitch(section.coordinates) == pytest.approx(40)
    given = fit(section, bandwidth=28.0).predict(section).mean
    np.testing.assert_allclose(fit(section).predict(section).mean, given, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_it_follows_the_truth_below_the_spot(make_parts, method):
    section, truth = make_parts(depth=60.0)
    mean = fit(section, method=method).predict(section).mean
    r = [np.corrcoef(mean[:, g], truth[:, g])[0, 1] for g in range(truth.shape[1])]
    assert np.mean(r) > 0.85


@pytest.mark.parametrize("level", ["superpixel", "nucleus", "spot"])
def test_any_parts(make_parts, level):
    section, _ = make_parts(level="superpixel" if level == "superpixel" else "nucleus")
    section = replace(section, parts=replace(section.parts, level=level, features=None, colour=None))
    model = fit(section, level=level)
    predicted = model.predict(section)
    assert model.level == predicted.level == level
    assert predicted.mean.shape == (section.parts.n_parts, 4)
    assert np.array_equal(predicted.ids, section.parts.ids)


@pytest.mark.parametrize("method", METHODS)
def test_values_stay_among_those_of_the_spots_and_constants_stay(section, method):
    counts = np.asarray(section.targets.counts, dtype=float).copy()
    counts[:, 0], counts[:, 1] = 3.0, 0.0
    flat = replace(section, targets=replace(section.targets, counts=counts))
    mean = fit(flat, method=method).predict(flat).mean
    np.testing.assert_allclose(mean[:, 0], 3.0, rtol=1e-5)
    assert not mean[:, 1].any()
    assert (mean <= counts.max(axis=0) + 1e-4).all()


@pytest.mark.parametrize("method", METHODS)
def test_order_of_the_spots_does_not_matter(section, method):
    order = np.random.default_rng(0).permutation(section.n_obs)
    targets = section.targets
    shuffled = replace(
        section,
        ids=section.ids[order],
        coordinates=section.coordinates[order],
        targets=replace(targets, counts=targets.counts[order], library_size=targets.library_size[order]),
        parts=replace(section.parts, share=sparse.csr_array(section.parts.share[order])),
    )
    one, other = (fit(each, method=method, neighbours=3).predict(each).mean for each in (section, shuffled))
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_storage_and_one_spot(section, method, tmp_path):
    model = fit(section, method=method)
    whole, blocks = model.predict(section), list(model.predict_blocks(section, block_rows=300))
    assert np.array_equal(np.concatenate([block.mean for block in blocks]), whole.mean)
    model.save(tmp_path / "model.hx")
    assert np.array_equal(load(tmp_path / "model.hx").predict(section).mean, whole.mean)


def one_spot(section):
    targets = section.targets
    return replace(
        section,
        ids=section.ids[:1],
        features=section.features[:1],
        coordinates=section.coordinates[:1],
        region=section.region[:1],
        targets=replace(targets, counts=targets.counts[:1], library_size=targets.library_size[:1]),
        parts=replace(section.parts, share=sparse.csr_array(section.parts.share[:1])),
    )


def test_a_single_spot_is_everywhere_where_no_bandwidth_is_asked_for(section):
    single = one_spot(section)
    for options in ({"method": "nearest"}, {"method": "idw"}, {"bandwidth": 30.0}):
        predicted = fit(single, **options).predict(single)
        np.testing.assert_allclose(predicted.mean, np.tile(single.targets[:], (single.parts.n_parts, 1)), rtol=1e-6)
        assert np.isfinite(predicted.ood).all()
    with pytest.raises(DataValueError, match="bandwidth="):
        fit(single)


def test_far_from_all_spots_the_nearest_counts_and_the_place_is_marked(section):
    far = section.parts.coordinates.copy()
    far[0] = 1e6
    section = replace(section, parts=replace(section.parts, coordinates=far))
    predicted = fit(section).predict(section)
    assert np.isfinite(predicted.mean).all()
    assert predicted.ood[0] == 1
    assert not predicted.ood[1:].any()


def test_weights_sum_to_1_however_far():
    weight = gaussian_weights(np.array([[0.0, 1.0], [1e5, 1e5 + 1]]), 1.0)
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    np.testing.assert_allclose(weight[0], [1, np.exp(-0.5)] / (1 + np.exp(-0.5)))


def test_another_section_or_none(make_parts, section):
    model = fit(section)
    with pytest.raises(ModelMismatchError, match="fitted on"):
        model.predict(make_parts(side=30)[0])
    with pytest.raises(DataValueError, match="no parts"):
        fit(replace(section, parts=None))


@pytest.mark.parametrize(
    "options", [{"method": "spline"}, {"bandwidth": 0}, {"power": 0}, {"neighbours": 0}, {"level": "slide"}]
)
def test_impossible_settings(options):
    with pytest.raises(DataValueError, match=next(iter(options))):
        create("interpolate", **options)


def test_pitch_off_a_lattice_and_of_several_regions():
    rng = np.random.default_rng(0)
    scattered = rng.uniform(0, 1000, size=(50, 2))
    gaps = np.sort(cdist(scattered, scattered), axis=1)[:, 1]
    assert spot_pitch(scattered) == pytest.approx(np.median(gaps))
    two = np.array([[0.0, 0], [50, 0], [1, 0], [51, 0]])
    assert spot_pitch(two, np.array([0, 0, 1, 1])) == 50
    with pytest.raises(DataValueError, match="two places"):
        spot_pitch(np.zeros((5, 2)))
