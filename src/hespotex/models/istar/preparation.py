"""What the published scripts do to image, positions and masks before training, as pure functions.

Ours reads any image at its own scale and takes tissue from :func:`hespotex.pp.detect_tissue`; these are for who wants
to repeat a published run from the raw files.
"""

from __future__ import annotations

import numpy as np

from ...annotation.clusters import kmeans, merge_small
from ...errors import DataValueError
from .spots import PIXELS, round_half_even

__all__ = ["reduce_mask", "rescale_image", "rescale_positions", "tissue_mask"]


def rescale_image(image: np.ndarray, scale: float) -> np.ndarray:
    """An RGB image (h, w, 3) uint8 enlarged by `scale`: bilinear, smoothed before shrinking, cut off to uint8.

    Examples
    --------
    >>> import numpy as np
    >>> rescale_image(np.full((8, 8, 3), 200, dtype=np.uint8), 0.5).shape
    (4, 4, 3)
    """
    from skimage.transform import rescale

    if not scale > 0:
        raise DataValueError(f"scale={scale!r} must be positive")
    scaled = rescale(np.asarray(image, dtype=np.float32), (scale, scale, 1), preserve_range=True)
    return np.asarray(scaled.astype(np.uint8))


def rescale_positions(xy: np.ndarray, scale: float) -> np.ndarray:
    """Positions or radii in pixels after :func:`rescale_image`, rounded, int64.

    Examples
    --------
    >>> rescale_positions([[3.0, 10.0]], 0.5).tolist()
    [[2, 5]]
    """
    return round_half_even(np.asarray(xy, dtype=np.float64) * scale)


def reduce_mask(mask: np.ndarray, pixels: int = PIXELS) -> np.ndarray:
    """Superpixels (h // pixels, w // pixels) more than half of which a mask (h, w) of pixels covers.

    Examples
    --------
    >>> import numpy as np
    >>> reduce_mask(np.tri(4, 4, dtype=bool), 2).tolist()
    [[True, False], [True, True]]
    """
    mask = np.asarray(mask, dtype=np.float64)
    height, width = mask.shape
    if height % pixels or width % pixels:
        raise DataValueError(f"mask of {height} × {width} pixels does not divide into superpixels of {pixels}; pad it")
    return mask.reshape(height // pixels, pixels, width // pixels, pixels).mean(axis=(1, 3)) > 0.5


def tissue_mask(
    features: np.ndarray, rgb: np.ndarray, *, margin: int = 16, min_size: int = 4000, seed: int = 0
) -> np.ndarray:
    """Tissue of a slide: of two clusters of its superpixels, the one whose colours vary more, (h, w) bool.

    Parameters
    ----------
    features
        Features of all superpixels, (h, w, k), colours included.
    rgb
        Their mean colours, (h, w, 3).
    margin
        Superpixels at each side that are background.
    min_size
        Connected pieces of fewer superpixels join what surrounds them.
    seed
        Of k-means.

    Examples
    --------
    >>> import numpy as np
    >>> rgb = np.ones((12, 12, 3)); rgb[3:9, 3:9] = np.random.default_rng(0).uniform(0, 0.4, size=(6, 6, 3))
    >>> int(tissue_mask(rgb, rgb, margin=1, min_size=4).sum())
    36
    """
    height, width, _ = features.shape
    if min(height, width) <= 2 * margin:
        raise DataValueError(f"margin={margin} leaves nothing of {height} × {width} superpixels")
    inner = (slice(margin, height - margin), slice(margin, width - margin))
    values = np.asarray(features)[inner]
    labels = kmeans(values.reshape(-1, values.shape[2]), 2, n_init=1, seed=seed).reshape(values.shape[:2])
    labels = merge_small(labels, min_size)
    spread = [rgb[inner][labels == label].std() if (labels == label).any() else 0.0 for label in (0, 1)]
    mask = np.zeros((height, width), dtype=bool)
    mask[inner] = labels == int(np.argmax(spread))
    return mask
