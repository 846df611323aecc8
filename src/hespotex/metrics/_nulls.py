"""Predictors that know (almost) nothing: what a model has to beat, and what a protocol must not reward.

Each returns a prediction of one test section, (n, G), or what stands for one. Nulls that need a fitted model
(``null_handcrafted``, ``null_encoder_ridge``) are run by :func:`hespotex.tl.cross_validate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DataValueError

__all__ = [
    "null_coordinate",
    "null_density",
    "null_depth",
    "null_random_gene",
    "null_shuffle",
    "null_sibling_mean",
    "null_train_mean",
]


def _pooled_mean(sections: Sequence[np.ndarray], name: str) -> np.ndarray:
    if not len(sections):
        raise DataValueError(f"{name} is empty: the null has nothing to learn from")
    total = sum(np.asarray(values, dtype=np.float64).sum(axis=0) for values in sections)
    return np.asarray(total / sum(len(values) for values in sections))


def null_train_mean(train: Sequence[np.ndarray], n_obs: int) -> np.ndarray:
    """Mean of each gene over all training observations, repeated for `n_obs` observations.

    Its correlation within a section is 0 by the rule for flat maps; its error is the one to beat.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import null_train_mean
    >>> null_train_mean([np.array([[1.0], [3.0]])], 2)
    array([[2.],
           [2.]])
    """
    return np.tile(_pooled_mean(train, "train"), (n_obs, 1))


def null_sibling_mean(siblings: Sequence[np.ndarray], n_obs: int) -> np.ndarray:
    """Mean of each gene over the *other sections of the same patient*: what a patient leak is worth."""
    return np.tile(_pooled_mean(siblings, "siblings"), (n_obs, 1))


def null_coordinate(
    siblings: Sequence[np.ndarray],
    sibling_positions: Sequence[np.ndarray],
    positions: np.ndarray,
    *,
    k: int = 20,
) -> np.ndarray:
    """Mean of the `k` nearest array positions in each sibling section, averaged over siblings.

    Uses no image at all: what leave-one-section-out rewards by itself.

    Parameters
    ----------
    siblings
        Measured expression of other sections of the same patient, each (m, G).
    sibling_positions
        Their positions in the shared array frame, each (m, 2).
    positions
        Positions of the section to predict, (n, 2).
    k
        Neighbours per sibling.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import null_coordinate
    >>> place = np.array([[0.0, 0], [9, 9]])
    >>> null_coordinate([np.array([[1.0], [5.0]])], [place], place, k=1)
    array([[1.],
           [5.]])
    """
    from scipy.spatial import cKDTree

    if not len(siblings) or len(siblings) != len(sibling_positions):
        raise DataValueError(f"{len(siblings)} siblings and {len(sibling_positions)} sets of positions: give one each")
    total = 0.0
    for values, places in zip(siblings, sibling_positions, strict=True):
        near = cKDTree(places).query(positions, k=np.arange(1, min(k, len(places)) + 1))[1]
        total = total + np.stack([np.asarray(values, dtype=np.float64)[column] for column in near.T]).mean(axis=0)
    return np.asarray(total / len(siblings))


def _on_scalar(train: Sequence[np.ndarray], train_scalar: Sequence[np.ndarray], scalar: np.ndarray) -> np.ndarray:
    """Every gene as a line in one scalar: slope from within training sections, mean from all of them."""
    if not len(train) or len(train) != len(train_scalar):
        raise DataValueError(f"{len(train)} training sections and {len(train_scalar)} scalars: give one each")
    product, square, total, count = 0.0, 0.0, 0.0, 0
    for values, x in zip(train, train_scalar, strict=True):
        y, x = np.asarray(values, dtype=np.float64), np.asarray(x, dtype=np.float64)
        centred = x - x.mean()
        product = product + centred @ (y - y.mean(axis=0))
        square, total, count = square + float(centred @ centred), total + float(x.sum()), count + len(x)
    slope = product / square if square > 0 else np.zeros(train[0].shape[1])
    centred = np.asarray(scalar, dtype=np.float64) - total / count
    return np.asarray(_pooled_mean(train, "train") + centred[:, None] * slope)


def _log_depth(library_size: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(library_size, dtype=np.float64), 1))


def null_depth(
    train: Sequence[np.ndarray], train_library_size: Sequence[np.ndarray], library_size: np.ndarray
) -> np.ndarray:
    """Log library size of the *test* observations, with each gene's sign and scale learnt on training sections.

    A diagnostic, not a legal predictor: it reads test counts. A high score says that the target is not
    normalised for depth.

    Parameters
    ----------
    train
        Measured expression of training sections, each (m, G).
    train_library_size, library_size
        Total counts over all genes, each (m,), and of the section to predict, (n,).
    """
    return _on_scalar(train, [_log_depth(values) for values in train_library_size], _log_depth(library_size))


def null_density(train: Sequence[np.ndarray], train_scalar: Sequence[np.ndarray], scalar: np.ndarray) -> np.ndarray:
    """One scalar of the image per observation (number of nuclei, mean hematoxylin): a line per gene.

    Legal, and often hard to beat.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import null_density
    >>> null_density([np.array([[0.0], [2.0]])], [np.array([1.0, 2.0])], np.array([3.0]))
    array([[4.]])
    """
    return _on_scalar(train, train_scalar, scalar)


def null_shuffle(predicted: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """The prediction with its observations permuted: the floor, 0 up to ``1 / sqrt(n)``."""
    return np.asarray(predicted)[np.random.default_rng(seed).permutation(len(predicted))]


def null_random_gene(predicted: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """The prediction with every gene given another gene's map: what is not specific to a gene.

    Raises
    ------
    DataValueError
        With fewer than two genes.
    """
    predicted = np.asarray(predicted)
    n_genes = predicted.shape[1]
    if n_genes < 2:
        raise DataValueError("null_random_gene needs at least two genes")
    order = np.random.default_rng(seed).permutation(n_genes)
    donor = np.empty(n_genes, dtype=np.int64)
    donor[order] = np.roll(order, 1)  # one cycle through all genes: nobody keeps its own map
    return predicted[:, donor]
