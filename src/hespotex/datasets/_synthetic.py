"""Synthetic patients: sections in which morphology drives expression, with the truth kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .._keys import Keys
from .._settings import settings
from ..errors import DataValueError, MissingKeyError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

    from ._expression import Genome
    from ._tissue import Tissue

__all__ = ["cell_truth", "synthetic"]

_POINTS = "cells_truth"
_TRUTH = "truth"
_PREFIX = "program_"

Lattice = Literal["visium", "st"]


def synthetic(
    n_patients: int = 1,
    n_sections: int = 1,
    *,
    size_px: int | tuple[int, int] = 2000,
    mpp: float = 0.5,
    lattice: Lattice = "visium",
    pitch_um: float | None = None,
    diameter_um: float | None = None,
    n_genes: int = 200,
    depth: float = 4000.0,
    stain_shift: float = 1.0,
    patient_shift: float = 1.0,
    with_expression: bool = True,
    first_patient: int = 0,
    seed: int | None = None,
) -> SpatialData | list[SpatialData]:
    """Simulate H&E sections of a tumour in which morphology drives expression.

    Six types of cells (two of them, T and B cells, look alike) live in tumour nests, stroma, lymphoid aggregates, fat
    and glands. Each has its own nuclear size, shape, colour, density and marker genes. Further genes depend on the
    neighbours of a cell (contact with T cells, distance from the tumour's border), on a threshold of its atypia, on a
    field that the image does not show, or on nothing. Transcripts diffuse: of what a spot catches, more than half comes
    from cells around it. Counts are negative binomial, each spot with its own efficiency.

    Patients differ in stain, in the mixture of regions and in the levels of genes; the sections of one patient share
    them. Patient 3 of a seed is the same whether simulated alone or among others.

    Parameters
    ----------
    n_patients
        Number of patients.
    n_sections
        Sections of each patient.
    size_px
        Side of the image in pixels, or (height, width).
    mpp
        µm per pixel.
    lattice
        ``"visium"``: hexagonal, 100 µm pitch, 55 µm spots; ``"st"``: square, 200 µm pitch, 100 µm spots.
    pitch_um, diameter_um
        Other centre-to-centre distance and diameter.
    n_genes
        Number of genes.
    depth
        Median total count of a spot that is fully covered by tissue.
    stain_shift
        How far stains differ between patients; 0 for none.
    patient_shift
        How far patients differ in gene levels and mixture; 0 for none.
    with_expression
        ``False`` gives slides that have only the image (and the true cells).
    first_patient
        Number of the first patient: ``synthetic(first_patient=8, seed=s)`` is the ninth of the world of seed `s`.
    seed
        Seed of the world; ``settings.seed`` by default.

    Returns
    -------
    SpatialData | list[SpatialData]
        One section, or the list of all, patient by patient. Each holds ``images["image"]``, ``shapes["spots"]``,
        ``tables["table"]`` (int32 CSR counts; ``layers["truth"]``: expected counts at equal efficiency of all
        spots; ``var["program"]``) as every reader does, and the true cells as ``points["cells_truth"]``: position in
        pixels, ``cell_type``, activity of each programme. :func:`cell_truth` gives their expected expression.

    Raises
    ------
    DataValueError
        If a size is not positive or leaves no room for a spot.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=400, n_genes=20, seed=0)
    >>> sdata["table"].n_vars
    20
    """
    from ._expression import make_genome

    shape = (size_px, size_px) if isinstance(size_px, int | np.integer) else tuple(size_px)
    pitch_um = pitch_um or {"visium": 100.0, "st": 200.0}.get(lattice, 0)
    diameter_um = diameter_um or {"visium": 55.0, "st": 100.0}.get(lattice, 0)
    if lattice not in ("visium", "st"):
        raise DataValueError(f"lattice={lattice!r} is unknown; possible: 'visium', 'st'")
    _check(
        n_patients=n_patients,
        n_sections=n_sections,
        size_px=min(shape),
        mpp=mpp,
        pitch_um=pitch_um,
        diameter_um=diameter_um,
        n_genes=n_genes,
        depth=depth,
    )
    seed = settings.seed if seed is None else seed
    genome = make_genome(np.random.default_rng([seed, 0]), n_genes)
    sections = [
        _section(
            genome,
            seed=seed,
            patient=patient,
            section=section,
            shape=(int(shape[0]), int(shape[1])),
            mpp=float(mpp),
            spots=(lattice, float(pitch_um), float(diameter_um)) if with_expression else None,
            depth=depth,
            stain_shift=stain_shift,
            patient_shift=patient_shift,
        )
        for patient in range(first_patient, first_patient + n_patients)
        for section in range(n_sections)
    ]
    return sections[0] if len(sections) == 1 else sections


def cell_truth(sdata: SpatialData) -> AnnData:
    """Expected expression of every cell of a synthetic section.

    Returns
    -------
    AnnData
        Cells x genes: ``X`` float32 in the unit of ``layers["truth"]`` of the spots (what a spot that lies over the
        whole cell adds to its expected count), ``obs["cell_type"]``, ``obsm["spatial"]`` in pixels.

    Raises
    ------
    MissingKeyError
        If `sdata` is not a synthetic section with expression.

    Examples
    --------
    >>> import hespotex as hx
    >>> sdata = hx.datasets.synthetic(size_px=400, n_genes=20, seed=0)
    >>> hx.datasets.cell_truth(sdata).n_vars
    20
    """
    import anndata as ad
    import pandas as pd

    if _POINTS not in sdata.points or Keys.TABLE not in sdata.tables or _TRUTH not in sdata[Keys.TABLE].uns:
        raise MissingKeyError("sdata holds no true cells; hx.datasets.synthetic(with_expression=True) makes such")
    cells = sdata.points[_POINTS].compute()
    table = sdata[Keys.TABLE]
    active = cells[[column for column in cells if column.startswith(_PREFIX)]].to_numpy()
    return ad.AnnData(
        X=(active @ table.uns[_TRUTH]["programs"]).astype(np.float32),
        obs=pd.DataFrame({"cell_type": pd.Categorical(cells["cell_type"])}, index=[str(i) for i in range(len(cells))]),
        var=table.var.copy(),
        obsm={Keys.SPATIAL: cells[["x", "y"]].to_numpy()},
    )


def _check(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise DataValueError(f"{name}={value!r} must be positive")


def _section(
    genome: Genome,
    *,
    seed: int,
    patient: int,
    section: int,
    shape: tuple[int, int],
    mpp: float,
    spots: tuple[str, float, float] | None,
    depth: float,
    stain_shift: float,
    patient_shift: float,
) -> SpatialData:
    from spatialdata.models import PointsModel

    from ..image.files import memory_pyramid
    from ..io._assemble import build_section, build_slide, transformations
    from ._expression import PROGRAMS, activities, patient_programs
    from ._paint import Stain, paint
    from ._tissue import CELL_TYPES, make_tissue, place_cells

    of_patient = np.random.default_rng([seed, 1, patient])
    stain = Stain.draw(of_patient, stain_shift)
    mixture = _mixture(of_patient, patient_shift)
    programs = patient_programs(of_patient, genome, patient_shift)

    rng = np.random.default_rng([seed, 2, patient, section])
    tissue = make_tissue(rng, (shape[0] * mpp, shape[1] * mpp), mixture)
    cells = place_cells(rng, tissue)
    active = activities(rng, tissue, cells)
    image = paint(rng, tissue, cells, shape, mpp, stain)

    levels = memory_pyramid(image)
    attrs = {"name": f"P{patient + 1}S{section + 1}", "patient": f"P{patient + 1}"}
    if spots is None:
        sdata = build_slide(levels, mpp, attrs)
    else:
        lattice, pitch_um, diameter_um = spots
        xy_um, obs = _lattice(tissue, lattice, pitch_um)
        table = _measure(rng, genome, programs, active, cells.xy_um, xy_um, diameter_um / 2, depth)
        table.obs = obs
        sdata = build_section(levels, table, xy_um / mpp, mpp=mpp, radius_px=diameter_um / mpp / 2, attrs=attrs)
    points = _points(cells.xy_um / mpp, np.array(CELL_TYPES)[cells.kind], active, PROGRAMS)
    sdata.points[_POINTS] = PointsModel.parse(
        points, coordinates={"x": "x", "y": "y"}, transformations=transformations(mpp)
    )
    return sdata


def _mixture(rng: np.random.Generator, shift: float) -> dict[str, float]:
    return {
        "tumour": 0.25 + 0.22 * shift * rng.normal(),
        "adipose": 1.25 + 0.20 * shift * rng.normal(),
        "immune": 1.70 + 0.25 * shift * rng.normal(),
        "glands": 14.0 * float(np.exp(0.5 * shift * rng.normal())),
    }


def _lattice(tissue: Tissue, lattice: str, pitch_um: float) -> tuple[np.ndarray, pd.DataFrame]:
    """Spots on tissue: positions in µm and their array coordinates."""
    import pandas as pd

    from ._tissue import Region

    height, width = tissue.size_um
    hexagonal = lattice == "visium"
    row_step = pitch_um * (np.sqrt(3) / 2 if hexagonal else 1)
    n_rows, n_columns = int((height - pitch_um) // row_step) + 1, int((width - pitch_um) // pitch_um) + 1
    row, column = np.indices((max(n_rows, 0), max(n_columns, 0))).reshape(2, -1)
    shifted = (row % 2) / 2 if hexagonal else 0
    xy = np.stack([pitch_um / 2 + (column + shifted) * pitch_um, pitch_um / 2 + row * row_step], axis=1)
    fits = (xy < [width, height]).all(axis=1)
    on_tissue = fits & (tissue.sample(tissue.region, xy) != Region.GLASS)
    if not on_tissue.any():
        raise DataValueError(f"an image of {width:.0f} x {height:.0f} µm has no room for spots {pitch_um:g} µm apart")
    row, column = row[on_tissue], column[on_tissue]
    if hexagonal:  # as Space Ranger counts: every second column of a row
        column = 2 * column + row % 2
    obs = pd.DataFrame(
        {Keys.ARRAY_ROW: row, Keys.ARRAY_COL: column, Keys.IN_TISSUE: 1},
        index=pd.Index([f"{c}x{r}" for c, r in zip(column, row, strict=True)], dtype=object),
    )
    return xy[on_tissue], obs


def _measure(
    rng: np.random.Generator,
    genome: Genome,
    programs: np.ndarray,
    active: np.ndarray,
    cells_um: np.ndarray,
    spots_um: np.ndarray,
    radius_um: float,
    depth: float,
) -> AnnData:
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    from ._expression import PROGRAMS, capture, draw_counts, with_ambient

    caught = capture(spots_um, radius_um, cells_um) @ active
    total = np.median((caught @ programs).sum(axis=1))
    programs = programs * (depth / total if total > 0 else 1.0)
    expected = with_ambient(caught @ programs)
    table = ad.AnnData(
        X=sparse.csr_matrix(draw_counts(rng, expected)),
        var=pd.DataFrame({"program": pd.Categorical(genome.program)}, index=pd.Index(genome.names, dtype=object)),
    )
    table.layers[_TRUTH] = expected.astype(np.float32)
    table.uns[_TRUTH] = {"programs": programs.astype(np.float32), "program_names": list(PROGRAMS)}
    return table


def _points(xy: np.ndarray, cell_type: np.ndarray, active: np.ndarray, programs: tuple[str, ...]) -> pd.DataFrame:
    import pandas as pd

    from ._tissue import CELL_TYPES

    columns: dict[str, Any] = {"x": xy[:, 0], "y": xy[:, 1], "cell_type": pd.Categorical(cell_type, CELL_TYPES)}
    columns |= {f"{_PREFIX}{name}": active[:, k].astype(np.float32) for k, name in enumerate(programs)}
    return pd.DataFrame(columns)
