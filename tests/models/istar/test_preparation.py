"""Preparation of raw files as published."""

from __future__ import annotations

import numpy as np
import pytest

from hespotex.errors import DataValueError
from hespotex.models.istar.preparation import reduce_mask, rescale_image, tissue_mask


def test_what_cannot_be_prepared_is_named():
    with pytest.raises(DataValueError, match="scale=0"):
        rescale_image(np.zeros((4, 4, 3), dtype=np.uint8), 0)
    with pytest.raises(DataValueError, match="20 × 32 pixels does not divide into superpixels of 16"):
        reduce_mask(np.zeros((20, 32), dtype=bool))
    with pytest.raises(DataValueError, match="margin=3 leaves nothing of 6 × 9"):
        tissue_mask(np.zeros((6, 9, 2)), np.zeros((6, 9, 3)), margin=3)


def test_half_a_superpixel_is_not_tissue():
    mask = np.zeros((16, 32), dtype=bool)
    mask[:8] = True
    mask[8, 20] = True
    assert reduce_mask(mask).tolist() == [[False, True]]
