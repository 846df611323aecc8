"""All scores of one section as a tidy table, one row per gene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import DataValueError
from ._correlation import pearson, spearman
from ._error import mae, mse, nrmse, r2, rmse
from ._inputs import NanPolicy, is_flat, is_undefined, pair_of
from ._spread import variance_ratio
from ._ssim import Windows, ssim

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DEFAULT_METRICS", "METRICS", "score"]

_PLAIN: Final[dict[str, Callable[..., np.ndarray]]] = {
    "pearson": pearson,
    "spearman": spearman,
    "mse": mse,
    "rmse": rmse,
    "mae": mae,
    "nrmse": nrmse,
    "variance_ratio": variance_ratio,
}
METRICS: Final = (*_PLAIN, "r2", "ssim")
DEFAULT_METRICS: Final = ("pearson", "spearman", "rmse", "mae", "nrmse", "r2", "variance_ratio")


def score(
    measured: np.ndarray,
    predicted: np.ndarray,
    genes: Sequence[str],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    training_mean: np.ndarray | None = None,
    windows: Windows | None = None,
    nan_policy: NanPolicy = "raise",
) -> pd.DataFrame:
    """Score every gene of one section.

    Parameters
    ----------
    measured, predicted
        (n, G) in the same unit.
    genes
        Names of the columns.
    metrics
        Names out of :data:`METRICS`.
    training_mean
        Training mean of each gene, (G,), for ``"r2"``, which is NaN without it.
    windows
        Windows of :func:`lattice_windows`, for ``"ssim"``.
    nan_policy
        As in :func:`pearson`.

    Returns
    -------
    Columns ``gene``, ``n_spots``, the metrics, ``undefined`` (the measurement is constant or missing: every
    metric is NaN) and ``flat`` (the prediction is constant where the measurement is not).

    Examples
    --------
    >>> import numpy as np
    >>> from hespotex.metrics import score
    >>> truth = np.arange(6.0).reshape(3, 2)
    >>> score(truth, truth, ["A", "B"], metrics=["pearson"])["pearson"].round(6).tolist()
    [1.0, 1.0]
    """
    import pandas as pd

    if unknown := [name for name in metrics if name not in METRICS]:
        raise DataValueError(f"metrics={unknown} are unknown; possible: {', '.join(map(repr, METRICS))}")
    if "ssim" in metrics and windows is None:
        raise DataValueError(
            "metric 'ssim' needs windows=, from hespotex.metrics.lattice_windows(array_row, array_col)"
        )
    measured, predicted = pair_of(measured, predicted, nan_policy)
    if len(genes) != measured.shape[1]:
        raise DataValueError(f"{len(genes)} genes for {measured.shape[1]} columns")
    columns: dict[str, Any] = {"gene": np.asarray(genes, dtype=object), "n_spots": len(measured)}
    for name in metrics:
        if name == "r2":
            mean = np.full(len(genes), np.nan) if training_mean is None else training_mean
            columns[name] = r2(measured, predicted, mean)
        elif name == "ssim" and windows is not None:
            columns[name] = ssim(measured, predicted, windows)
        else:
            columns[name] = _PLAIN[name](measured, predicted)
    columns["undefined"] = is_undefined(measured)
    columns["flat"] = is_flat(predicted) & ~columns["undefined"]
    return pd.DataFrame(columns)
