"""Scores of gene signatures, cell types by their markers, and which types are frequent in which clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataValueError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["UNCLASSIFIED", "cell_types", "enrichment", "signature_score"]

UNCLASSIFIED = "Unclassified"


def signature_score(
    values: np.ndarray,
    genes: Sequence[str],
    signature: Sequence[str],
    *,
    min_max: float = 1e-3,
    quantiles: tuple[float, float] | None = (0.001, 0.999),
) -> np.ndarray:
    """Mean over a signature's genes of their expression scaled to [0, 1] over the section, (m,) float64.

    Parameters
    ----------
    values
        Expression of cells or superpixels, (m, G); rows with NaN are no tissue and score NaN.
    genes
        Names of the columns.
    signature
        Genes of the signature; those that `genes` lacks are left out.
    min_max
        Genes whose maximum is smaller are left out.
    quantiles
        Scores are cut at these quantiles; ``None`` leaves them.

    Raises
    ------
    DataValueError
        If no gene of the signature is left.

    Examples
    --------
    >>> import numpy as np
    >>> signature_score(np.array([[0.0, 9.0], [4.0, 9.0]]), ["A", "B"], ["A"], quantiles=None).tolist()
    [0.0, 1.0]
    """
    values = np.asarray(values)
    place = {str(gene): column for column, gene in enumerate(genes)}
    found = [place[str(gene)] for gene in signature if str(gene) in place]
    if not found:
        raise DataValueError(f"none of the genes {list(map(str, signature))[:5]} of the signature is among the genes")
    chosen = values[:, found].astype(np.float64)
    inside = np.isfinite(chosen).all(axis=1)
    if not inside.any():
        raise DataValueError("values has no row without NaN")
    chosen = chosen[inside]
    kept = chosen.max(axis=0) >= min_max
    if not kept.any():
        raise DataValueError(
            f"no gene of the signature reaches {min_max:g} anywhere; give min_max=0 to score it anyway"
        )
    score = np.full(len(values), np.nan)
    score[inside] = _scaled(chosen[:, kept]).mean(axis=1)
    if quantiles is not None:
        score[inside] = np.clip(score[inside], *np.quantile(score[inside], quantiles))
    return score


def cell_types(
    values: np.ndarray,
    genes: Sequence[str],
    markers: Mapping[str, Sequence[str]],
    *,
    threshold: float = 0.01,
    min_max: float = 1e-3,
) -> tuple[np.ndarray, np.ndarray]:
    """The type whose markers score highest, and that score as confidence: (m,) of names and (m,) float64.

    Parameters
    ----------
    values
        Expression of cells or superpixels, (m, G); rows with NaN are no tissue and stay unclassified.
    genes
        Names of the columns.
    markers
        Marker genes of each type; the first type wins a tie.
    threshold
        Least score; below it a row is ``"Unclassified"``.
    min_max
        As for :func:`signature_score`.

    Raises
    ------
    DataValueError
        If there are no types, or one has no marker among the genes.
    """
    if not markers:
        raise DataValueError("markers is empty: name at least one cell type and its genes")
    scores = np.empty((len(values), len(markers)))
    for column, (name, signature) in enumerate(markers.items()):
        try:
            scores[:, column] = signature_score(values, genes, signature, min_max=min_max)
        except DataValueError as error:
            raise DataValueError(f"cell type {name!r}: {error}") from error
    names = np.array([*map(str, markers), UNCLASSIFIED], dtype=object)
    inside = np.isfinite(scores).all(axis=1)
    best = np.where(inside, np.nan_to_num(scores, nan=-np.inf).argmax(axis=1), len(markers))
    confidence = np.where(inside, scores[np.arange(len(scores)), np.minimum(best, len(markers) - 1)], np.nan)
    best = np.where(confidence >= threshold, best, len(markers))
    return names[best], confidence


def enrichment(
    clusters: np.ndarray, types: np.ndarray, *, pseudocount: float = 0.5, blank_below: float = 2**0.05
) -> pd.DataFrame:
    """How much more frequent each cell type is in each cluster than elsewhere.

    Parameters
    ----------
    clusters
        Cluster of each cell, (m,) int; negative ones are left out.
    types
        Type of each cell, (m,).
    pseudocount
        Added to each of the four counts, so that a ratio exists where one is 0.
    blank_below
        Odds ratios below it get no logarithm, as in the published figures.

    Returns
    -------
    One row per cluster and type: ``cluster``, ``type``, ``count``, ``proportion`` of the cluster, ``odds_ratio``,
    ``log2_odds_ratio`` (NaN where blank). Superpixels lean on their neighbours, so that no p-value is given.

    Examples
    --------
    >>> import numpy as np
    >>> table = enrichment(np.array([0, 0, 0, 1, 1, 1]), np.array(list("aabbba")), pseudocount=0)
    >>> float(table.query("cluster == 0 and type == 'a'")["odds_ratio"].iloc[0])
    4.0
    """
    import pandas as pd

    clusters, types = np.asarray(clusters).ravel(), np.asarray(types).ravel()
    if len(clusters) != len(types):
        raise DataValueError(f"clusters has {len(clusters)} cells, types has {len(types)}")
    kept = clusters >= 0
    if not kept.any():
        raise DataValueError("clusters holds no cell in tissue: all are negative")
    if pseudocount < 0:
        raise DataValueError(f"pseudocount={pseudocount!r} must not be negative")
    rows, row = np.unique(clusters[kept], return_inverse=True)
    columns, column = np.unique(types[kept].astype(str), return_inverse=True)
    joint = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(joint, (row, column), 1)
    in_cluster, of_type, n = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True), joint.sum()
    here, other_type = joint + pseudocount, in_cluster - joint + pseudocount
    other_cluster, neither = of_type - joint + pseudocount, n - in_cluster - of_type + joint + pseudocount
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = (here * neither) / (other_type * other_cluster)
        log2 = np.where(odds >= blank_below, np.log2(odds), np.nan)
    return pd.DataFrame(
        {
            "cluster": np.repeat(rows, len(columns)),
            "type": np.tile(columns, len(rows)),
            "count": joint.ravel(),
            "proportion": (joint / in_cluster).ravel(),
            "odds_ratio": odds.ravel(),
            "log2_odds_ratio": log2.ravel(),
        }
    )


def _scaled(values: np.ndarray) -> np.ndarray:
    """Columns scaled to [0, 1]; constant ones become 0."""
    low, high = values.min(axis=0), values.max(axis=0)
    return (values - low) / np.where(high > low, high - low, 1.0)
