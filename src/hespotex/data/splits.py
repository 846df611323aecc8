"""Which sections train and which test. No patient is ever on both sides.

Plain arrays in, indices out; nothing here knows expression values, so nothing can leak through it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataValueError, HespotexWarning, LeakageError

__all__ = ["Fold", "check_folds", "group_folds", "spatial_blocks"]


@dataclass(frozen=True, eq=False)
class Fold:
    """One split.

    Attributes
    ----------
    name
        Name of the fold: the group left out, or its number.
    train, test
        Indices of sections.
    """

    name: str
    train: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.train) or not len(self.test):
            raise DataValueError(f"fold {self.name!r} has no {'training' if not len(self.train) else 'test'} data")
        if len(np.intersect1d(self.train, self.test)):
            raise LeakageError(f"fold {self.name!r}: the same data are in training and test")


def group_folds(groups: Sequence[str], n_splits: int | None = None, *, seed: int = 0) -> list[Fold]:
    """Split sections so that each group is tested once and never split.

    Parameters
    ----------
    groups
        Patient of each section.
    n_splits
        Number of folds; ``None`` leaves one group out at a time. With fewer folds than groups, shuffled groups are dealt
        out, largest first, so that folds are about equally large.
    seed
        Seed of the shuffle.

    Returns
    -------
    Folds of section indices, in the order of the groups.

    Raises
    ------
    DataValueError
        If there are fewer groups than folds, or a single group.

    Examples
    --------
    >>> from hespotex.data.splits import group_folds
    >>> [(fold.name, fold.test.tolist()) for fold in group_folds(["P1", "P1", "P2"])]
    [('P1', [0, 1]), ('P2', [2])]
    """
    of_section = np.asarray([str(group) for group in groups])
    names = list(dict.fromkeys(of_section.tolist()))
    if len(names) < 2:
        raise DataValueError(
            f"groups: all {len(of_section)} sections belong to {names[0] if names else 'no group'!r}, so nobody can be left "
            "out. For adjacent sections of one patient, name the sections as groups and pass force=True; the "
            "result is then not a score on an unseen patient"
        )
    if n_splits is None:
        return [_fold(name, np.isin(of_section, name)) for name in names]
    if not 2 <= n_splits <= len(names):
        raise DataValueError(f"n_splits={n_splits} must lie between 2 and the number of groups, {len(names)}")
    shuffled = np.random.default_rng(seed).permutation(len(names))
    sizes = np.array([(of_section == name).sum() for name in names])
    load, fold_of = np.zeros(n_splits), np.empty(len(names), dtype=np.int64)
    for group in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of[group] = int(np.argmin(load))
        load[fold_of[group]] += sizes[group]
    members = [[name for name, fold in zip(names, fold_of, strict=True) if fold == k] for k in range(n_splits)]
    return [_fold(str(k), np.isin(of_section, inside)) for k, inside in enumerate(members)]


def _fold(name: str, is_test: np.ndarray) -> Fold:
    return Fold(name, np.flatnonzero(~is_test), np.flatnonzero(is_test))


def check_folds(folds: Sequence[Fold], patients: Sequence[str], *, force: bool = False) -> None:
    """Raise if a patient is in the training and in the test part of a fold.

    Parameters
    ----------
    folds
        Folds of section indices.
    patients
        Patient of each section, whatever the groups of the folds were.
    force
        Warn instead.

    Raises
    ------
    LeakageError
        Naming the patient and the fold.

    Warns
    -----
    HespotexWarning
        With `force`, that the result is no score on an unseen patient.
    """
    of_section = [str(patient) for patient in patients]
    shared: dict[str, list[str]] = {}
    for fold in folds:
        both = {of_section[index] for index in fold.train} & {of_section[index] for index in fold.test}
        if both:
            shared[fold.name] = sorted(both)
    if not shared:
        return
    leaking = sorted({patient for inside in shared.values() for patient in inside})
    found = f"patient {', '.join(map(repr, leaking))} is in training and test of fold {', '.join(map(repr, shared))}"
    if not force:
        raise LeakageError(
            f"groups: {found}. Adjacent sections of one tumour are near-copies; split by patient (groups=None), or pass "
            "force=True to get a score that says nothing about an unseen patient"
        )
    warnings.warn(
        f"{found}: adjacent sections of one tumour are near-copies, and this score says nothing about an unseen patient",
        HespotexWarning,
        stacklevel=3,
    )


def spatial_blocks(coordinates: np.ndarray, *, side_um: float | None = None, n_blocks: int = 20) -> np.ndarray:
    """Square blocks of neighbouring observations of one section.

    Parameters
    ----------
    coordinates
        Centres in µm, (n, 2).
    side_um
        Side of a block; by default such that about `n_blocks` blocks cover the observations.
    n_blocks
        Blocks aimed at when no side is given.

    Returns
    -------
    Block of each observation, (n,) int, numbered from 0 without gaps.

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.data.splits import spatial_blocks
    >>> spatial_blocks(np.array([[0.0, 0], [90, 0], [110, 0]]), side_um=100)
    array([0, 0, 1])
    """
    points = np.asarray(coordinates, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or not np.isfinite(points).all():
        raise DataValueError(f"coordinates must be finite centres (n, 2), got shape {points.shape}")
    offset = points - points.min(axis=0)
    if side_um is None:
        side_um = _side(offset, n_blocks)
    if not side_um > 0:
        raise DataValueError(f"side_um={side_um} must be positive")
    cell = np.floor(offset / side_um).astype(np.int64)
    return np.unique(cell, axis=0, return_inverse=True)[1].ravel()


def _side(offset: np.ndarray, n_blocks: int) -> float:
    """Side at which about `n_blocks` occupied blocks result: tissue seldom fills its bounding box."""
    if n_blocks < 1:
        raise DataValueError(f"n_blocks={n_blocks} must be at least 1")
    extent = offset.max(axis=0)
    largest = float(extent.max())
    if largest == 0:
        return 1.0
    sides = largest * 1.000001 / np.arange(1, 4 * int(np.ceil(np.sqrt(n_blocks))) + 2)
    occupied = [len(np.unique(np.floor(offset / side).astype(np.int64), axis=0)) for side in sides]
    return float(sides[int(np.argmin(np.abs(np.array(occupied) - n_blocks)))])
