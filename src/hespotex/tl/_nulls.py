"""The nulls of one fold, from training sections and the section to predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .. import metrics
from .._keys import Keys

__all__ = ["Evidence", "nulls_of_prediction", "nulls_of_training"]

_DENSITY: Final = (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What nulls may look at in one section.

    Attributes
    ----------
    patient
        Patient of the section.
    values
        Measured expression, (n, G), in the unit of the comparison.
    library_size
        Total counts, (n,).
    positions
        Positions in the frame of the array, (n, 2), or ``None``.
    scalars
        Scalars of the image by name, each (n,).
    """

    patient: str
    values: np.ndarray
    library_size: np.ndarray
    positions: np.ndarray | None
    scalars: Mapping[str, np.ndarray]


def nulls_of_training(train: Sequence[Evidence], test: Evidence) -> dict[str, np.ndarray]:
    """Nulls that learn from training sections, by name, each (n, G).

    Those that need other sections of the same patient, positions, or a scalar of the image, are left out where there is
    none. ``null_depth`` reads the library size of the test section: a sign of missing depth normalisation, no predictor.
    """
    values = [section.values for section in train]
    found = {
        "null_train_mean": metrics.null_train_mean(values, len(test.values)),
        "null_depth": metrics.null_depth(values, [section.library_size for section in train], test.library_size),
    }
    siblings = [section for section in train if section.patient == test.patient]
    if siblings:
        measured = [section.values for section in siblings]
        found["null_sibling_mean"] = metrics.null_sibling_mean(measured, len(test.values))
        places = [section.positions for section in siblings if section.positions is not None]
        if test.positions is not None and len(places) == len(siblings):
            found["null_coordinate"] = metrics.null_coordinate(measured, places, test.positions)
    for name in _DENSITY:
        if name in test.scalars and all(name in section.scalars for section in train):
            scalars = [section.scalars[name] for section in train]
            found["null_density"] = metrics.null_density(values, scalars, test.scalars[name])
            break
    return found


def nulls_of_prediction(predicted: np.ndarray, label: str, *, seed: int) -> dict[str, np.ndarray]:
    """Nulls made of a model's own prediction: spots permuted, and genes exchanged."""
    found = {f"null_shuffle:{label}": metrics.null_shuffle(predicted, seed=seed)}
    if predicted.shape[1] > 1:
        found[f"null_random_gene:{label}"] = metrics.null_random_gene(predicted, seed=seed)
    return found
