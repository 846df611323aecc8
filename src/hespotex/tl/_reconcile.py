"""Make fine predictions add up to what was measured."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from .._keys import Keys, check_key
from ..data.blockwise import check_fits
from ..data.bridge import regions_of
from ..data.counts import check_counts, counts_of
from ..data.geometry import find_image_key, resolve_slide
from ..data.shares import reconcile as rescaled
from ..data.tables import resolve_table, row_positions
from ..data.transaction import restored_on_error
from ..errors import AmbiguousKeyError, DataValueError, HespotexWarning, MissingKeyError
from ._levels import new_table, note, share_of, source_of, training_of, write_table

if TYPE_CHECKING:
    from spatialdata import SpatialData

__all__ = ["reconcile"]

_GENES_AT_ONCE = 64
_TOLERANCE = 1e-3  # of a spot's count, above which a sum is called not met


def reconcile(
    sdata: SpatialData,
    from_: str,
    *,
    key: str | None = None,
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    counts_layer: str | None = None,
    key_added: str | None = None,
) -> None:
    """Rescale predicted counts of nuclei or superpixels until they add up to the measured counts of every spot.

    What a model expects of the parts of a spot agrees with its counts only so far as the model fits. Here the parts of
    a spot keep their proportions and get its counts: of a measured section, the finest map that contradicts no
    measurement. Sampling noise of the counts comes with them, so that single spots show in the map.

    Parameters
    ----------
    sdata
        Object with the prediction and the spots.
    from_
        Table of the fine shapes, such as ``"istar_superpixels"``. Its prediction is in counts; it stays as it is.
    key
        Prediction in the table `from_`; may be left out where there is one.
    table_key, shapes_key, image_key, counts_layer
        Measured table, its spots, the image of both and the layer of the counts; each may be left out where there is
        one candidate.
    key_added
        Key of the result; ``"<key>_reconciled"`` by default.

    Returns
    -------
    ``None``. Writes ``tables["<key_added>_<fine shapes>"]``, a prediction in counts, parts × genes.
    :func:`hespotex.tl.aggregate` of it gives the measured counts, to float32, of every spot that holds a part. Where
    spots overlap so that no map fits all of them, a warning says how many sums are not met. Parts outside all spots
    are scaled, gene by gene, as the measured ones are together.

    Raises
    ------
    MissingKeyError, AmbiguousKeyError
        If a table, prediction or genes are not there, or several fit.
    DataValueError
        If the prediction is in another unit than counts, or the result would replace something else.
    CountsError
        If the table holds no raw counts.

    Warns
    -----
    HespotexWarning
        If sums are not met, or spots hold no part.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=1200, n_genes=20)
    >>> hx.pp.detect_tissue(sdata)
    >>> hx.pp.superpixels(sdata, 16)
    >>> hx.pp.embed(sdata, "morphology", shapes_key="superpixels")
    >>> model = hx.tl.train(sdata, "ridge_parts")
    >>> hx.tl.predict(sdata, model)
    >>> hx.tl.reconcile(sdata, "ridge_parts_superpixels")
    >>> sums = hx.tl.aggregate(sdata, "ridge_parts_reconciled_superpixels", "spots", copy=True)
    >>> held = (sums.obs["ridge_parts_reconciled_coverage"] > 0).to_numpy()
    >>> measured = sdata["table"][:, sums.var_names].X.toarray()
    >>> bool(abs(sums.X - measured)[held].max() < 1e-3)
    True
    """
    source, values, genes, unit, name = source_of(sdata, from_, key)
    if unit != "counts":
        raise DataValueError(
            f"table {from_!r} holds a prediction in {unit!r}, of which sums mean nothing; methods that predict counts are "
            "listed by hx.models.available(), for instance hx.tl.train(sdata, 'istar')"
        )
    key_added = f"{name}_reconciled" if key_added is None else key_added
    check_key(key_added)
    if Keys.prediction_table(key_added, source.regions[0]) == from_:
        raise DataValueError(
            f"key_added={key_added!r} would replace table {from_!r} that is reconciled; choose another"
        )
    measured = resolve_table(sdata, table_key=table_key, shapes_key=shapes_key)
    if len(measured.regions) > 1 and shapes_key is None:
        raise AmbiguousKeyError(f"table {measured.key!r} annotates {list(measured.regions)}; name one with shapes_key=")
    spots = shapes_key or measured.regions[0]
    absent = sorted(set(genes) - set(measured.adata.var_names))
    if absent:
        raise MissingKeyError(
            f"{len(absent)} predicted genes are not in table {measured.key!r} ({', '.join(absent[:5])}); only measured "
            "genes can be reconciled: predict with genes="
        )
    matrix = counts_of(measured.adata, counts_layer, f"table {measured.key!r}")
    check_counts(matrix, f"table {measured.key!r}")
    fine = source.regions[0]
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=fine))
    rows, positions = row_positions(sdata, source, fine)
    spot_rows, spot_positions = row_positions(sdata, measured, spots)
    share = share_of(sdata, slide, spots, spot_positions, fine, positions)
    columns = measured.adata.var_names.get_indexer(genes)
    check_fits(len(rows), len(genes), 1, "a reconciled prediction")
    result = np.empty((len(rows), len(genes)), dtype=np.float32)
    held = np.asarray(share.sum(axis=1)).ravel() > 0
    missed = 0
    for start in range(0, len(genes), _GENES_AT_ONCE):
        block = slice(start, start + _GENES_AT_ONCE)
        counts = matrix[:, columns[block]][spot_rows]
        result[:, block] = rescaled(share, np.maximum(values[:, block][rows], 0), counts)
        y = np.asarray(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=float)[held]
        missed += int((np.abs(share[held] @ result[:, block] - y) > _TOLERANCE * np.maximum(y, 1)).sum())
    if missed:
        warnings.warn(
            f"{missed} of {int(held.sum()) * len(genes)} sums of spots are not met: the spots overlap, and no map fits all of them",
            HespotexWarning,
            stacklevel=2,
        )
    if not held.all():
        warnings.warn(
            f"{int((~held).sum())} of {len(held)} spots hold no part of {fine!r}; their counts are in no part",
            HespotexWarning,
            stacklevel=2,
        )
    own = next(region for region in regions_of(sdata, table_key=measured.key) if region.rows[0] == spot_rows[0])
    trained_on = training_of(source.adata, name)
    trained_on = {
        "training_sections": [*trained_on.get("training_sections", []), own.name],
        "training_patients": [*trained_on.get("training_patients", []), own.patient],
    }
    with restored_on_error(sdata):
        table = new_table(sdata, slide, fine, positions, result, genes)
        note(table, key_added, "X", unit, genes, function="reconcile", from_=from_, how="sum", trained_on=trained_on)
        write_table(sdata, table, Keys.prediction_table(key_added, fine))
