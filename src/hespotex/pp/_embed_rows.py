"""Features of places, run by run: in this process or on a cluster, and resumed where they were interrupted."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._logging import logger
from .._settings import settings
from .._tasks import iter_tasks
from ..data.geometry import Slide
from ..data.partial import PartialRows
from ..encoders import Encoder, create
from ..errors import DataValueError, MissingWeightsError
from ._places import Place

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["compute_features"]


def compute_features(
    encoder: Encoder,
    places: list[Place],
    partial: PartialRows,
    batch_size: int | Literal["auto"] | None,
    device: str | None,
    client: Client | None,
    *,
    progress_bar: bool | None,
) -> np.ndarray:
    """Features (n, d) of all rows; what is finished is kept if the work is interrupted.

    Parameters are those of :func:`hespotex.pp.embed`; `partial` holds the rows.
    """
    device = device or settings.device
    if batch_size == "auto":
        batch_size = encoder.fitting_batch_size(device)
        logger.info("embed: batches of %d tiles", batch_size or settings.batch_size)
    how: dict[str, Any] = {"batch_size": batch_size or settings.batch_size, "device": device}
    shown = settings.progress_bar if progress_bar is None else progress_bar
    with partial:
        for place in places:
            runs = encoder.runs(place.slide, place.centres, batch_size=how["batch_size"])
            todo = [run for run in runs if not partial.done[place.rows[run]].all()]
            with closing(_features(encoder, place, todo, how, client, progress_bar=shown)) as found:
                for number, values in found:
                    _check_finite(encoder, values)  # before it is kept: the same call would find it again
                    partial.write(place.rows[todo[number]], values)
        if not partial.done.all():
            raise DataValueError(f"encoder {encoder.name!r} left out {int((~partial.done).sum())} tiles")
    partial.discard()
    return partial.values()


def _features(
    encoder: Encoder,
    place: Place,
    runs: list[np.ndarray],
    how: dict[str, Any],
    client: Client | None,
    *,
    progress_bar: bool,
) -> Generator[tuple[int, np.ndarray]]:
    """What ``encoder.embed_runs`` yields; closing it stops threads and tasks that work ahead."""
    if client is None:
        yield from encoder.embed_runs(place.slide, place.centres, runs, **how, progress_bar=progress_bar)
    else:
        yield from _on_cluster(encoder, place, runs, how, client, progress_bar=progress_bar)


def _check_finite(encoder: Encoder, values: np.ndarray) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        narrow = encoder.params().get("dtype") == "float16"
        raise DataValueError(
            f"encoder {encoder.name!r} gave NaN or infinite features for {int(bad.sum())} of {len(values)} tiles"
            + ("; float16 may be too narrow for it, take dtype='bfloat16'" if narrow else "")
        )


def _on_cluster(
    encoder: Encoder,
    place: Place,
    runs: list[np.ndarray],
    how: dict[str, Any],
    client: Client,
    *,
    progress_bar: bool,
) -> Iterator[tuple[int, np.ndarray]]:
    """What ``encoder.embed_runs`` yields, a run a task."""
    from tqdm.auto import tqdm

    shared = {"travelling": _Travelling(encoder), "slide": place.slide, "how": how}
    tasks = (place.centres[run] for run in runs)
    results = iter_tasks(_embed_run, tasks, shared=shared, client=client)
    bar = tqdm(results, total=len(runs), unit="run", desc="tiles", disable=not progress_bar or len(runs) < 2)
    yield from enumerate(bar)


class _Travelling:
    """An encoder on its way to a worker, where one with a weights file is made anew: gigabytes need not travel."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __reduce__(self) -> tuple[Any, ...]:
        file = self.encoder.weights_file()
        if file is None:
            return _Travelling, (self.encoder,)
        return _made_there, (self.encoder.params(), str(file.absolute()), self.encoder.is_compiled)


def _made_there(params: dict[str, Any], weights: str, is_compiled: bool) -> _Travelling:  # noqa: FBT001  pickle calls it so
    try:
        encoder = create(**params, weights=weights)
    except MissingWeightsError as error:
        raise MissingWeightsError(
            f"a worker of client= lacks the weights of encoder {params['name']!r}, which must lie under the same path there: "
            f"{error}"
        ) from error
    if is_compiled:
        encoder.compile()
    return _Travelling(encoder)


def _embed_run(centres: np.ndarray, travelling: _Travelling, slide: Slide, how: dict[str, Any]) -> np.ndarray:
    ((_, values),) = travelling.encoder.embed_runs(slide, centres, [np.arange(len(centres))], **how, progress_bar=False)
    return values
