"""The anatomy of a synthetic section: regions from smooth random fields, and the cells that live in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["CELL_TYPES", "STEP_UM", "Cells", "Region", "Tissue", "make_tissue", "place_cells", "smooth_field"]

STEP_UM: Final = 4.0  # grid of the anatomy
FULL_UM: Final = 1000.0  # side from which a section holds the whole anatomy
CELL_TYPES: Final = ("tumour", "epithelium", "fibroblast", "t_cell", "b_cell", "adipocyte")


class Region:
    """Codes of the region map."""

    GLASS: Final = 0
    STROMA: Final = 1
    TUMOUR: Final = 2
    IMMUNE: Final = 3
    ADIPOSE: Final = 4
    GLAND: Final = 5
    LUMEN: Final = 6


@dataclass(frozen=True, eq=False)
class Tissue:
    """Anatomy on a grid of :data:`STEP_UM`.

    Attributes
    ----------
    size_um
        Height and width of the section in µm.
    region
        Codes of :class:`Region`, (h, w).
    depth_in_tumour
        Signed distance in µm to the border of the tumour, positive inside, (h, w).
    grade
        0 to 1: how atypical the tumour is, (h, w).
    angle
        Direction of the fibres in radians, (h, w).
    gradient
        A field that moves expression and leaves no trace in the image, (h, w).
    """

    size_um: tuple[float, float]
    region: np.ndarray
    depth_in_tumour: np.ndarray
    grade: np.ndarray
    angle: np.ndarray
    gradient: np.ndarray

    def sample(self, field: np.ndarray, xy_um: np.ndarray) -> np.ndarray:
        """Values of a field at positions (n, 2) in µm, x before y."""
        column, row = (xy_um / STEP_UM).astype(np.intp).T
        return field[row.clip(0, field.shape[0] - 1), column.clip(0, field.shape[1] - 1)]


@dataclass(frozen=True, eq=False)
class Cells:
    """Cells of a section; all arrays run over cells.

    Attributes
    ----------
    xy_um
        Centres, (n, 2).
    kind
        Index into :data:`CELL_TYPES`.
    angle
        Direction of the nucleus' long axis.
    axes_um
        Half length and half width of the nucleus, (n, 2).
    stain
        Optical density of the nucleus in hematoxylin.
    texture
        Contrast of its chromatin.
    grade
        Atypia of tumour cells, 0 elsewhere.
    """

    xy_um: np.ndarray
    kind: np.ndarray
    angle: np.ndarray
    axes_um: np.ndarray
    stain: np.ndarray
    texture: np.ndarray
    grade: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class _Nucleus:
    """How the nuclei of one type look and how close they lie."""

    spacing_um: float
    length_um: float
    width_um: float
    spread: float
    stain: float
    texture: float


_NUCLEI: Final = {
    "tumour": _Nucleus(11.4, 9.8, 8.0, 0.12, 0.72, 0.50),
    "epithelium": _Nucleus(7.4, 8.2, 5.8, 0.08, 0.85, 0.30),
    "fibroblast": _Nucleus(16.0, 12.5, 3.2, 0.20, 0.90, 0.30),
    "lymphocyte": _Nucleus(7.2, 6.2, 5.8, 0.07, 1.35, 0.35),
    "adipocyte": _Nucleus(58.0, 9.0, 2.6, 0.12, 1.00, 0.15),
}


def smooth_field(rng: np.random.Generator, shape: tuple[int, int], scale_um: float) -> np.ndarray:
    """Gaussian random field of unit variance with a correlation length of `scale_um`, on the anatomy's grid."""
    from scipy.ndimage import gaussian_filter, zoom

    sigma = scale_um / STEP_UM
    skip = max(1, int(sigma / 4))  # a long field is drawn coarsely: the filter's cost does not grow with its length
    sigma /= skip
    coarse = tuple(-(-length // skip) + 1 for length in shape)
    margin = int(np.ceil(3 * sigma))  # so that the border is like the middle
    noise = rng.standard_normal((coarse[0] + 2 * margin, coarse[1] + 2 * margin), dtype=np.float32)
    field = gaussian_filter(noise, sigma, mode="wrap", truncate=3)[margin:-margin, margin:-margin]
    field *= np.float32(2 * np.sqrt(np.pi) * sigma)  # the variance that the filter took
    if skip > 1:
        field = zoom(field, skip, order=1, mode="nearest")
    return field[: shape[0], : shape[1]]


def make_tissue(rng: np.random.Generator, size_um: tuple[float, float], mixture: dict[str, float]) -> Tissue:
    """Draw the anatomy of a section.

    Parameters
    ----------
    rng
        Source of randomness.
    size_um
        Height and width in µm.
    mixture
        Thresholds of the patient on fields of unit variance: ``tumour``, ``adipose``, ``immune`` (a higher one
        gives less of it), and ``glands``, their number per mm².
    """
    from scipy.ndimage import distance_transform_edt

    shape = max(4, int(np.ceil(size_um[0] / STEP_UM))), max(4, int(np.ceil(size_um[1] / STEP_UM)))
    region = np.full(shape, Region.STROMA, dtype=np.int8)
    # A small piece is drawn with a finer anatomy: else it is one region, or two with a straight border.
    scale = float(np.clip(min(size_um) / FULL_UM, 0.5, 1))

    fat = smooth_field(rng, shape, 150 * scale) + (0.15 if scale == 1 else 0.3) * smooth_field(rng, shape, 30)
    region[fat > mixture["adipose"]] = Region.ADIPOSE

    nests = 0.8 * smooth_field(rng, shape, 55 * scale) + 0.55 * smooth_field(rng, shape, 170 * scale)
    nests += (0.12 if scale == 1 else 0.2) * smooth_field(rng, shape, 12)
    tumour = (nests > mixture["tumour"]) & (region != Region.ADIPOSE)
    region[tumour] = Region.TUMOUR
    depth = (distance_transform_edt(tumour) - distance_transform_edt(~tumour)).astype(np.float32) * STEP_UM

    # lymphoid aggregates gather in the stroma near the tumour
    near = np.exp(-np.maximum(-depth, 0) / 120)
    immune = smooth_field(rng, shape, 45) + 0.9 * near
    region[(immune > mixture["immune"]) & (region == Region.STROMA)] = Region.IMMUNE

    _carve_glands(rng, region, mixture["glands"])
    outline = _outline(rng, shape) if scale == 1 else _small_outline(rng, shape, min(size_um))
    region[~outline] = Region.GLASS

    swirl = [smooth_field(rng, shape, 110 * scale) for _ in range(2)]
    grade = 1 / (1 + np.exp(-1.6 * smooth_field(rng, shape, 130)))
    return Tissue(
        size_um=size_um,
        region=region,
        depth_in_tumour=depth,
        grade=grade.astype(np.float32),
        angle=0.5 * np.arctan2(swirl[0], swirl[1]),
        gradient=smooth_field(rng, shape, 300),
    )


def _outline(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """The piece of tissue on the glass: a wavy rounded square."""
    rows, columns = (np.linspace(-1, 1, length, dtype=np.float32) for length in shape)
    reach = (np.abs(rows[:, None]) ** 4 + np.abs(columns[None, :]) ** 4) ** 0.25
    reach = reach + 0.07 * smooth_field(rng, shape, 220) + 0.012 * smooth_field(rng, shape, 25)
    return reach < 0.92


def _small_outline(rng: np.random.Generator, shape: tuple[int, int], side_um: float) -> np.ndarray:
    """A small piece of tissue: rounder and more uneven than a large one, and never cut by the image's border."""
    rows, columns = (np.linspace(-1, 1, length, dtype=np.float32) for length in shape)
    reach = (np.abs(rows[:, None]) ** 2.5 + np.abs(columns[None, :]) ** 2.5) ** 0.4
    lobes = np.tanh(0.6 * smooth_field(rng, shape, 0.12 * side_um) + 0.15 * smooth_field(rng, shape, 0.025 * side_um))
    return reach < 0.86 + 0.13 * lobes


def _carve_glands(rng: np.random.Generator, region: np.ndarray, per_mm2: float) -> None:
    """Round glands with an open lumen, in the stroma."""
    height, width = region.shape
    number = rng.poisson(per_mm2 * height * width * STEP_UM**2 / 1e6)
    for _ in range(number):
        row, column = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(28, 62) / STEP_UM
        waves = rng.uniform(0.02, 0.14, 3), rng.uniform(0, 2 * np.pi, 3)
        reach = int(np.ceil(1.6 * radius))
        top, left = max(0, int(row) - reach), max(0, int(column) - reach)
        window = region[top : int(row) + reach + 1, left : int(column) + reach + 1]
        if window.size == 0 or not np.isin(window, (Region.STROMA, Region.GLAND, Region.LUMEN)).all():
            continue
        dy = np.arange(top, top + window.shape[0])[:, None] - row
        dx = np.arange(left, left + window.shape[1])[None, :] - column
        angle = np.arctan2(dy, dx)
        edge = radius * (1 + sum(a * np.cos(k * angle + p) for k, a, p in zip((2, 3, 5), *waves, strict=True)))
        distance = np.hypot(dx, dy)
        window[distance < edge] = Region.GLAND
        window[distance < edge - 15 / STEP_UM] = Region.LUMEN


def place_cells(rng: np.random.Generator, tissue: Tissue) -> Cells:
    """Put cells into the regions, without overlap."""
    from scipy.spatial import cKDTree

    placed = [
        ("tumour", _scatter(rng, tissue, "tumour", {Region.TUMOUR: 0.93})),
        ("epithelium", _scatter(rng, tissue, "epithelium", {Region.GLAND: 0.97})),
        (
            "lymphocyte",
            _scatter(rng, tissue, "lymphocyte", {Region.IMMUNE: 0.86, Region.STROMA: 0.035, Region.TUMOUR: 0.035}),
        ),
        ("fibroblast", _scatter(rng, tissue, "fibroblast", {Region.STROMA: 0.62, Region.IMMUNE: 0.2})),
        ("adipocyte", _scatter(rng, tissue, "adipocyte", {Region.ADIPOSE: 0.8})),
    ]
    look = np.concatenate([np.full(len(xy), list(_NUCLEI).index(name)) for name, xy in placed])
    xy = np.concatenate([xy for _, xy in placed])
    # earlier types win where two nuclei would lie on each other
    radius = np.array([(nucleus.length_um + nucleus.width_um) / 4 for nucleus in _NUCLEI.values()])[look]
    pairs = cKDTree(xy).query_pairs(8.0, output_type="ndarray")
    close = np.linalg.norm(xy[pairs[:, 0]] - xy[pairs[:, 1]], axis=1) < 0.8 * radius[pairs].sum(axis=1)
    kept = np.ones(len(xy), dtype=bool)
    kept[pairs[close].max(axis=1, initial=0)] = False
    xy, look = xy[kept], look[kept]
    return _shape_cells(rng, tissue, xy, look)


def _scatter(rng: np.random.Generator, tissue: Tissue, name: str, share: dict[int, float]) -> np.ndarray:
    """Positions of one type: a jittered hexagonal lattice, thinned to the share that each region allows."""
    spacing = _NUCLEI[name].spacing_um
    height, width = tissue.size_um
    rows = np.arange(spacing / 2, height, spacing * 0.87)
    columns = np.arange(spacing / 2, width, spacing)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1)
    grid[1::2, :, 0] += spacing / 2
    xy = grid.reshape(-1, 2)
    xy = xy + rng.normal(0, 0.15 * spacing, xy.shape)
    allowed = np.zeros(8)
    for region, probability in share.items():
        allowed[region] = probability
    inside = ((xy >= 0) & (xy < [width, height])).all(axis=1)
    chosen = inside & (rng.random(len(xy)) < allowed[tissue.sample(tissue.region, xy)])
    return xy[chosen]


def _shape_cells(rng: np.random.Generator, tissue: Tissue, xy: np.ndarray, look: np.ndarray) -> Cells:
    names = list(_NUCLEI)
    nuclei = list(_NUCLEI.values())
    table = np.array([[n.length_um / 2, n.width_um / 2, n.spread, n.stain, n.texture] for n in nuclei])[look]
    half, spread, stain, texture = table[:, :2], table[:, 2], table[:, 3], table[:, 4]
    kind = np.array([CELL_TYPES.index(name) if name in CELL_TYPES else -1 for name in names])[look]
    kind[kind < 0] = _lymphocyte_kinds(rng, tissue, xy[kind < 0])

    is_tumour = kind == CELL_TYPES.index("tumour")
    grade = np.where(is_tumour, tissue.sample(tissue.grade, xy) + rng.normal(0, 0.08, len(xy)), 0.0).clip(0, 1)
    size = np.exp(rng.normal(0, 1, len(xy)) * spread * (1 + 0.9 * grade)) * (1 + 0.30 * (grade - 0.4) * is_tumour)
    axes = half * size[:, None] * np.exp(rng.normal(0, 0.06, half.shape))

    fibre = tissue.sample(tissue.angle, xy) + rng.normal(0, 0.22, len(xy))
    anyhow = rng.uniform(0, np.pi, len(xy))
    return Cells(
        xy_um=xy,
        kind=kind,
        angle=np.where(kind == CELL_TYPES.index("fibroblast"), fibre, anyhow),
        axes_um=axes,
        stain=stain * np.exp(rng.normal(0, 0.13, len(xy))) * (1 + 0.30 * (grade - 0.4) * is_tumour),
        texture=texture * (1 + 0.8 * grade),
        grade=grade,
    )


def _lymphocyte_kinds(rng: np.random.Generator, tissue: Tissue, xy: np.ndarray) -> np.ndarray:
    """T and B cells look alike: B cells fill the aggregates, T cells their rims, the stroma and the tumour."""
    share_b = np.where(tissue.sample(tissue.region, xy) == Region.IMMUNE, 0.65, 0.05)
    is_b = rng.random(len(xy)) < share_b
    return np.where(is_b, CELL_TYPES.index("b_cell"), CELL_TYPES.index("t_cell"))
