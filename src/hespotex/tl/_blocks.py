"""Row blocks of a prediction on their way to a table: which genes, which arrays, and what is noted about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .._keys import Keys
from ..data.provenance import record
from ..data.section import Prediction, rows_of
from ..data.stored import COMPANIONS
from ..errors import DataValueError
from ..models._store import identify

if TYPE_CHECKING:
    from anndata import AnnData

    from ..data.blockwise import TableStore
    from ..models import Model, Recipe

__all__ = ["arrays_of", "chosen_genes", "record_prediction", "store_blocks"]

_OF_GENES: Final = ("mean", *COMPANIONS, "samples")


def chosen_genes(recipe: Recipe, genes: Sequence[str] | None) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Genes to keep of a prediction and their columns; ``None`` for all as they are.

    Raises
    ------
    DataValueError
        If the model does not predict one of them.
    """
    if genes is None:
        return recipe.genes, None
    wanted = tuple(dict.fromkeys([genes] if isinstance(genes, str) else map(str, genes)))
    place = {gene: column for column, gene in enumerate(recipe.genes)}
    if missing := [gene for gene in wanted if gene not in place]:
        raise DataValueError(
            f"genes: the model does not predict {len(missing)} of {len(wanted)}: {', '.join(missing[:10])}; it predicts "
            f"{len(place)}, listed in model.genes"
        )
    if not wanted:
        raise DataValueError("genes is empty: name at least one gene, or leave it out for all")
    return wanted, np.array([place[gene] for gene in wanted])


def arrays_of(block: Prediction, columns: np.ndarray | None) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of a block by name, float32, with the chosen genes."""
    for name in (*_OF_GENES, "latent", "ood"):
        source: Any = getattr(block, name)
        if source is None:
            continue
        values = rows_of(source)
        if columns is not None and name in _OF_GENES:
            values = values[:, columns]
        yield name, values.astype(np.float32, copy=False)


def store_blocks(
    store: TableStore, key: str, blocks: Iterator[Prediction], columns: np.ndarray | None, rows: np.ndarray
) -> int:
    """Write a prediction to disk block by block, without latent, samples and domain score; the number of rows written.

    `rows` are those of the table that the prediction is of, in its order.
    """
    start = 0
    for block in blocks:
        own = rows[start : start + len(block.ids)]
        start += len(block.ids)
        for what, part in arrays_of(block, columns):
            if what == "mean":
                store.write(own, part)
            elif what in COMPANIONS:
                store.write(own, part, layer=Keys.derived(key, what))
    return start


def record_prediction(
    adata: AnnData, key: str, form: str, model: Model, recipe: Recipe, genes: Sequence[str], **more: Any
) -> None:
    """Provenance of a prediction, which is also what makes it found."""
    record(
        adata,
        key,
        kind="prediction",
        form=form,
        unit=recipe.unit,
        genes=list(genes),
        model=model.info.name,
        weights_id=identify(model),
        training_sections=[str(section["name"]) for section in recipe.training.get("sections", ())],
        training_patients=[str(section["group"]) for section in recipe.training.get("sections", ())],
        embedding_key=recipe.embedding_key,
        created_by="hespotex.tl.predict",
        **more,
    )
