from __future__ import annotations

import numpy as np
import pytest
from shapely import MultiPolygon, Point, affinity, box

from hespotex.segmentation._outline import FEATURES, measure_regions
from hespotex.segmentation._polygons import SHAPE_FEATURES, largest_pieces, measure_polygons

from ._scenes import discs, lattice


def named(polygons, mpp=1.0):
    values = measure_polygons(np.array(polygons, dtype=object), mpp)
    return [dict(zip(SHAPE_FEATURES, row, strict=True)) for row in values.tolist()]


def test_shapes_whose_numbers_are_known():
    ellipse = affinity.rotate(affinity.scale(Point(3, 4).buffer(1, 128), 6, 2), 30)
    found, turned, square = named([ellipse, ellipse.reverse(), box(10, 10, 14, 14)], mpp=0.5)
    assert found == pytest.approx(turned)
    assert found["area_um2"] == pytest.approx(np.pi * 12 / 4, rel=1e-3)
    assert (found["major_axis_um"], found["minor_axis_um"]) == pytest.approx((6, 2), rel=1e-3)
    assert found["eccentricity"] == pytest.approx(np.sqrt(1 - 1 / 9), rel=1e-3)
    assert found["solidity"] == pytest.approx(1)
    assert square["circularity"] == pytest.approx(np.pi / 4)
    assert square["eccentricity"] == pytest.approx(0)


def test_of_several_pieces_the_largest_and_no_holes():
    ring = Point(0, 0).buffer(5).difference(Point(0, 0).buffer(2))
    many = np.array([MultiPolygon([box(0, 0, 1, 1), box(5, 5, 8, 8)]), ring, box(0, 0, 2, 2)], dtype=object)
    areas = [piece.area for piece in largest_pieces(many)]
    assert areas == pytest.approx([9, Point(0, 0).buffer(5).area, 4])


def test_about_the_numbers_of_a_label_image():
    image, labels = discs((200, 200), lattice((200, 200), 30), 8)
    regions = measure_regions(labels, image, 0.5, simplify_um=0)
    found = measure_polygons(regions.polygons, 0.5)
    assert FEATURES[: len(SHAPE_FEATURES)] == SHAPE_FEATURES
    np.testing.assert_allclose(found[:, :4], regions.features[:, :4], rtol=0.02)
    np.testing.assert_allclose(found[:, 4:], regions.features[:, 4:7], atol=0.05)
