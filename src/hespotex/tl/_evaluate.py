"""Compare stored predictions with the measurement."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from .. import metrics as scores
from .._keys import Keys
from .._logging import logger
from .._settings import settings
from ..data.bridge import Region, attributes, regions_of
from ..data.counts import check_counts, check_names, counts_of, library_size
from ..data.provenance import read_record, record
from ..data.stored import StoredPrediction, prediction_keys, read_prediction
from ..data.tables import is_derived
from ..data.transaction import restored_on_error
from ..data.units import normalize
from ..errors import AmbiguousKeyError, DataValueError, HespotexWarning, LeakageError, MissingKeyError
from ._nulls import Evidence, nulls_of_prediction, nulls_of_training
from ._rows import scored_rows
from ._windows import windows_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

__all__ = ["evaluate"]

FITTED = "a training section"


def evaluate(
    data: SpatialData | AnnData | Sequence[SpatialData | AnnData],
    key: str | Sequence[str] | None = None,
    *,
    reference: SpatialData | AnnData | Sequence[SpatialData | AnnData] | None = None,
    groups: Sequence[str] | str | None = None,
    metrics: Sequence[str] = scores.DEFAULT_METRICS,
    nulls: bool = True,
    table_key: str | None = None,
    counts_layer: str | None = None,
    min_counts: int = 1,
    nan_policy: str = "raise",
    seed: int | None = None,
    copy: bool = False,
) -> pd.DataFrame | None:
    """Compare stored predictions with the measured counts in the predictions' own unit.

    The counts are normalised with the full library and are never smoothed; genes are correlated within a section.

    Parameters
    ----------
    data
        One or many sections with a prediction and the measurement.
    key
        Key of the prediction, or several to compare on the genes that all of them predict; may be left out where there
        is one.
    reference
        The sections the model was trained on. From them come the training mean (for ``r2``) and the nulls that learn:
        ``null_train_mean``, ``null_density``, ``null_depth`` (reads test counts: a diagnostic, no predictor) and, with
        other sections of the same patient, ``null_sibling_mean`` and ``null_coordinate``.
    groups
        Patient of each object of `data`, or the ``obs`` column that names it; what the readers noted by default.
    metrics
        Scores to compute, as in :func:`hespotex.tl.cross_validate`.
    nulls
        Whether to add rows for the nulls.
    table_key
        Table that holds prediction and counts, where there are several.
    counts_layer
        Layer with the raw counts; ``X`` by default.
    min_counts
        Spots with fewer counts are not scored.
    nan_policy
        ``"raise"``, or ``"zero"`` to score values that are not finite as 0.
    seed
        Seed of nulls and ceiling.
    copy
        Return the scores and write nothing.

    Returns
    -------
    ``None``, or with ``copy=True`` one row per model (the key), section and gene: ``model``, ``patient``, ``section``,
    ``gene``, ``n_spots``, the metrics, ``undefined``, ``flat``, ``split_half``, ``ceiling`` and ``pearson_se``
    (standard error of the section's mean r, from bootstrapped spatial blocks). Its summary,
    with skill, ceiling, r / ceiling, nulls, patients and excluded genes, is :func:`hespotex.metrics.aggregate`.
    Written otherwise, into the table of each section:

    ``var["<key>_pearson"]``, … : float
        each metric; mean over the regions of the table, NaN for genes that were not predicted or are undefined;
    ``var["<key>_ceiling"]``
        noise ceiling of each gene;
    ``uns["hespotex"]["<key>_evaluation"]``
        unit, metrics and the means over genes of this table;
    ``uns["hespotex"]["<key>"]["protocol"]``
        in words, how the sections stand to those the model was trained on, where names and patients are noted.

    Raises
    ------
    MissingKeyError
        If there is no such prediction, or nothing was measured.
    DataValueError
        If predictions to compare differ in unit, share no gene, or hold values that are not finite.
    LeakageError
        If a section to evaluate is also in `reference`.

    Warns
    -----
    HespotexWarning
        If a section was in the training of the model that predicted it.

    See Also
    --------
    hespotex.metrics.aggregate, hespotex.tl.cross_validate

    Examples
    --------
    >>> import hespotex as hx
    >>> train, test = hx.datasets.synthetic(n_patients=2, size_px=1000, n_genes=60)
    >>> hx.pp.embed(train, "morphology", progress_bar=False)
    >>> model = hx.tl.train(train, "ridge", n_top_genes=20, gene_selection="high_mean")
    >>> hx.tl.predict(test, model)
    >>> hx.tl.evaluate(test, "ridge", reference=train)
    >>> "ridge_pearson" in test["table"].var
    True
    """
    import pandas as pd

    seed = settings.seed if seed is None else seed
    regions = regions_of(data, table_key=table_key, groups=groups)
    keys = _keys(regions[0], key)
    training = [] if reference is None else regions_of(reference, table_key=table_key)
    _check_apart(regions, training, counts_layer)
    tables = []
    kinds = {key: {region.name: _protocol(region, key) for region in regions} for key in keys}
    if fitted := sorted({name for kind in kinds.values() for name, words in kind.items() if words == FITTED}):
        warnings.warn(
            f"sections {fitted} were in the training of a model evaluated here: their scores say how well it fits, not how "
            "well it predicts",
            HespotexWarning,
            stacklevel=2,
        )
    for number, region in enumerate(regions):
        predictions = {name: _predicted(region, name) for name in keys}
        genes, unit = _agreed(predictions, region.name)
        measured = _measure(region, genes, unit, counts_layer)
        if not measured.known.any():
            raise MissingKeyError(f"section {region.name!r}: none of the {len(genes)} predicted genes was measured")
        rows = np.flatnonzero(measured.library_size >= min_counts)
        if not len(rows):
            raise DataValueError(f"section {region.name!r} has no spot with at least {min_counts} counts")
        guesses = {
            name: prediction.values[region.rows][rows][:, _columns(prediction, genes)]
            for name, prediction in predictions.items()
        }
        test = measured.take(rows)
        train = [_measure(other, genes, unit, counts_layer) for other in training]
        train = [section.take(np.flatnonzero(section.library_size >= min_counts)) for section in train]
        usable = test.known.copy()  # nulls learn from genes that every training section measured
        for section in train:
            usable &= section.known
        training_mean = np.full(len(genes), np.nan)
        learned: dict[str, np.ndarray] = {}
        if train and usable.any():
            training_mean[usable] = scores.null_train_mean([section.values[:, usable] for section in train], 1)[0]
        if nulls:
            for name in keys:
                guesses |= nulls_of_prediction(guesses[name], name, seed=seed)
            if train and usable.any():
                learned = nulls_of_training([section.evidence(usable) for section in train], test.evidence(usable))
        windows = None
        if "ssim" in metrics:
            windows = windows_of(test.array, test.coordinates, region.name)
        halves = _split_half(test, unit, seed)
        scored: list[tuple[str, np.ndarray, Any]] = [(name, guess, slice(None)) for name, guess in guesses.items()]
        scored += [(name, guess, usable) for name, guess in learned.items()]
        for name, guess, chosen in scored:
            tables.append(
                scored_rows(
                    test.values[:, chosen],
                    guess,
                    np.asarray(genes, dtype=object)[chosen].tolist(),
                    front={"model": name, "patient": region.patient, "section": region.name},
                    halves=halves[chosen],
                    coordinates=test.coordinates,
                    seed=[seed, number],
                    metrics=metrics,
                    nan_policy=nan_policy,  # type: ignore[arg-type]
                    training_mean=training_mean[chosen],
                    windows=windows,
                )
            )
    result = pd.concat(tables, ignore_index=True)
    result["ceiling"] = scores.gene_ceiling(result)
    result.attrs["unit"] = unit
    result.attrs["protocol"] = ", ".join(sorted({words for kind in kinds.values() for words in kind.values() if words}))
    if copy:
        return result
    _store(regions, keys, result, list(metrics), kinds)
    logger.info("evaluated %s in %d sections", ", ".join(keys), len(regions))
    return None


@dataclass(frozen=True, eq=False)
class _Measured:
    """Counts of a section in the unit of a prediction, and what nulls may look at."""

    patient: str
    counts: sparse.csr_array  # (n, known genes)
    known: np.ndarray  # (G,) bool
    values: np.ndarray  # (n, G), NaN where not measured
    library_size: np.ndarray
    coordinates: np.ndarray | None
    array: np.ndarray | None
    scalars: dict[str, np.ndarray]

    def take(self, rows: np.ndarray) -> _Measured:
        return _Measured(
            self.patient,
            sparse.csr_array(self.counts[rows]),
            self.known,
            self.values[rows],
            self.library_size[rows],
            None if self.coordinates is None else self.coordinates[rows],
            None if self.array is None else self.array[rows],
            {name: values[rows] for name, values in self.scalars.items()},
        )

    def evidence(self, genes: np.ndarray) -> Evidence:
        positions = self.coordinates if self.array is None else self.array
        return Evidence(self.patient, self.values[:, genes], self.library_size, positions, self.scalars)


def _keys(region: Region, key: str | Sequence[str] | None) -> list[str]:
    adata = region.table.adata
    elsewhere = [name for name, table in getattr(region.data, "tables", {}).items() if is_derived(table)]
    if not prediction_keys(adata) and any(prediction_keys(region.data[name]) for name in elsewhere):
        raise MissingKeyError(
            f"section {region.name!r} holds predictions only where nothing was measured (tables {elsewhere}): there is "
            "nothing to compare them with"
        )
    if key is None:
        there = prediction_keys(adata)
        if len(there) == 1:
            return there
        if there:
            raise AmbiguousKeyError(f"key is not given and the table holds several predictions: {there}; name some")
        raise MissingKeyError("the table holds no prediction; make one with hx.tl.predict(sdata)")
    keys = [key] if isinstance(key, str) else list(dict.fromkeys(key))
    if not keys:
        raise DataValueError("key is empty: name at least one prediction")
    return keys


def _predicted(region: Region, key: str) -> StoredPrediction:
    if key not in prediction_keys(region.table.adata):
        raise MissingKeyError(
            f"key={key!r}: section {region.name!r} holds no such prediction; stored: "
            f"{prediction_keys(region.table.adata)}. Make one with hx.tl.predict(...)"
        )
    return read_prediction(region.table.adata, key)


def _agreed(predictions: dict[str, StoredPrediction], name: str) -> tuple[list[str], str]:
    """Genes that all predictions have, in the order of the first, and their one unit."""
    units = {key: prediction.unit for key, prediction in predictions.items()}
    if len(set(units.values())) > 1:
        raise DataValueError(
            f"key: the predictions differ in unit ({units}) and cannot be compared; evaluate them apart"
        )
    shared = set.intersection(*(set(prediction.genes) for prediction in predictions.values()))
    genes = [gene for gene in next(iter(predictions.values())).genes if gene in shared]
    if not genes:
        raise DataValueError(f"key: the predictions {list(predictions)} of section {name!r} share no gene")
    unit = next(iter(units.values()))
    if unit == "log1p_cpm_panel" and any(len(p.genes) != len(genes) for p in predictions.values()):
        raise DataValueError(
            f"key: the predictions are in unit={unit!r} of different panels, so equal values mean different things; "
            "evaluate them apart"
        )
    return genes, unit


def _columns(prediction: StoredPrediction, genes: Sequence[str]) -> list[int]:
    place = {gene: column for column, gene in enumerate(prediction.genes)}
    return [place[gene] for gene in genes]


def _measure(region: Region, genes: Sequence[str], unit: str, layer: str | None) -> _Measured:
    import pandas as pd

    adata, where = region.table.adata, f"section {region.name!r}"
    counts = counts_of(adata, layer, where)
    check_counts(counts, where)
    check_names(adata.var_names, f"{where}: gene names")
    columns = adata.var_names.get_indexer(pd.Index(list(genes)))
    known = columns >= 0
    if unit == "log1p_cpm_panel" and not known.all():
        missing = [gene for gene, there in zip(genes, known, strict=True) if not there]
        raise DataValueError(
            f"{where} does not measure {len(missing)} of the predicted genes ({', '.join(missing[:5])}), so unit={unit!r}, "
            "which divides by the whole panel, is undefined there"
        )
    library = library_size(counts)[region.rows]
    panel = sparse.csr_array(sparse.csr_array(counts[:, columns[known]])[region.rows])
    values = np.full((len(region.rows), len(genes)), np.nan, dtype=np.float32)
    values[:, known] = normalize(panel, library, unit)
    array = None
    if Keys.ARRAY_ROW in adata.obs and Keys.ARRAY_COL in adata.obs:
        array = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy(dtype=np.float64)[region.rows]
        array = array if np.isfinite(array).all() else None
    coordinates = None
    if Keys.SPATIAL in adata.obsm:
        coordinates = np.asarray(adata.obsm[Keys.SPATIAL], dtype=np.float64)[region.rows][:, :2]
    scalars = {
        name: adata.obs[name].to_numpy(dtype=np.float64)[region.rows]
        for name in (Keys.N_NUCLEI, Keys.N_NUCLEI_WINDOW)
        if name in adata.obs
    }
    return _Measured(region.patient, panel, known, values, library, coordinates, array, scalars)


def _split_half(test: _Measured, unit: str, seed: int) -> np.ndarray:
    result = np.full(len(test.known), np.nan)
    result[test.known] = scores.split_half(test.counts, test.library_size, unit, seed=seed)
    return result


def _check_apart(regions: Sequence[Region], training: Sequence[Region], layer: str | None) -> None:
    if both := [region.name for region in regions if any(_same_spots(region, other, layer) for other in training)]:
        raise LeakageError(
            f"reference: sections {both} are to be evaluated and are among the training sections as well"
        )


def _same_spots(one: Region, other: Region, layer: str | None) -> bool:
    """Whether two regions are one, also where the file was read twice."""
    a, b = one.table.adata, other.table.adata
    if a is b:
        return True
    if a.shape != b.shape or not (a.obs_names.equals(b.obs_names) and a.var_names.equals(b.var_names)):
        return False
    first, second = (library_size(counts_of(adata, layer, f"section {one.name!r}")) for adata in (a, b))
    return bool(np.array_equal(first, second))


def _protocol(region: Region, key: str) -> str:
    """How a section stands to what the model was trained on, in words; empty where that is not known."""
    entry = read_record(region.table.adata, key)
    if "protocol" in entry and "training_sections" not in entry:
        return str(entry["protocol"])  # of a cross-validation
    sections, patients = entry.get("training_sections") or [], entry.get("training_patients") or []
    name = attributes(region.data).get("name")
    own = {(str(name), region.patient), (region.name, region.patient)}  # a region's name says more than the object's
    if name is not None and own & set(zip(sections, patients, strict=True)):
        return FITTED
    if not sections or not region.patient_known or set(sections) & set(patients):
        return ""  # a section whose patient was unknown in training counts as a patient of its own name
    return "another section of a training patient" if region.patient in patients else "a patient not in training"


def _store(
    regions: Sequence[Region],
    keys: Sequence[str],
    table: pd.DataFrame,
    metrics: list[str],
    kinds: dict[str, dict[str, str]],
) -> None:
    from contextlib import ExitStack

    columns = [*metrics, "ceiling"]
    by_table: dict[int, list[Region]] = {}
    for region in regions:
        by_table.setdefault(id(region.table.adata), []).append(region)
    with ExitStack() as stack:
        for own in by_table.values():
            stack.enter_context(restored_on_error(own[0].data))
            adata = own[0].table.adata
            here = table[table["section"].isin([region.name for region in own])]
            for key in keys:
                mine = here[here["model"] == key]
                words = sorted({kinds[key][region.name] for region in own} - {""})
                adata.uns[Keys.NAMESPACE][key] = {**adata.uns[Keys.NAMESPACE][key], "protocol": ", ".join(words)}
                per_gene = mine.groupby("gene", observed=True)[columns].mean()
                for column in columns:
                    adata.var[Keys.derived(key, column)] = per_gene[column].reindex(adata.var_names).to_numpy()
                record(
                    adata,
                    Keys.derived(key, "evaluation"),
                    created_by="hespotex.tl.evaluate",
                    metrics=metrics,
                    unit=read_prediction(adata, key).unit,
                    n_genes=int((~mine["undefined"]).sum()),
                    n_undefined=int(mine["undefined"].sum()),
                    means={column: float(mine[column].mean()) for column in columns},
                )
