"""One slide of a cohort: from its file to a result under its final name."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from ..._files import publish
from ..._keys import Keys, sanitize
from ..._settings import settings
from ...data.geometry import find_image_key, resolve_slide
from ...data.tables import resolve_table
from ...data.wsi import OF_WSIDATA
from ...errors import DataValueError, HespotexError, HespotexWarning, WorkerError
from ...io._open import has_elements, open_slide
from ...pp._make_tiles import check_holds_a_tile
from .._predict import predict
from .slides import printable
from .written import Written, written

if TYPE_CHECKING:
    from spatialdata import SpatialData

    from ...data.geometry import Slide
    from ...models import Model

__all__ = ["RUNNING", "Format", "Job", "Outcome", "failure", "predict_slide"]

Format = Literal["zarr", "h5ad"]
RUNNING = "running"  # in the staging folder

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # would meet every other slide, too
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EHOSTDOWN, errno.ENETDOWN}
_PLACE = {errno.EACCES, errno.EPERM, errno.ENOTDIR}  # as well, where it is the result that cannot be written


@dataclass(frozen=True)
class Job:
    """All that determines a result but the model, and where it goes; it travels to other processes.

    Parameters
    ----------
    slide
        Name of the slide in the manifest.
    path, output
        Where the slide is, and its result.
    work, staging
        Folders for partial results of this slide, and for results that are being written, on the disk of `output`. The
        latter holds `RUNNING` as long as the run goes on.
    result
        What the result will say of itself, but for its size.
    replace
        Whether a result of another slide, model or options at `output` may be replaced; what is no result never is.
    table_key, shapes_key, image_key
        What to predict for in a store.
    """

    slide: str
    path: str
    output: str
    work: str
    staging: str
    result: Written
    replace: bool
    format: Format
    table_key: str | None = None
    shapes_key: str | None = None
    image_key: str | None = None
    mpp: float | None = None
    genes: tuple[str, ...] | None = None
    key_added: str | None = None
    weights: str | None = None
    batch_size: int | None = None
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of a job.

    Parameters
    ----------
    stages
        Seconds by stage.
    error, message
        Class of the error and what it says; empty if the result is there.
    may_pass
        Whether another try may succeed.
    stops_all
        Whether the other slides would fail in the same way.
    """

    stages: dict[str, float] = field(default_factory=dict)
    n_tiles: int = 0
    n_genes: int = 0
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    message: str = ""
    may_pass: bool = False
    stops_all: bool = False


def predict_slide(job: Job, model: Model, tell: Callable[..., None], *, progress_bar: bool) -> Outcome:
    """Do a job; whatever fails is in the outcome, but for Ctrl-C.

    Parameters
    ----------
    job, model
        What to do.
    tell
        Called with ``"stage"`` and the seconds of each when it is over.
    progress_bar
        Whether to show progress on the slide.
    """
    outcome = Outcome()
    stage = ["read"]

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        stage[0] = name
        _check_running(job)
        start = perf_counter()
        try:
            yield
        finally:
            outcome.stages[name] = perf_counter() - start
        tell("stage", slide=job.slide, stage=name, seconds=round(outcome.stages[name], 3))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", HespotexWarning)
        try:
            with settings.override(
                work_dir=job.work,
                device=job.device or settings.device,
                batch_size=job.batch_size or settings.batch_size,
                progress_bar=progress_bar,
            ):
                _do(job, model, timed, outcome)
        except Exception as error:  # noqa: BLE001  whatever is wrong with a slide, the others go on
            failed = failure(error, stage[0])
            outcome.error, outcome.message = failed.error, failed.message
            outcome.may_pass, outcome.stops_all = failed.may_pass, failed.stops_all
    said = (printable(str(warning.message)) for warning in caught if issubclass(warning.category, HespotexWarning))
    outcome.warnings = list(dict.fromkeys(said))
    return outcome


def failure(error: BaseException, stage: str) -> Outcome:
    """An error as an outcome."""
    number = _errno(error)
    return Outcome(
        error=type(error).__name__,
        message=printable(str(error)) or type(error).__name__,
        may_pass=not isinstance(error, HespotexError) or isinstance(error, WorkerError) or number in _PASSING,
        stops_all=number in _DISK or (stage == "write" and number in _PLACE),
    )


def _errno(error: BaseException | None) -> int | None:
    """The operating system's number of an error, which libraries wrap, and HDF5 only writes out."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError):
            written = re.search(r"errno = (\d+)", str(error))
            if number := error.errno or (int(written[1]) if written else None):
                return number
        error = error.__cause__ or error.__context__
    return None


def _do(job: Job, model: Model, timed: Callable[[str], Any], outcome: Outcome) -> None:
    from ... import pp

    recipe = model.recipe
    assert recipe is not None  # looked at before any slide is
    path = Path(job.path)
    if there := _is_there(job):  # by a worker that died before it could say so
        outcome.n_tiles, outcome.n_genes = there.n_tiles, there.n_genes
        return
    is_file = not has_elements(path)
    with timed("read"):
        sdata = open_slide(path, job.mpp if is_file else None)
    image_key = None if is_file else job.image_key
    keys: dict[str, Any] = {} if is_file else {"table_key": job.table_key, "shapes_key": job.shapes_key}
    bare = not sdata.tables and not sdata.shapes and not any(keys.values())
    if bare and recipe.tiles and not model.reads_parts:
        if not is_file and job.mpp is not None:
            pp.set_scale(sdata, mpp=job.mpp, image_key=image_key)
        check_holds_a_tile(resolve_slide(sdata, image_key=image_key), recipe.tiles["diameter_um"])
        with timed("tissue"):
            pp.detect_tissue(sdata, image_key=image_key)
        with timed("tiles"):
            pp.make_tiles(sdata, image_key=image_key, **recipe.tiles)
        if recipe.encoder:
            encoder = dict(recipe.encoder)
            if job.weights is not None:
                encoder["weights"] = job.weights
            with timed("embed"):
                pp.embed(
                    sdata,
                    encoder.pop("name"),
                    image_key=image_key,
                    shapes_key=Keys.TILES,
                    batch_size=job.batch_size,
                    key_added=recipe.embedding_key,
                    **encoder,
                )
    key = sanitize(model.info.name) if job.key_added is None else job.key_added
    before = _entries(sdata, key)
    with timed("predict"):
        predict(
            sdata,
            model,
            **keys,
            image_key=image_key,
            genes=job.genes,
            mpp=None if is_file else job.mpp,
            weights=job.weights,
            batch_size=job.batch_size,
            key_added=key,
            **job.options,
        )
    # The table that was written to: another may hold an earlier prediction of that key.
    ((table_key, entry),) = (
        (name, entry) for name, entry in _entries(sdata, key).items() if entry is not before.get(name)
    )
    table = resolve_table(sdata, table_key=table_key)
    outcome.n_tiles, outcome.n_genes = table.adata.n_obs, len(entry["genes"])
    slide = resolve_slide(sdata, image_key=find_image_key(sdata, image_key, shapes_key=table.regions[0]))
    with timed("write"):
        _write(sdata, key, table_key, slide, job, outcome)


def _entries(sdata: SpatialData, key: str) -> dict[str, Any]:
    """What each table notes under `key`."""
    return {name: table.uns.get(Keys.NAMESPACE, {}).get(key) for name, table in sdata.tables.items()}


def _is_there(job: Job) -> Written | None:
    """What the result says of itself, if it is there already.

    Raises
    ------
    DataValueError
        If something else is, which must not be replaced.
    """
    output = Path(job.output)
    if not os.path.lexists(output):
        return None
    found = written(output)
    if found is not None and job.replace:
        return None
    if found is not None and found.identity == job.result.identity:
        return found
    remedy = "move it away, or name another folder"
    raise DataValueError(
        f"{output} exists and is no result of this slide, model and options; "
        + (
            f"nothing but results is replaced: {remedy}"
            if found is None
            else f"{remedy}, or replace it with overwrite=True"
        )
    )


def _check_running(job: Job) -> None:
    """Raise in a worker that has outlived the run that it works for: the folder may be another run's by now."""
    if not (Path(job.staging) / RUNNING).exists():
        raise WorkerError(f"the run that asked for {job.output} has ended")


def _write(sdata: SpatialData, key: str, table_key: str, slide: Slide, job: Job, outcome: Outcome) -> None:
    result = replace(job.result, n_tiles=outcome.n_tiles, n_genes=outcome.n_genes)
    about = result.entries({"mpp": float(slide.mpp), "shape": [int(side) for side in slide.shape]})
    output = Path(job.output)
    staged = Path(job.staging) / f"{uuid.uuid4().hex}{output.suffix}"
    try:
        if job.format == "zarr":
            _without_pixels(sdata, about).write(staged)
        else:
            from ...get import prediction

            adata = prediction(sdata, key, table_key=table_key)
            adata.uns[Keys.NAMESPACE] |= about
            adata.write_h5ad(staged)
        _check_running(job)
        if not _is_there(job):  # if it is, another worker, taken for dead, was faster
            publish(staged, output)
    finally:
        if staged.is_dir():
            shutil.rmtree(staged, ignore_errors=True)
        else:
            staged.unlink(missing_ok=True)


def _without_pixels(sdata: SpatialData, about: Mapping[str, Any]) -> SpatialData:
    """Shapes and tables; pixels stay in the slide, which `about` names."""
    from spatialdata import SpatialData
    from spatialdata.models import get_table_keys

    tables = {
        name: table
        for name, table in sdata.tables.items()
        if "spatialdata_attrs" in table.uns and {*_listed(get_table_keys(table)[0])} <= set(sdata.shapes)
    }
    ours = {**sdata.attrs.get(Keys.NAMESPACE, {}), **about}
    attrs = {name: value for name, value in sdata.attrs.items() if name != OF_WSIDATA}  # it is no store of LazySlide's
    return SpatialData(shapes=dict(sdata.shapes), tables=tables, attrs={**attrs, Keys.NAMESPACE: ours})


def _listed(region: Any) -> list[str]:
    return [region] if isinstance(region, str) else list(region)
