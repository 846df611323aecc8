from __future__ import annotations

import numpy as np
import pytest

from hespotex.errors import DataTypeError, DataValueError, ImageFormatError
from hespotex.segmentation import Watershed, estimate_diameter, segment_watershed

from ._scenes import CYTOPLASM, GLASS, NUCLEUS, discs, f1, lattice, matched


def test_discs_are_found_each_once_with_their_area() -> None:
    image, truth = discs((300, 300), lattice((300, 300), 32), radius=8)
    labels = segment_watershed(image, mpp=0.5)
    hits, n_true, n_found = matched(truth, labels, 0.75)
    assert hits == n_true == n_found
    area = np.bincount(labels.ravel())[1:]
    assert abs(np.median(area) / (np.pi * 64) - 1) < 0.1
    assert labels.dtype == np.int32
    assert np.array_equal(np.unique(labels), np.arange(n_found + 1))


@pytest.mark.parametrize("gap", [1.6, 1.8, 2.0])
def test_touching_nuclei_of_equal_darkness_are_parted(gap: float) -> None:
    radius = 9.0
    pairs = [(80, 60), (80 + gap * radius, 60), (160, 120), (160, 120 + gap * radius)]
    image, truth = discs((180, 220), np.array(pairs, dtype=float), radius)
    hits, _, n_found = matched(truth, segment_watershed(image, mpp=18 / 8 * 0.2, diameter_um=8.1))
    assert (hits, n_found) == (4, 4)


@pytest.mark.parametrize("darkness", [0.45, 1.0])
def test_faint_nuclei_are_found_beside_dark_ones(darkness: float) -> None:
    image, truth = discs((200, 200), np.array([[80.0, 60.0], [140, 140]]), 8)
    faint = truth == 2
    image[faint] = (np.array(CYTOPLASM) * (1 - darkness) + np.array(NUCLEUS) * darkness).astype(np.uint8)
    hits, *_ = matched(truth, segment_watershed(image, mpp=0.5))
    assert hits == 2


@pytest.mark.parametrize("radius", [5.0, 10.0, 20.0])
def test_the_scale_is_estimated_from_the_image(radius: float) -> None:
    shape = (int(20 * radius), int(20 * radius))
    image, truth = discs(shape, lattice(shape, 4 * radius), radius)
    assert 0.8 < estimate_diameter(image) / (2 * radius) < 1.25
    assert f1(truth, segment_watershed(image)) > 0.95


def test_debris_and_pink_tissue_are_no_nuclei() -> None:
    image, _ = discs((200, 200), np.array([[60.0, 60.0], [120, 60], [60, 120], [120, 120]]), 8)
    image[150:154, 150:153] = NUCLEUS
    image[20:60, 150:190] = (215, 120, 170)
    labels = segment_watershed(image, mpp=0.5)
    assert labels.max() == 4
    assert not labels[145:, 145:].any()
    assert not labels[15:65, 145:].any()


@pytest.mark.parametrize("colour", [GLASS, (255, 255, 255), (0, 0, 0)])
def test_a_blank_image_has_no_nuclei(colour: tuple[int, int, int]) -> None:
    image = np.full((64, 80, 3), colour, np.uint8)
    assert segment_watershed(image, mpp=0.5).max() == 0
    assert segment_watershed(image).max() == 0


def test_noise_and_faint_print_on_glass_are_no_nuclei() -> None:
    rng = np.random.default_rng(0)
    image = np.clip(np.array(GLASS) + rng.normal(0, 2, (128, 128, 3)), 0, 255).astype(np.uint8)
    image[40:60, 40:60] -= 4
    assert segment_watershed(image, mpp=0.5).max() == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 40, 3), (0, 5, 3)])
def test_tiny_images_give_labels_of_their_shape(shape: tuple[int, int, int]) -> None:
    assert segment_watershed(np.zeros(shape, np.uint8), mpp=0.5).shape == shape[:2]


def test_bad_input_is_named() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ImageFormatError, match="uint8"):
        segment_watershed(image.astype(float), mpp=0.5)
    with pytest.raises(ImageFormatError, match=r"\(h, w, 3\)"):
        segment_watershed(image[..., 0], mpp=0.5)
    with pytest.raises(DataTypeError, match="list"):
        segment_watershed([[1]], mpp=0.5)  # type: ignore[arg-type]
    with pytest.raises(DataValueError, match="mpp=0"):
        segment_watershed(image, mpp=0)
    with pytest.raises(DataValueError, match="3 px"):
        segment_watershed(image, mpp=5)
    with pytest.raises(DataValueError, match="diameter_px=nan"):
        Watershed(float("nan"))


@pytest.mark.data
def test_expert_outlines_are_met(data_dir) -> None:
    """A few images of nuclei_dsb2018; docs/benchmarks.md has all of it."""
    import imageio.v3 as iio
    import pandas as pd

    folder = data_dir / "nuclei_dsb2018"
    names = pd.read_csv(folder / "index.csv")["id"][::7]
    scores = [
        f1(
            iio.imread(folder / "labels" / f"{name}.png"),
            segment_watershed(iio.imread(folder / "images" / f"{name}.png")),
        )
        for name in names
    ]
    assert np.mean(scores) > 0.58
