import numpy as np
import pytest

from hespotex import metrics as m
from hespotex.errors import DataValueError

RNG = np.random.default_rng(0)
TRAIN = [RNG.normal(size=(20, 4)), RNG.normal(size=(35, 4)) + 1]


def test_train_and_sibling_mean_are_pooled_over_observations():
    expected = np.tile(np.concatenate(TRAIN).mean(axis=0), (7, 1))
    np.testing.assert_allclose(m.null_train_mean(TRAIN, 7), expected)
    np.testing.assert_allclose(m.null_sibling_mean(TRAIN, 7), expected)
    assert (m.pearson(RNG.normal(size=(7, 4)), expected) == 0).all()


def test_coordinate_null_against_loops():
    places = [RNG.uniform(size=(20, 2)), RNG.uniform(size=(35, 2))]
    here = RNG.uniform(size=(6, 2))
    expected = np.zeros((6, 4))
    for values, place in zip(TRAIN, places, strict=True):
        for spot, point in enumerate(here):
            near = np.argsort(((place - point) ** 2).sum(axis=1))[:5]
            expected[spot] += values[near].mean(axis=0) / 2
    np.testing.assert_allclose(m.null_coordinate(TRAIN, places, here, k=5), expected)


def test_coordinate_null_with_fewer_spots_than_neighbours_is_the_mean():
    place = RNG.uniform(size=(20, 2))
    np.testing.assert_allclose(
        m.null_coordinate(TRAIN[:1], [place], place[:2], k=50), np.tile(TRAIN[0].mean(axis=0), (2, 1))
    )


def test_depth_null_learns_sign_and_scale_within_sections():
    libraries = [RNG.integers(100, 10000, len(values)) for values in TRAIN]
    slope = np.array([2.0, -1.0, 0.0, 0.5])
    train = [np.log(size)[:, None] * slope + 3 * k for k, size in enumerate(libraries)]
    library = np.array([0, 1, 500, 20000])
    result = m.null_depth(train, libraries, library)
    depth = np.log(np.maximum(library, 1))
    np.testing.assert_allclose(np.diff(result, axis=0), np.diff(depth)[:, None] * slope, atol=1e-9)


def test_density_null_is_a_line_per_gene():
    scalars = [RNG.normal(size=len(values)) for values in TRAIN]
    train = [2 + scalar[:, None] * np.array([1.0, -3.0, 0, 0.1]) for scalar in scalars]
    np.testing.assert_allclose(m.null_density(train, scalars, np.array([5.0])), [[7, -13, 2, 2.5]], atol=1e-9)
    constant = [np.ones(len(values)) for values in TRAIN]
    np.testing.assert_allclose(m.null_density(TRAIN, constant, np.ones(2))[0], np.concatenate(TRAIN).mean(axis=0))


def test_shuffle_permutes_spots_and_scores_about_zero():
    predicted = RNG.normal(size=(400, 50))
    shuffled = m.null_shuffle(predicted, seed=1)
    np.testing.assert_array_equal(np.sort(shuffled, axis=0), np.sort(predicted, axis=0))
    r = m.pearson(predicted, shuffled)
    assert abs(r).max() < 5 / np.sqrt(400)
    np.testing.assert_array_equal(shuffled, m.null_shuffle(predicted, seed=1))


@pytest.mark.parametrize("n_genes", [2, 3, 50])
def test_random_gene_gives_every_gene_anothers_map(n_genes):
    predicted = np.arange(n_genes, dtype=float)[None].repeat(3, axis=0)
    result = m.null_random_gene(predicted, seed=2)
    assert (result != predicted).all()
    assert sorted(result[0]) == sorted(predicted[0])


def test_random_state_is_left_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    m.null_shuffle(TRAIN[0])
    m.null_random_gene(TRAIN[0])
    m.split_half(np.ones((5, 2)), np.full(5, 10))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_nothing_to_learn_from_is_an_error():
    for call in (
        lambda: m.null_train_mean([], 3),
        lambda: m.null_sibling_mean([], 3),
        lambda: m.null_coordinate([], [], np.zeros((3, 2))),
        lambda: m.null_coordinate(TRAIN, [np.zeros((20, 2))], np.zeros((3, 2))),
        lambda: m.null_depth([], [], np.ones(3)),
        lambda: m.null_density(TRAIN, [np.ones(20)], np.ones(3)),
        lambda: m.null_random_gene(TRAIN[0][:, :1]),
    ):
        with pytest.raises(DataValueError):
            call()
