"""Predict expression on many slides, each into a file of its own."""

from __future__ import annotations

import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .._device import resolve_device
from .._keys import check_key
from .._logging import logger
from .._settings import settings
from .._tasks import check_client
from .._version import __version__
from ..data.lock import locked
from ..encoders import create
from ..errors import DataTypeError, DataValueError, ModelMismatchError, OutputError
from ..io._open import has_elements
from ..models import Model
from ..models._store import identify, recall
from ._blocks import chosen_genes
from ._cohort.arguments import check_folder, check_mpp, check_whole
from ._cohort.events import Event, listener
from ._cohort.manifest import Manifest, Row
from ._cohort.one import RUNNING, Format, Job, Outcome, failure
from ._cohort.outputs import check_outside, name_outputs
from ._cohort.run import on_cluster, one_by_one
from ._cohort.slides import SlideState, find_slides, printable, state_of
from ._cohort.wanted import WORK, Wanted
from ._cohort.written import written

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

__all__ = ["predict_cohort"]


def predict_cohort(
    paths: str | Path | Sequence[str | Path],
    model: Model | str | Path,
    out: str | Path,
    *,
    client: Client | None = None,
    format: Format = "zarr",
    table_key: str | None = None,
    shapes_key: str | None = None,
    image_key: str | None = None,
    mpp: float | None = None,
    genes: Sequence[str] | None = None,
    weights: str | Path | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    retries: int = 1,
    key_added: str | None = None,
    overwrite: bool = False,
    progress_bar: bool | None = None,
    log: str | Path | Callable[[Event], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Predict the expression of many slides; one that fails does not stop the others.

    Each slide is read, its tissue found, tiles laid on it and predicted, with the steps and parameters of the model, and
    the result written to a file of its own in `out`, where it appears only when whole. The same call goes on after any
    interruption, a kill or a power cut included: what is done is not done again, and a slide that was cut off goes on
    where it stopped. Its result is that of an undisturbed run.

    Parameters
    ----------
    paths
        Slides: image files and SpatialData stores. A folder stands for all slides in it and below; results of cohorts are
        none.
    model
        The fitted model, or the folder it was saved to.
    out
        Folder of the results; made if it is not there. One run at a time works on it. What is not a result stays as it is.
    client
        A ``dask.distributed.Client``: each of its workers takes a whole slide, with its own threads and device, and writes
        the result itself. Workers need slides and `out` under the same paths. Results are the same, those of networks
        to rounding.
    format
        ``"zarr"``: a SpatialData with tissue, tiles and tables. Pixels are not copied: ``attrs["hespotex"]["slide"]`` names
        the slide by file name, size and fingerprint. ``"h5ad"``: the AnnData of :func:`hespotex.get.prediction`.
    table_key, shapes_key, image_key
        What to predict for in slides that are SpatialData stores, as in :func:`hespotex.tl.predict`; each may be left out
        where there is one candidate. An image file holds nothing but its image.
    mpp
        µm per pixel of all slides, where the files do not say.
    genes
        Genes to keep of the model's, in this order; all by default.
    weights
        Local weights file of the encoder, where it needs one.
    batch_size
        Tiles embedded at a time; the setting by default.
    device
        Where to embed and predict; the setting by default, that of each worker with a client.
    retries
        Further tries on a slide whose failure may pass, as that of a network drive, after all others. A slide that is broken
        is not tried again.
    key_added
        Key of the prediction; the model's name by default.
    overwrite
        Predict all slides again, in place of the results in `out`; nothing else is replaced. If that is interrupted, the call
        without it goes on.
    progress_bar
        The setting by default: over all slides and on each.
    log
        File to which a JSON line about each event is added (start, stage and end of each slide, with seconds), ``"-"`` for
        stderr, or a function that takes each event as a mapping.
    options
        Settings of prediction that the model has, such as ``n_samples=50`` of a generative one.

    Returns
    -------
    A row per slide, as written to ``manifest.parquet`` in `out`, too:

    ``slide``, ``output``
        Path of the slide, name of its result.
    ``status``
        ``"done"``, ``"failed"``, or ``"pending"`` where the work was stopped before.
    ``attempts``, ``seconds``, ``seconds_<stage>``
        Tries so far, time of the last one, and that of each of its stages.
    ``n_tiles``, ``n_genes``
        Size of the result.
    ``warnings``, ``error``, ``message``
        What the library warned of; class and text of the error.
    ``model``, ``options``, ``identity``, ``size``, ``mtime_ns``, ``fingerprint``, ``hespotex_version``, ``finished``
        What the result belongs to, and when it was written.

    Raises
    ------
    MissingWeightsError
        If the encoder's weights are missing here.
    DataValueError
        If `out` is in use by another run, holds results of another model or other options, or lies in a store that is read.
        If `table_key`, `shapes_key` or `image_key` is given and no slide is a store.
    ModelMismatchError
        If the model predicts no slide but the section it was fitted on.
    OutputError
        If the disk is full or `out` cannot be written to; what is finished stays.
    WorkerError
        If the cluster is gone.

    See Also
    --------
    hespotex.tl.predict

    Examples
    --------
    >>> import hespotex as hx
    >>> cohort = hx.tl.predict_cohort("biopsies/", "her2.hx", "predicted/")  # doctest: +SKIP
    >>> cohort.query("status == 'failed'")[["slide", "message"]]  # doctest: +SKIP
    """
    check_client(client)
    if format not in get_args(Format):
        raise DataValueError(f"format={format!r} is unknown; possible: {', '.join(map(repr, get_args(Format)))}")
    check_whole("retries", retries, 0)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    if mpp is not None:
        check_mpp(mpp)
    if key_added is not None:
        check_key(key_added)
    out = check_folder(out)
    slides = find_slides(paths, but=out)
    check_outside(out, slides)
    keys = {"table_key": table_key, "shapes_key": shapes_key, "image_key": image_key}
    _check_keys(keys, slides)
    fitted = _fitted(model, genes, options)
    if client is None:
        _check_here(fitted, slides, device, weights)
    wanted = Wanted(
        out=out,
        format=format,
        model=identify(fitted),
        overwrite=overwrite,
        shared={
            **keys,
            "mpp": mpp,
            "genes": None if genes is None else chosen_genes(fitted.recipe, genes)[0],  # type: ignore[arg-type]
            "key_added": key_added,
            "weights": None if weights is None else str(Path(weights).expanduser().absolute()),
            "batch_size": batch_size or settings.batch_size,
            "device": device,
            "options": options,
        },
    )
    tell = listener(log)
    shown = settings.progress_bar if progress_bar is None else progress_bar
    with locked(out), _bar(len(slides), shown=shown) as step:
        manifest = Manifest(out)
        _check_same(manifest, wanted)
        work = _clean(out / WORK)
        tell("cohort_started", n_slides=len(slides), model=wanted.model, out=str(out))
        with _staging(work) as staging:
            queue = _queue(slides, manifest, wanted, staging, tell, step)
            try:
                _save(manifest)
                if client is None:
                    outcomes = one_by_one(queue, fitted, tell, progress_bar=shown)
                else:
                    outcomes = on_cluster(queue, _kept(fitted, work, wanted.model), tell, client)
                with closing(outcomes):  # also where a traceback, as in a notebook, keeps them alive
                    _follow(outcomes, queue, manifest, retries, tell, step)
            finally:
                _save_if_possible(manifest)  # an interruption may come between a result and the note of it
                frame = manifest.frame(slides)
                tell("cohort_finished", **{str(status): int(n) for status, n in frame["status"].value_counts().items()})
        if not any(path.is_file() for path in (work / "slides").rglob("*")):  # nothing to go on with
            shutil.rmtree(work, ignore_errors=True)
    return frame


def _check_keys(keys: Mapping[str, str | None], slides: Sequence[Path]) -> None:
    """Raise if elements of stores are named and there is no store."""
    given = ", ".join(f"{name}={key!r}" for name, key in keys.items() if key is not None)
    if given and not any(has_elements(slide) for slide in slides):
        raise DataValueError(f"{given}: these name elements of SpatialData stores, and no slide is one; leave them out")


def _fitted(model: Model | str | Path, genes: Sequence[str] | None, options: dict[str, Any]) -> Model:
    if isinstance(model, Model):
        fitted = model
    elif isinstance(model, str | Path):
        fitted = recall(model)
    else:
        raise DataTypeError(f"model must be a fitted model or the path of a saved one, got {type(model).__name__}")
    if not fitted.is_fitted or fitted.recipe is None:
        raise ModelMismatchError(
            "model is not fitted on sections and does not know how to prepare a slide; fit it with hx.tl.train(sdatas, model)"
        )
    if fitted.info.task == "in-sample":
        raise ModelMismatchError(
            f"{fitted.info.name!r} predicts the section it was fitted on and no other: hx.tl.predict(section, model)"
        )
    if genes is not None:
        chosen_genes(fitted.recipe, genes)  # an unknown one is an error before any slide is read
    if options:
        fitted.with_options(**options)
    return fitted


def _check_here(model: Model, slides: Sequence[Path], device: str | None, weights: str | Path | None) -> None:
    """Raise what would meet every slide on this machine: a device that is not there, an encoder without its weights."""
    resolve_device(device)
    recipe = model.recipe
    if recipe is None or not recipe.encoder or all(has_elements(slide) for slide in slides):
        return  # stores may hold their embedding
    options = dict(recipe.encoder) | ({} if weights is None else {"weights": weights})
    create(options.pop("name"), **options)


def _check_same(manifest: Manifest, wanted: Wanted) -> None:
    """Raise if the folder holds results of something else, as a mixture would serve nobody."""
    there = [row for row in manifest.rows.values() if row.status == "done" and (wanted.out / row.output).exists()]
    if any(Path(row.output).suffix != f".{wanted.format}" for row in there):
        raise DataValueError(
            f"out={str(wanted.out)!r} holds results of another format than {wanted.format!r}; name another folder"
        )
    others = [row for row in there if (row.model, row.options) != (wanted.model, wanted.options)]
    if others and not wanted.overwrite:
        raise DataValueError(
            f"out={str(wanted.out)!r} holds {len(others)} results of model {others[0].model!r} with options "
            f"{others[0].options}; these are {wanted.model!r} and {wanted.options}. Name another folder, or replace them with "
            "overwrite=True"
        )


def _clean(work: Path) -> Path:
    """Remove what a killed run was writing; partial results stay."""
    staging = work / "staging"
    if staging.exists():
        # Under another name first: a worker that outlived its run must not publish what is being deleted.
        away = work / f"deleted-{uuid.uuid4().hex}"
        staging.rename(away)
    for left in work.glob("deleted-*"):
        shutil.rmtree(left, ignore_errors=True)
    return work


@contextmanager
def _staging(work: Path) -> Iterator[Path]:
    """A folder for results that are being written, of this run alone: workers that outlive it find it gone."""
    staging = work / "staging" / uuid.uuid4().hex
    try:
        staging.mkdir(parents=True)
        (staging / RUNNING).touch()
    except OSError as error:
        raise OutputError(f"nothing can be written to {staging} ({error}); make room and call again") from error
    try:
        yield staging
    finally:
        _clean(work)


def _queue(
    slides: Sequence[Path],
    manifest: Manifest,
    wanted: Wanted,
    staging: Path,
    tell: Callable[..., None],
    step: Callable[[], None],
) -> deque[Job]:
    """Jobs of all slides that are not done; the rows of the others are brought up to date."""
    states = {slide: _state_or_failure(slide) for slide in slides}
    results = {slide: wanted.result(slide, state) for slide, state in states.items() if isinstance(state, SlideState)}
    name_outputs(manifest, wanted.out, f".{wanted.format}", slides, results)
    queue: deque[Job] = deque()
    for slide, state in states.items():
        row = manifest.rows[printable(slide)]
        if isinstance(state, Outcome):
            _failed(row, state, wanted, tell)
            step()
            continue
        result = results[slide]
        there = written(wanted.out / row.output)
        if there and there.identity == result.identity and not wanted.overwrite:
            if (row.status, row.identity) != ("done", there.identity):  # the run was killed before the note of it
                row.status, row.identity, row.error, row.message = "done", there.identity, "", ""
                row.n_tiles, row.n_genes, row.attempts = there.n_tiles, there.n_genes, max(row.attempts, 1)
                _describe(row, wanted, state)
            tell("slide_kept", slide=row.slide, output=row.output)
            step()
            continue
        # Made for this slide, before it changed; a result of another one may bear the name just as well.
        ours = there is not None and (there.identity == row.identity or there.but_for_time() == result.but_for_time())
        if ours and not wanted.overwrite:
            logger.warning("%s is predicted again, as it has changed", row.slide)
        row.status = "pending"
        _describe(row, wanted, state)
        queue.append(wanted.job(row, slide, result, staging, replaces=ours or wanted.overwrite))
    return queue


def _state_or_failure(slide: Path) -> SlideState | Outcome:
    try:
        return state_of(slide)
    except (OSError, DataValueError) as error:
        return failure(error, "read")


def _describe(row: Row, wanted: Wanted, state: SlideState) -> None:
    row.model, row.options = wanted.model, wanted.options
    row.size, row.mtime_ns, row.fingerprint = state.size, state.mtime_ns, state.fingerprint
    row.hespotex_version = __version__


def _failed(row: Row, outcome: Outcome, wanted: Wanted, tell: Callable[..., None]) -> None:
    """A slide that cannot even be looked at."""
    row.status, row.error, row.message = "failed", outcome.error, outcome.message
    row.model, row.options, row.hespotex_version = wanted.model, wanted.options, __version__
    row.attempts += 1
    row.finished = _now()
    tell("slide_failed", slide=row.slide, error=row.error, message=row.message)


def _kept(model: Model, work: Path, name: str) -> Path:
    """The model, saved where all workers find it."""
    folder = work / "models" / name
    if not folder.exists():
        try:
            model.save(folder)
        except OSError as error:
            raise OutputError(
                f"the model cannot be kept for the workers ({error}); make room and call again"
            ) from error
    return folder


def _follow(
    outcomes: Iterator[tuple[Job, Outcome]],
    queue: deque[Job],
    manifest: Manifest,
    retries: int,
    tell: Callable[..., None],
    step: Callable[[], None],
) -> None:
    """Note what comes of each job; one that failed and may pass is put at the end of the queue."""
    tries: dict[str, int] = {}
    for job, outcome in outcomes:
        row = manifest.rows[job.slide]
        row.attempts += 1
        row.stages, row.seconds = outcome.stages, sum(outcome.stages.values())
        row.warnings, row.error, row.message = outcome.warnings, outcome.error, outcome.message
        row.finished = _now()
        again = False
        if not outcome.error:
            row.status, row.identity = "done", job.result.identity
            row.n_tiles, row.n_genes = outcome.n_tiles, outcome.n_genes
            about = {"seconds": round(row.seconds, 3), "n_tiles": row.n_tiles, "warnings": row.warnings}
            tell("slide_done", slide=row.slide, output=row.output, **about)
            shutil.rmtree(job.work, ignore_errors=True)
        else:
            tries[job.slide] = tries.get(job.slide, 0) + 1
            again = outcome.may_pass and not outcome.stops_all and tries[job.slide] <= retries
            row.status = "pending" if again or outcome.stops_all else "failed"
            tell(
                "slide_retried" if again else "slide_failed",
                **{"slide": row.slide, "error": row.error, "message": row.message, "seconds": round(row.seconds, 3)},
            )
        if again:
            queue.append(job)
        else:
            step()
        if outcome.stops_all:
            raise OutputError(
                f"the cohort was stopped, as every slide would meet the same: {outcome.message} ({outcome.error}, at "
                f"{row.slide}). What is finished stays; set it right and call again"
            )
        _save(manifest)


def _save(manifest: Manifest) -> None:
    try:
        manifest.save()
    except OSError as error:
        raise OutputError(f"the manifest cannot be written ({error}); make room and call again") from error


def _save_if_possible(manifest: Manifest) -> None:
    try:
        manifest.save()
    except OSError as error:
        logger.info("the manifest is not up to date: %s", error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _bar(n_slides: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    from tqdm.auto import tqdm

    with tqdm(total=n_slides, unit="slide", desc="slides", disable=not shown or n_slides < 2) as bar:
        yield lambda: bar.update() and None
