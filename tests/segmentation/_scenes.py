"""Images with nuclei in known places."""

from __future__ import annotations

import dask.array as da
import numpy as np

from hespotex.data.geometry import Level, Slide

GLASS = (236, 226, 238)
CYTOPLASM = (222, 170, 205)
NUCLEUS = (96, 62, 140)


def discs(
    shape: tuple[int, int], centres: np.ndarray, radius: float, *, noise: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """RGB image of discs on cytoplasm with a rim of glass at the left, and the true labels."""
    rng = np.random.default_rng(seed)
    image = np.empty((*shape, 3))
    image[:] = CYTOPLASM
    image[:, : shape[1] // 8] = GLASS
    truth = np.zeros(shape, dtype=np.int32)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    for name, (cx, cy) in enumerate(centres, start=1):
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        truth[inside] = name
        image[inside] = NUCLEUS
    image += rng.normal(0, noise, image.shape)
    return image.clip(0, 255).astype(np.uint8), truth


def lattice(shape: tuple[int, int], pitch: float, *, jitter: float = 4.0, seed: int = 0) -> np.ndarray:
    """Centres (x, y) about `pitch` apart, off the left eighth and the borders."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(
        np.arange(pitch, shape[0] - pitch / 2, pitch), np.arange(shape[1] / 8 + pitch, shape[1] - pitch / 2, pitch)
    )
    centres = np.column_stack([x.ravel(), y.ravel()])
    return centres + rng.uniform(-jitter, jitter, centres.shape)


def slide_of(image: np.ndarray, mpp: float = 0.5, chunk: int = 200) -> Slide:
    """A slide with one level."""
    array = da.from_array(np.moveaxis(image, -1, 0), chunks=(3, chunk, chunk))
    return Slide("image", (Level(array, 1.0),), mpp, np.diag([mpp, mpp, 1.0]))


def matched(truth: np.ndarray, found: np.ndarray, iou: float = 0.5) -> tuple[int, int, int]:
    """True positives, and numbers of true and found regions."""
    names, counts = np.unique(np.stack([truth.ravel(), found.ravel()]), axis=1, return_counts=True)
    size_true, size_found = np.bincount(truth.ravel()), np.bincount(found.ravel())
    both = (names > 0).all(axis=0)
    union = size_true[names[0]] + size_found[names[1]] - counts
    hits = int((both & (counts / union > iou)).sum())
    return hits, int((size_true[1:] > 0).sum()), int((size_found[1:] > 0).sum())


def f1(truth: np.ndarray, found: np.ndarray, iou: float = 0.5) -> float:
    """F1 of regions matched above an IoU; above 0.5 a match is unique."""
    hits, n_true, n_found = matched(truth, found, iou)
    return 2 * hits / max(n_true + n_found, 1)
