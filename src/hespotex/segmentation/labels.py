"""Nuclei that somebody outlined already: label images as arrays or files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataTypeError, DataValueError, MissingKeyError

__all__ = ["check_labels", "check_numbers", "load_labels"]


def load_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """A label image saved by :func:`numpy.save`, mapped from disk and not read into memory.

    Cellpose's ``*_seg.npy`` is not one: it holds a pickled dictionary, which could run code when loaded.

    Raises
    ------
    MissingKeyError
        If there is no such file.
    DataValueError
        If it is not a plain array of whole numbers.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise MissingKeyError(f"there is no label image {str(path)!r}; give the path of an array saved with numpy.save")
    if path.suffix != ".npy":
        raise DataValueError(f"{path.name!r} is not a .npy file; save the label image with numpy.save(path, labels)")
    try:
        labels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataValueError(
            f"{path.name!r} holds no plain array ({error}). Pickled files such as Cellpose's *_seg.npy are refused, because "
            f"loading one can run any code. If it is your own, take the masks out of it once: "
            f"masks = numpy.load({path.name!r}, allow_pickle=True).item()['masks']; numpy.save('masks.npy', masks)"
        ) from error
    return check_labels(labels, path.name)


def check_labels(labels: Any, what: str) -> Any:
    """Raise unless `labels` is an (h, w) array of whole numbers; boolean masks do not tell nuclei apart.

    The numbers of a lazy array are not looked at here, but block by block where it is read.

    Raises
    ------
    DataTypeError
        If it is no array, or of floats or booleans.
    DataValueError
        If it has not two axes, or a number is negative.
    """
    if not hasattr(labels, "dtype") or not hasattr(labels, "shape"):
        raise DataTypeError(f"{what} must be a label image, got {type(labels).__name__}")
    if np.dtype(labels.dtype).kind not in "iu":
        advice = (
            "number the nuclei: skimage.measure.label(mask)"
            if labels.dtype == bool
            else "cast them: labels.astype(int)"
        )
        raise DataTypeError(f"{what} must hold whole numbers, 0 for background, got {labels.dtype}; {advice}")
    if len(labels.shape) != 2:
        raise DataValueError(f"{what} must have two axes (y, x), got shape {tuple(labels.shape)}")
    return check_numbers(labels, what) if isinstance(labels, np.ndarray) else labels


def check_numbers(labels: np.ndarray, what: str) -> np.ndarray:
    """Raise if a label is negative, which is neither background nor a nucleus, or too large for an id.

    Raises
    ------
    DataValueError
        Naming the label and what to do.
    """
    if labels.size and labels.dtype.kind == "i" and (lowest := labels.min()) < 0:
        raise DataValueError(
            f"{what} holds the negative label {lowest}; nuclei have positive numbers and 0 is background: set what is "
            "no nucleus to 0, labels[labels < 0] = 0"
        )
    if labels.size and labels.dtype == np.uint64 and (highest := labels.max()) > np.iinfo(np.int64).max:
        raise DataValueError(
            f"{what} holds the label {highest}, too large for an id; number the nuclei anew, for instance with "
            "skimage.segmentation.relabel_sequential"
        )
    return labels
