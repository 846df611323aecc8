"""Real tissue in blocks and as one image."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

import hespotex as hx
from hespotex.data.geometry import resolve_slide
from hespotex.segmentation import Watershed
from hespotex.segmentation._appearance import estimate_appearance
from hespotex.segmentation._tiled import segment_slide

from ._scenes import slide_of

CROP = (slice(3500, 5500), slice(3500, 5500))  # dense tissue, glands and stroma


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:spots left out")
def test_blocks_of_a_section_give_what_the_whole_crop_gives(data_dir) -> None:
    section = hx.datasets.her2st("C3", path=data_dir / "her2st")
    slide = resolve_slide(section)
    pixels = np.asarray(slide.levels[0].array[:, *CROP])
    image = np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
    # The appearance is that of the slide: what blocks may not estimate for themselves is the same for both.
    backend = Watershed(8.0 / slide.mpp, estimate_appearance(image))

    def segment(block_px: int, n_jobs: int):
        return segment_slide(
            slide_of(image, slide.mpp, chunk=512),
            lambda block: backend(block.pixels),
            mpp=slide.mpp,
            halo_px=backend.halo_px,
            block_px=block_px,
            n_jobs=n_jobs,
            progress_bar=False,
        )

    whole, tiled = segment(2000, 1), segment(450, 2)
    assert len(whole.ids) > 5000
    assert np.array_equal(whole.regions.boxes, tiled.regions.boxes)
    assert np.array_equal(whole.regions.features, tiled.regions.features)
    assert np.array_equal(whole.centroids(), tiled.centroids())
    assert shapely.equals_exact(whole.outlines(), tiled.outlines(), 0).all()
