"""Segmentation by expression; the published defaults are statement 18 of the iStar checklist."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from hespotex.annotation.clusters import by_size, components, gaussian, kmeans, merge_small, segment, subclusters
from hespotex.errors import DataValueError


@pytest.fixture(scope="session")
def istar(data_dir):
    folder = data_dir / "golden" / "istar"
    if not folder.is_dir():
        pytest.skip(f"{data_dir} holds no golden/istar")
    return lambda name: np.load(folder / f"{name}.npz")


def rand_index(a, b):
    from sklearn.metrics import adjusted_rand_score

    inside = b >= 0
    assert np.array_equal(a >= 0, inside)
    return adjusted_rand_score(a[inside], b[inside])


@pytest.mark.data
def test_smoothing_equals_the_published(istar):
    recorded = istar("smoothing")
    np.testing.assert_allclose(gaussian(recorded["f"]), recorded["gauss8"], atol=1e-5)
    np.testing.assert_allclose(gaussian(recorded["impulse"]), recorded["impulse_gauss8"], atol=1e-5)
    filled = gaussian(recorded["inpainted"])
    filled[np.isnan(recorded["f_nan"])] = np.nan
    np.testing.assert_allclose(filled, recorded["gauss8_nan"], atol=1e-5)


@pytest.mark.data
def test_merging_equals_the_published(istar):
    recorded = istar("clustering")
    np.testing.assert_array_equal(merge_small(recorded["distinct_labels"], 13), recorded["distinct_merged13"])
    np.testing.assert_array_equal(merge_small(recorded["toy_labels"], 4), recorded["toy_merged4"])
    # The order of equal sizes is arbitrary in the original.
    assert (merge_small(recorded["toy_labels"], 12) != recorded["toy_merged12"]).mean() < 0.04
    assert (merge_small(recorded["labels_km4"], 20) != recorded["labels_km4_merged20"]).mean() < 0.04


@pytest.mark.data
def test_numbering_and_pieces_equal_the_published(istar):
    recorded = istar("clustering")
    labels = recorded["toy_labels"]
    np.testing.assert_array_equal(by_size(labels), recorded["toy_sorted"])
    ours, theirs = components(labels), recorded["toy_components"]
    for label in range(3):  # equal sizes are in arbitrary order
        sizes = [np.unique(pieces[labels == label], return_counts=True)[1] for pieces in (ours, theirs)]
        np.testing.assert_array_equal(*sizes)
        pairs = np.unique(np.stack([ours, theirs])[:, labels == label], axis=1)
        assert pairs.shape[1] == len(sizes[0])
    np.testing.assert_array_equal(ours == -1, labels == -1)


@pytest.mark.data
def test_k_means_equals_the_published(istar):
    recorded = istar("clustering")
    embedding = recorded["embedding"].transpose(1, 2, 0)
    labels = kmeans(embedding.reshape(-1, 6), 4, n_init=1).reshape(48, 44)
    assert rand_index(labels, recorded["labels_km4"]) > 0.99


@pytest.mark.data
def test_checklist_18_segmentation_equals_the_published(istar):
    """σ = 2 cells (window 17), k-means with seed 0, pieces below 20 merged, numbered by size."""
    recorded = istar("clustering")
    embedding = recorded["embedding"].transpose(1, 2, 0)
    expected = recorded["labels_filter8_km4_merged20"]
    assert rand_index(segment(embedding, 4), expected) > 0.97  # masked smoothing in place of inpainting
    cv2 = pytest.importorskip("cv2")
    hole = np.isnan(embedding[..., 0])
    filled = [cv2.inpaint(np.nan_to_num(embedding[..., c]), hole.astype(np.uint8), 3, cv2.INPAINT_NS) for c in range(6)]
    smooth = gaussian(np.stack(filled, axis=-1))
    smooth[hole] = np.nan
    assert rand_index(segment(smooth, 4, sigma=0, n_init=1), expected) > 0.99


def test_checklist_18_defaults():
    defaults = {name: each.default for name, each in inspect.signature(segment).parameters.items()}
    assert defaults["n_clusters"] == 10
    assert (defaults["sigma"], defaults["min_size"], defaults["seed"]) == (2.0, 20, 0)
    impulse = np.zeros((41, 41))
    impulse[20, 20] = 1
    assert np.flatnonzero(gaussian(impulse)[20]).tolist() == list(range(12, 29))  # window 17


def test_holes_stay_and_do_not_leak():
    raster = np.ones((30, 30, 2))
    raster[:, :10] = np.nan
    raster[..., 1] *= 3
    smooth = gaussian(raster)
    np.testing.assert_array_equal(np.isnan(smooth), np.isnan(raster))
    np.testing.assert_allclose(smooth[:, 10:], raster[:, 10:], rtol=1e-6)
    half = raster.copy()
    half[0, 12, 1] = np.nan  # holes that differ between channels
    np.testing.assert_allclose(gaussian(half)[1, 12], [1, 3], rtol=1e-6)


def test_segments_are_found_and_numbered_by_size():
    rng = np.random.default_rng(0)
    truth = np.zeros((40, 40), dtype=int)
    truth[:15], truth[30:, 20:] = 1, 2
    truth[:, :4] = -1
    raster = np.eye(3)[truth] + 0.3 * rng.normal(size=(40, 40, 3))
    raster[truth < 0] = np.nan
    labels = segment(raster, 3, min_size=20)
    assert rand_index(labels, truth) > 0.9
    assert (np.diff(np.bincount(labels[labels >= 0])) <= 0).all()
    assert components(labels)[labels >= 0].max() == 0
    inner = subclusters(raster, labels, 2)
    assert np.unique(inner[labels >= 0]).tolist() == [0, 1]
    np.testing.assert_array_equal(inner < 0, labels < 0)


def test_chains_of_small_pieces_move_together():
    labels = np.full((7, 9), 0)
    labels[3, 4] = 1  # its only neighbours are 2, which is small itself and then goes to 0
    labels[2:5, 3:6][labels[2:5, 3:6] == 0] = 2
    merged = merge_small(labels, 10)
    assert (merged == 0).all()
    assert merge_small(labels, 1).tolist() == labels.tolist()
    alone = np.full((3, 3), -1)
    alone[1, 1] = 4
    np.testing.assert_array_equal(merge_small(alone, 5), alone)
    np.testing.assert_array_equal(merge_small(np.full((3, 3), -1)), -1)
    assert components(np.full((2, 2), -1)).max() == -1


def test_bad_input():
    with pytest.raises(DataValueError, match="n_clusters=5"):
        kmeans(np.ones((3, 2)), 5)
    with pytest.raises(DataValueError, match="n_clusters=0"):
        kmeans(np.ones((3, 2)), 0)
    with pytest.raises(DataValueError, match="sigma"):
        gaussian(np.ones((3, 3)), -1.0)
    with pytest.raises(DataValueError, match="n_clusters=2"):
        segment(np.full((3, 3, 2), np.nan), 2)
